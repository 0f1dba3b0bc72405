-- How fast is the update step of a quantized parameter, measured against a copy of as many bytes?
--
--   bin/quartermoon scripts/bench/update.lua [K N [w_bit [group_size]]]     default 1024 4096 4 128
--
-- Bytes of a step: codes (and residual) read and written, gradient read, both moments read and
-- written, the grid read. The copy moves f32 tensors of the same bytes in all. Every figure is the
-- median of many runs after warm-up, the two taken in turns so that a busy machine hits both alike.
--
-- Target: at least 70 % of the copy for f32 moments.

local qm = require("quartermoon")

local k, n = tonumber(arg[1]) or 1024, tonumber(arg[2]) or 4096
local w_bit, group_size = tonumber(arg[3]) or 4, tonumber(arg[4]) or 128
local RUNS, WARM_UP = 41, 5

local function median(times)
  table.sort(times)
  return times[math.floor(#times / 2) + 1]
end

local function timed(device, body)
  local started = qm.clock.now()
  body()
  device:sync()
  return qm.clock.now() - started
end

---Medians of several bodies, run in turns.
local function measure(device, bodies)
  local times = {}
  for i, body in ipairs(bodies) do
    times[i] = {}
    for _ = 1, WARM_UP do body() end
  end
  for run = 1, RUNS do
    for i, body in ipairs(bodies) do times[i][run] = timed(device, body) end
  end
  for i = 1, #bodies do times[i] = median(times[i]) end
  return times
end

local function bench(feedback, dtype, rounding)
  local w = qm.randn({ k, n }, nil, 0, 0.02)
  local q = qm.QParam.quantize(w, { w_bit = w_bit, group_size = group_size,
    residual_bits = feedback == "residual" and 8 or 0 })
  w:free()
  local grad = qm.randn({ k, n })
  local m, v = qm.zeros({ k, n }, { dtype = dtype }), qm.zeros({ k, n }, { dtype = dtype })
  local bytes = 2 * q.data:size_bytes() + 2 * (q.residual and q.residual:size_bytes() or 0) + grad:size_bytes()
    + 2 * (m:size_bytes() + v:size_bytes()) + q.scales:size_bytes() + q.zeros:size_bytes()
  local elements = math.floor(bytes / 8)
  local from, to = qm.zeros({ elements }), qm.zeros({ elements })
  local step = 0
  local times = measure(grad.device, {
    function()
      step = qm.QParam.update(q, { step = step, lr = 1e-3, weight_decay = 0.1, grad = grad, exp_avg_l = m,
        exp_avg_s = v, beta1 = 0.9, beta2 = 0.99, correct_bias = true, feedback = feedback, rounding = rounding })
    end,
    function() to:copy(from) end,
  })
  local rate, copy_rate = bytes / times[1] * 1e-9, elements * 8 / times[2] * 1e-9
  print(("%-10s %-10s %-4s  %7.3f ms  %6.1f MB  %6.2f GB/s   copy %6.2f GB/s   %5.1f %%"):format(rounding, feedback,
    dtype, times[1] * 1e3, bytes * 1e-6, rate, copy_rate, 100 * rate / copy_rate))
  q:free()
  for _, tensor in ipairs({ grad, m, v, from, to }) do tensor:free() end
end

local info = qm.default_device():info()
print(("%s, %d threads; %d x %d, %d bit, group %d"):format(info.description, info.threads, k, n, w_bit, group_size))
for _, dtype in ipairs({ "f32", "bf16" }) do
  bench("none", dtype, "nearest")
  for _, feedback in ipairs({ "none", "momentum", "residual" }) do bench(feedback, dtype, "stochastic") end
end
