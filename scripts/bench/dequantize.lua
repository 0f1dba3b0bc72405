-- How fast are packed codes decoded, measured against a copy of as many bytes?
--
--   [QM_DEVICE=cuda] bin/quartermoon scripts/bench/dequantize.lua [K N [w_bit [group_size]]]
--
-- Default: 1024 x 4096 on the CPU, 4096 x 4096 and 4096 x 14336 on a GPU; 4 bits, group 128.
-- Bytes: codes and grid read, weights written. Every figure is the median of many runs after warm-up
-- and half a second of rest; so many parameters and outputs take turns that no cache holds them.
--
-- Target on a GPU: 90 % of the copy, to every type.

local qm = require("quartermoon")

local device = qm.default_device()
local on_gpu = device.name:match("^cuda") ~= nil
local RUNS, WARM_UP = on_gpu and 25 or 11, 3
local TURNS_BYTES = on_gpu and 400e6 or 0 -- what all turns together write, at least

local function median(times)
  table.sort(times)
  return times[math.floor(#times / 2) + 1]
end

---Median time of body(turn) over all turns, in seconds.
local function measure(turns, body)
  local times = {}
  if on_gpu then os.execute("sleep 0.5") end
  for run = 1, RUNS + WARM_UP do
    device:sync()
    local started = qm.clock.now()
    for turn = 1, turns do body(turn) end
    device:sync()
    times[run] = (qm.clock.now() - started) / turns
  end
  return median({ unpack(times, WARM_UP + 1) })
end

local function bench(k, n, w_bit, group_size, asym, dtype)
  local turns, parameters, outputs = math.max(1, math.ceil(TURNS_BYTES / (k * n * 2))), {}, {}
  for turn = 1, turns do
    local w = qm.randn({ k, n }, nil, 0, 0.02)
    parameters[turn] = qm.QParam.quantize(w, { w_bit = w_bit, group_size = group_size, asym = asym })
    w:free()
    outputs[turn] = parameters[turn]:dequantize(dtype)
  end
  local q = parameters[1]
  local bytes = q.data:size_bytes() + q.scales:size_bytes() + q.zeros:size_bytes() + outputs[1]:size_bytes()
  local seconds = measure(turns, function(turn)
    outputs[turn]:free() -- its memory is taken again at once
    outputs[turn] = parameters[turn]:dequantize(dtype)
  end)
  local elements = math.floor(bytes / 8)
  local from, to = {}, {}
  for turn = 1, turns do from[turn], to[turn] = qm.randn({ elements }), qm.zeros({ elements }) end
  local copy_seconds = measure(turns, function(turn) to[turn]:copy(from[turn]) end)
  local rate, copy_rate = bytes / seconds * 1e-9, elements * 8 / copy_seconds * 1e-9
  print(("%d x %d, %d bit, group %d, %-4s to %-4s  %7.4f ms  %6.1f MB  %7.1f GB/s   copy %7.1f GB/s   %5.1f %%"):format(
    k, n, w_bit, group_size, asym and "asym" or "sym", dtype, seconds * 1e3, bytes * 1e-6, rate, copy_rate,
    100 * rate / copy_rate))
  for turn = 1, turns do
    parameters[turn]:free()
    for _, tensor in ipairs({ outputs[turn], from[turn], to[turn] }) do tensor:free() end
  end
end

local shapes = { { tonumber(arg[1]), tonumber(arg[2]) } }
if #shapes[1] == 0 then shapes = on_gpu and { { 4096, 4096 }, { 4096, 14336 } } or { { 1024, 4096 } } end
local w_bit, group_size = tonumber(arg[3]) or 4, tonumber(arg[4]) or 128
print(device:info().description)
for _, shape in ipairs(shapes) do
  for _, asym in ipairs({ true, false }) do
    for _, dtype in ipairs({ "bf16", "f16", "f32" }) do bench(shape[1], shape[2], w_bit, group_size, asym, dtype) end
  end
end
