-- training.lua - what gpt2.lua and llama.lua share: time whole training steps of a model on random tokens.

local qm = require("quartermoon")

local M = {}

---Options that both scripts declare beside their own sizes.
M.OPTIONS = {
  { "steps", 20, "steps to time", min = 1 },
  { "dtype", "auto", "type of the activations", choices = { "auto", "f32", "bf16" } },
  { "moments", "f32", "type of the optimizer's moments", choices = { "f32", "bf16" } },
  { "parts", 1, "parts of a batch, one behind the other, whose gradients add up", min = 1 },
  { "recompute", "nothing", "in backward", choices = { "nothing", "selective", "blocks" } },
  { "eager", false, "run every step from Lua, without a graph" },
  { "profile", false, "time each operation of one eager step as well" },
}

---A declaration with these options behind the script's own.
function M.declare(name, about, options)
  local declaration = { name = name, about = about, arguments = {} }
  for _, option in ipairs(options) do declaration[#declaration + 1] = option end
  for _, option in ipairs(M.OPTIONS) do declaration[#declaration + 1] = option end
  return declaration
end

---The model's option for what is recomputed.
function M.checkpoint(o) return o.recompute == "blocks" or o.recompute == "selective" and o.recompute end

---Random tokens, and behind each the next one.
local function batches(count, rows, vocab_size)
  local list, state = {}, 12345
  for b = 1, count do
    local tokens, targets = {}, {}
    for i = 1, rows + 1 do
      state = (state * 1103515245 + 12345) % 2 ^ 31
      local token = math.floor(state / 2 ^ 31 * vocab_size)
      if i <= rows then tokens[i] = token end
      if i > 1 then targets[i - 1] = token end
    end
    list[b] = { tokens = qm.tensor(tokens, { dtype = "i32" }), targets = qm.tensor(targets, { dtype = "i32" }) }
  end
  return list
end

---Floating-point operations of a step: 6 per weight of the products and token, and attention's, of which
---the causal mask leaves half.
local function operations(job)
  local tokens, weights = job.batch * job.context, job.product_weights
  return 6 * weights * tokens + 6 * job.layers * job.width * job.context * tokens
end

---Time the steps; print tokens/s, the share of the bf16 product's rate, and peak memory.
---@param model qm.models.Decoder
---@param job table  { batch, context, vocab_size, layers, width = heads * head_size, product_weights =
---   weights that take part in matrix products, the head's included, options = the command line's }
---@return table  { rate = tokens/s, peak_bytes = }
function M.run(model, job)
  local device, o = model.device, job.options
  local offsets, sequences = {}, job.batch / o.parts
  if sequences % 1 ~= 0 then error(("--parts %d do not divide --batch %d"):format(o.parts, job.batch), 0) end
  for i = 0, sequences do offsets[i + 1] = i * job.context end
  local rows, share = sequences * job.context, qm.full({}, 1 / o.parts):keep()
  local optim = qm.optim.new(model, { lr = 1e-4, weight_decay = 0.1, moments = o.moments })
  local function body(tokens, targets)
    local loss
    for part = 0, o.parts - 1 do
      local first = part * rows + 1
      loss = model:loss(tokens:narrow(first, rows), targets:narrow(first, rows), offsets)
      loss:backward(share)
    end
    optim:step()
    optim:zero_grad()
    return loss
  end
  local step = qm.graph(body, { eager = o.eager })
  local data = batches(2, job.batch * job.context, job.vocab_size)
  local first, last
  local function run(i)
    local batch = data[i % 2 + 1]
    return step(batch.tokens, batch.targets)
  end
  device:reset_peak()
  for i = 1, 4 do first = first or run(i):item() end
  device:sync()
  local times = {}
  for i = 1, o.steps do
    local started = qm.clock.now()
    last = run(i)
    device:sync()
    times[i] = qm.clock.now() - started
  end
  table.sort(times)
  local seconds, peak_bytes = times[math.ceil(#times / 2)], device:memory().peak_bytes
  local rate = job.batch * job.context / seconds
  print(("%s: %d x %d tokens in %d parts, %s activations, %s moments, %s"):format(tostring(device), job.batch,
    job.context, o.parts, model.dtype, o.moments, o.eager and "eager" or "graph"))
  print(("loss %.4f -> %.4f"):format(first, last:item()))
  step:free()
  local ceiling = qm.default_device():info().total_bytes > 0 and require("quartermoon.ceilings").of(device) or nil
  local flops = operations(job) / seconds
  print(("%-12s %10.0f tokens/s  %8.2f ms a step  %7.1f TFLOP/s%s  peak %.2f GiB"):format(job.name, rate, seconds * 1e3,
    flops * 1e-12, ceiling and (", %.1f %% of a large bf16 product's %.0f"):format(100 * flops / ceiling.gemm,
    ceiling.gemm * 1e-12) or "", peak_bytes / 2 ^ 30))
  if o.profile then
    print(tostring(qm.profile(function()
      qm.scope(body, data[1].tokens, data[1].targets)
      device:sync()
    end)))
  end
  for _, batch in ipairs(data) do
    batch.tokens:free()
    batch.targets:free()
  end
  share:free()
  optim:free()
  return { rate = rate, peak_bytes = peak_bytes }
end

return M
