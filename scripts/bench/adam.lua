-- adam.lua - how fast the dense optimizer step moves memory, beside a plain copy.
--
--   bin/quartermoon scripts/bench/adam.lua --device cuda
--   bin/quartermoon scripts/bench/adam.lua --elements 4000000

local qm = require("quartermoon")

local o = qm.options.parse(arg, {
  name = "scripts/bench/adam.lua",
  about = "How fast the dense optimizer step moves memory, beside a plain copy.",
  { "device", "", "cpu, cuda ...; the default is $QM_DEVICE or cpu" },
  { "elements", 2 ^ 26, "elements of the parameter", min = 1 },
  { "repeats", 20, "calls in one measurement", min = 1 },
  { "rounds", 5, "measurements; their median counts", min = 1 },
})
if o.device ~= "" then qm.set_default_device(o.device) end
local device = qm.default_device()

---The median seconds of one call.
local function time(body)
  local seconds = {}
  for round = 0, o.rounds do
    device:sync()
    local began = qm.clock.now()
    for _ = 1, o.repeats do body() end
    device:sync()
    seconds[round] = (qm.clock.now() - began) / o.repeats
  end
  table.sort(seconds) -- from 1 on: round 0 warms up
  return seconds[math.ceil(o.rounds / 2)]
end

local SIZE = { f32 = 4, bf16 = 2 }
local function random(dtype) return qm.rand({ o.elements }):to(dtype):keep() end

local a, b = random("f32"), random("f32")
local copied = 8 * o.elements / time(function() b:copy(a) end)
print(("%-58s %8.0f GB/s"):format("copy, f32", copied / 1e9))

local live = qm.adam_write({ { step = 3, lr = 1e-3, weight_decay = 0.1 } }, qm.zeros({ 1, 16 }, { dtype = "i32" }))
local row, scale = live:reshape(16), qm.full({}, 0.5)
for _, types in ipairs({ { "f32", "f32", "f32" }, { "f32", "f32", "bf16" }, { "f32", "bf16", "bf16" },
  { "bf16", "f32", "f32" }, { "bf16", "bf16", "bf16" } }) do
  local w, g, m, v = random(types[1]), random(types[2]), random(types[3]), random(types[3])
  local size_bytes = (2 * SIZE[types[1]] + SIZE[types[2]] + 4 * SIZE[types[3]]) * o.elements
  for _, options in ipairs({ { step = 3, lr = 1e-3, weight_decay = 0.1 }, { live = row, scale = scale } }) do
    local rate = size_bytes / time(function() qm.adamw(w, g, m, v, options) end)
    print(("%-58s %8.0f GB/s %5.1f %% of copy"):format(("adamw, %s weight, %s gradient, %s moments%s"):format(types[1],
      types[2], types[3], options.live and ", live" or ""), rate / 1e9, 100 * rate / copied))
  end
  for _, tensor in ipairs({ w, g, m, v }) do tensor:free() end
end

-- GPT-2's parameters in one call: those beside the blocks, and each block's.
local OTHERS, BLOCK = { 50304 * 768, 1024 * 768, 768, 768 },
  { 768, 768, 768 * 2304, 2304, 768 * 768, 768, 768, 768, 768 * 3072, 3072, 3072 * 768, 768 }
for _, dtype in ipairs({ "f32", "bf16" }) do
  local steps, elements = {}, 0
  for block = 0, 12 do
    for _, count in ipairs(block == 0 and OTHERS or BLOCK) do
      local function zeros(of) return qm.zeros({ count }, { dtype = of }) end
      steps[#steps + 1] = { param = zeros("f32"), grad = zeros("f32"), exp_avg = zeros(dtype),
        exp_avg_sq = zeros(dtype), options = { live = row, scale = scale } }
      elements = elements + count
    end
  end
  local seconds = time(function() qm.adamw(steps) end)
  local rate = (12 + 4 * SIZE[dtype]) * elements / seconds
  local what = ("adamw, GPT-2's %d parameters, %s moments, live"):format(#steps, dtype)
  print(("%-58s %8.0f GB/s %5.1f %% of copy %8.1f us"):format(what, rate / 1e9, 100 * rate / copied, seconds * 1e6))
  for _, step in ipairs(steps) do
    for _, key in ipairs({ "param", "grad", "exp_avg", "exp_avg_sq" }) do step[key]:free() end
  end
end
