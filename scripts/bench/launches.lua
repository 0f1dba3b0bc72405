-- launches.lua - what it costs to ask a device for something: an operation, a graph's replay, a number
-- read back, bytes to and fro; and a small model's training step, eager and as a graph.
--
--   bin/quartermoon scripts/bench/launches.lua [device]

local qm = require("quartermoon")
local tensors = require("quartermoon.tensor")

local device = assert(qm.device(arg[1] or tostring(qm.default_device())))
qm.set_default_device(device)
local time = qm.ceilings.time

local function row(what, seconds, rest) print(("%-44s %10.2f us%s"):format(what, seconds * 1e6, rest or "")) end

print(device:info().description)
local x = qm.zeros({ 1024 })
local CALLS = 200
local function many()
  for _ = 1, CALLS do x:fill(1) end
end
row("a small operation", time(device, many) / CALLS)
local chain = qm.graph(many)
row("the same in a graph of " .. CALLS, time(device, function() chain() end) / CALLS)
row("asking for a graph of " .. CALLS .. ", host alone", (function()
  chain()
  device:sync()
  local started = qm.clock.now()
  chain()
  local seconds = qm.clock.now() - started
  device:sync()
  return seconds
end)())

local number = qm.zeros({})
row("a number read back", time(device, function() number:item() end, 100))
row("the same, later", time(device, function() number:read_later():get() end, 100))
row("a small tensor from Lua numbers", time(device, function() qm.tensor({ 1, 2, 3, 4 }):free() end, 1000))

local COUNT = 2 ^ 26
local big, buffer = qm.zeros({ COUNT }, { dtype = "i32" }), tensors.host_buffer("i32", COUNT)
local function bandwidth(seconds) return (", %.1f GB/s"):format(4 * COUNT / seconds * 1e-9) end
local seconds = time(device, function() big:read_elements(1, COUNT, buffer) end, 2, 3)
row("256 MiB to the host", seconds, bandwidth(seconds))
seconds = time(device, function() tensors.from_host(buffer, COUNT, "i32"):free() end, 2, 3)
row("256 MiB from the host", seconds, bandwidth(seconds))
big:free()

---Seconds of a training step.
local function training(options)
  qm.seed(1)
  local model = qm.models.llama.new({ vocab_size = 1024, hidden_size = 256, intermediate_size = 704,
    num_hidden_layers = 8, num_attention_heads = 8, num_key_value_heads = 2, tie_word_embeddings = true })
  local optim = qm.optim.new(model, { lr = 1e-3 })
  local step = qm.graph(function(tokens)
    local loss = model:loss(tokens, tokens)
    loss:backward()
    optim:clip_grad_norm(1)
    optim:step()
    optim:zero_grad()
    return loss
  end, options)
  local list = {}
  for i = 1, 512 do list[i] = i * 7 % 1024 end
  local tokens = qm.tensor(list, { dtype = "i32" })
  local median = time(device, function() step(tokens):free() end, 5)
  local count = #optim.slots
  step:free()
  optim:free()
  model:free()
  return median, count
end
local eager, parameters = training({ eager = true })
row(("a training step, %d parameters, eager"):format(parameters), eager)
row("the same as a graph", (training()))
