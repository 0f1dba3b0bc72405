-- How fast is the update step of a quantized parameter, measured against a copy of as many bytes?
--
--   [QM_DEVICE=cuda] bin/quartermoon scripts/bench/update.lua [K N [w_bit [group_size [gradient type]]]]
--
-- Default: 1024 x 4096 on the CPU, 4096 x 4096 and 4096 x 14336 on a GPU; 4 bits, group 128, f32.
--
-- Bytes of a step: codes (and residual) read and written, gradient read, both moments read and
-- written, the grid read. The copy moves f32 tensors of as many bytes. Every figure is the median of
-- many runs after warm-up and half a second of rest, the two taken in turns so that a busy machine
-- hits both alike; two parameters take turns too, so that no cache holds what comes next.
--
-- Targets: of the copy, 70 % for f32 moments on a CPU; 90 % and, for bf16 moments, 85 % on a GPU.

local qm = require("quartermoon")

local device = qm.default_device()
local on_gpu = device.name:match("^cuda") ~= nil
local RUNS, WARM_UP = on_gpu and 25 or 21, 3
local CALLS = on_gpu and 10 or 1 -- of each of two parameters in one run

local function median(times)
  table.sort(times)
  return times[math.floor(#times / 2) + 1]
end

local function timed(body)
  device:sync()
  local started = qm.clock.now()
  for _ = 1, CALLS do body() end
  device:sync()
  return (qm.clock.now() - started) / CALLS
end

local function rest()
  if on_gpu then os.execute("sleep 0.5") end
end

---Medians of several bodies, run in turns.
local function measure(bodies)
  local times = {}
  rest()
  for i, body in ipairs(bodies) do
    times[i] = {}
    for _ = 1, WARM_UP do body() end
  end
  for run = 1, RUNS do
    for i, body in ipairs(bodies) do times[i][run] = timed(body) end
  end
  for i = 1, #bodies do times[i] = median(times[i]) end
  return times
end

local function random(k, n, deviation, dtype)
  return qm.scope(function() return qm.randn({ k, n }, nil, 0, deviation):to(dtype) end)
end

---A parameter amid training: everything its step touches, and the bytes it moves.
local function subject(k, n, w_bit, group_size, grad_dtype, moment_dtype, feedback)
  local w = random(k, n, 0.02, "f32")
  local s = { step = 5, q = qm.QParam.quantize(w, { w_bit = w_bit, group_size = group_size,
    residual_bits = feedback == "residual" and 8 or 0 }) }
  w:free()
  s.grad, s.m = random(k, n, 1e-3, grad_dtype), random(k, n, 1e-4, moment_dtype)
  s.v = qm.full({ k, n }, 1e-8, { dtype = moment_dtype })
  local q = s.q
  s.bytes = 2 * q.data:size_bytes() + 2 * (q.residual and q.residual:size_bytes() or 0) + s.grad:size_bytes()
    + 2 * (s.m:size_bytes() + s.v:size_bytes()) + q.scales:size_bytes() + q.zeros:size_bytes()
  return s
end

local function bench(shape, feedback, moment_dtype, rounding)
  local k, n = shape.k, shape.n
  local subjects = {}
  for i = 1, 2 do
    subjects[i] = subject(k, n, shape.w_bit, shape.group_size, shape.grad_dtype, moment_dtype, feedback)
  end
  local bytes = subjects[1].bytes
  local elements = math.floor(bytes / 8)
  local from, to = qm.randn({ elements }), qm.zeros({ elements })
  local times = measure({
    function()
      for _, s in ipairs(subjects) do
        s.step = qm.QParam.update(s.q, { step = s.step, lr = 1e-3, weight_decay = 0.1, grad = s.grad, exp_avg_l = s.m,
          exp_avg_s = s.v, beta1 = 0.9, beta2 = 0.99, correct_bias = true, feedback = feedback, rounding = rounding })
      end
    end,
    function()
      to:copy(from)
      from:copy(to)
    end,
  })
  local rate, copy_rate = 2 * bytes / times[1] * 1e-9, 2 * elements * 8 / times[2] * 1e-9
  print(("%-10s %-10s %-4s  %7.4f ms  %6.1f MB  %7.1f GB/s   copy %7.1f GB/s   %5.1f %%"):format(rounding, feedback,
    moment_dtype, times[1] / 2 * 1e3, bytes * 1e-6, rate, copy_rate, 100 * rate / copy_rate))
  for _, s in ipairs(subjects) do
    s.q:free()
    for _, tensor in ipairs({ s.grad, s.m, s.v }) do tensor:free() end
  end
  from:free()
  to:free()
end

local shapes = { { tonumber(arg[1]), tonumber(arg[2]) } }
if #shapes[1] == 0 then shapes = on_gpu and { { 4096, 4096 }, { 4096, 14336 } } or { { 1024, 4096 } } end
local info = device:info()
for _, shape in ipairs(shapes) do
  shape.k, shape.n = shape[1], shape[2]
  shape.w_bit, shape.group_size, shape.grad_dtype = tonumber(arg[3]) or 4, tonumber(arg[4]) or 128, arg[5] or "f32"
  print(("%s, %d threads; %d x %d, %d bit, group %d, %s gradient"):format(info.description, info.threads, shape.k,
    shape.n, shape.w_bit, shape.group_size, shape.grad_dtype))
  for _, dtype in ipairs({ "f32", "bf16" }) do
    bench(shape, "none", dtype, "nearest")
    for _, feedback in ipairs({ "none", "momentum", "residual" }) do bench(shape, feedback, dtype, "stochastic") end
  end
end
