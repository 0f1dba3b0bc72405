-- The quantized linear layer against the dense one: few rows, many rows, one layer's whole step.
--
--   bin/quartermoon scripts/bench/qlinear.lua [K N [group_size]]     default 4096 14336 128, and for few
--                                                                    rows the other shapes of such a model
--
-- bf16 activations, 4-bit weights. Every figure is the median of replays of a graph of CALLS calls,
-- which rotate among so many weights that none is in a cache when its turn comes. Beside each stands
-- which part it is of the device's own ceilings, measured first: for few rows the bytes that must
-- move over a copy's bandwidth, for many the operations over a matrix product's rate.
--
-- Targets on one H200, 4096 x 14336: 12, 14, 20 us at 1, 16, 64 rows; at most 1.10 of dense at 2048
-- and 4096 rows, forward and to x; the whole step at 4096 x 4096, 2048 rows, 0.40 ms.

local binding = require("quartermoon.ffi")
local qm = require("quartermoon")
local lib = binding.lib

local SHAPES = { { 4096, 14336 }, { 14336, 4096 }, { 4096, 4096 }, { 4096, 1024 } }
if arg[1] then SHAPES = { { tonumber(arg[1]), tonumber(arg[2]) } } end
local group_size = tonumber(arg[3]) or 128
local device = qm.default_device()
local is_gpu = device:info().threads == 0
local COLD_BYTES = is_gpu and 150e6 or 0 -- beyond any cache's 60 MB
local REPLAYS = is_gpu and 11 or 3

local function rest() if is_gpu then os.execute("sleep 0.5") end end

---Seconds of one body(i), i counting calls.
local function seconds(calls, body)
  if not is_gpu then calls = 2 end
  local graph = qm.graph(function()
    for i = 1, calls do qm.scope(body, i) end
  end, { warmup = 1 })
  for _ = 1, 3 do graph() end
  device:sync()
  rest()
  local times = {}
  for replay = 1, REPLAYS do
    local started = qm.clock.now()
    graph()
    device:sync()
    times[replay] = (qm.clock.now() - started) / calls
  end
  graph:free()
  table.sort(times)
  return times[math.ceil(#times / 2)]
end

---So many of make() that they exceed the caches.
local function rotation(size_bytes, make)
  local list = {}
  for i = 1, math.ceil(COLD_BYTES / size_bytes) + 1 do list[i] = make() end
  return function(i) return list[i % #list + 1] end, function() for _, item in ipairs(list) do item:free() end end
end

local function half(...) return qm.randn({ ... }, nil, 0, 0.02):to("bf16") end
local function quantized(rows, columns, options)
  local w = qm.randn({ rows, columns }, nil, 0, 0.02)
  local q = qm.QParam.quantize(w, options or { group_size = group_size, requires_grad = false })
  w:free()
  return q
end

print(("%s; group %d"):format(device:info().description, group_size))
local most = qm.ceilings.of(device)
local bandwidth, rate = most.copy, most.gemm
print(("ceilings: copy %.1f GB/s, bf16 matrix product %.2f TFLOP/s"):format(bandwidth * 1e-9, rate * 1e-12))

local function line(what, rows, time, dense_time, floor)
  print(("%-10s %5d rows  %9.2f us  (%3.0f %% of the ceiling)   dense %9.2f us, %.3f of it"):format(what, rows,
    time * 1e6, 100 * floor / time, dense_time * 1e6, time / dense_time))
end

---Both products of a layer, quantized and dense.
local function products(k, n, rows, calls)
  local x, dy = half(rows, k), half(rows, n)
  local next_q, free_q = rotation(k * n / 2, function() return quantized(k, n) end)
  local next_w, free_w = rotation(k * n * 2, function() return half(k, n) end)
  local q = next_q(1)
  local floor = math.max((q:size_bytes() + 2 * rows * (k + n)) / bandwidth, 2 * rows * k * n / rate)
  local few = rows <= device:info().fused_rows
  local forward = seconds(calls, function(i) qm.qlinear(x, next_q(i)) end)
  local dense_forward = seconds(calls, function(i) qm.matmul(x, next_w(i)) end)
  line("forward", rows, forward, dense_forward, floor)
  local backward = seconds(calls, function(i) -- what qlinear's backward pass runs
    if few then
      local dx = x:empty_like()
      binding.check(lib.qm_mpq_linear(dy.desc, next_q(i):descriptor("bench"), dx.desc, 1), "bench", dx)
    else
      qm.matmul(dy, next_q(i):dequantize("bf16"), { trans_b = true })
    end
  end)
  local dense_backward = seconds(calls, function(i) qm.matmul(dy, next_w(i), { trans_b = true }) end)
  line("to x", rows, backward, dense_backward, floor)
  free_q()
  free_w()
  x:free()
  dy:free()
end

for i, shape in ipairs(SHAPES) do
  local k, n = unpack(shape)
  print(("\n%d x %d"):format(k, n))
  for _, rows in ipairs({ 1, 4, 8, 16, 32, 64 }) do products(k, n, rows, 40) end
  local many = i > 1 and {} or is_gpu and { 128, 512, 2048, 4096 } or { 128 }
  for _, rows in ipairs(many) do products(k, n, rows, 5) end
end

---Forward, to x, to the weight, and the update, at 4096 x 4096 (smaller on a CPU).
local function whole_step(dtype, moments)
  local size, rows = is_gpu and 4096 or 1024, is_gpu and 2048 or 256
  local x, dy = half(rows, size):requires_gradient(), half(rows, size)
  local q = quantized(size, size, { group_size = 128, grad_dtype = dtype })
  local weight, master = half(size, size):requires_gradient(), qm.randn({ size, size })
  local m, v = qm.zeros({ size, size }, { dtype = moments }), qm.zeros({ size, size }, { dtype = moments })
  local time = seconds(5, function()
    qm.qlinear(x, q):backward(dy)
    qm.QParam.update(q, { step = 1, lr = 1e-4, beta1 = 0.9, exp_avg_l = m, exp_avg_s = v })
    q:zero_grad()
    x:zero_grad()
  end)
  local dense = seconds(5, function()
    qm.linear(x, weight):backward(dy)
    qm.adamw(master, weight.grad, m, v, { step = 1, lr = 1e-4 })
    weight:zero_grad()
    x:zero_grad()
  end)
  print(("whole step, %d x %d, %d rows, gradient %s, moments %s: %.3f ms; dense (its bf16 weight not written) %.3f ms")
    :format(size, size, rows, dtype, moments, time * 1e3, dense * 1e3))
  for _, tensor in ipairs({ x, dy, q, weight, master, m, v }) do tensor:free() end
end
print()
whole_step("f32", "f32")
whole_step("bf16", "bf16")
