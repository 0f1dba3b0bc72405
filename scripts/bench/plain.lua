-- plain.lua - bytes/s of the operations that only move memory, as a share of a copy in the same run.
--
--   bin/quartermoon scripts/bench/plain.lua [pattern]
--
-- Counted: each input read once and each output written once. Operands are larger than the caches.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local qm = require("quartermoon")
local lib, C = binding.lib, ffi.C
local pattern = arg[1] or "."

local device = qm.default_device()

---Seconds of one call: the median of several batches.
local function time(body)
  for _ = 1, 3 do body() end
  device:sync()
  local started = qm.clock.now()
  for _ = 1, 5 do body() end
  device:sync()
  local calls = math.max(1, math.min(100, math.floor(0.01 / ((qm.clock.now() - started) / 5))))
  local batches = {}
  for i = 1, 7 do
    started = qm.clock.now()
    for _ = 1, calls do body() end
    device:sync()
    batches[i] = (qm.clock.now() - started) / calls
  end
  table.sort(batches)
  return batches[4]
end

local copy_rate

local function bench(what, bytes, body)
  if not what:find(pattern) then return end
  local seconds = time(body)
  local rate = bytes / seconds
  print(("%-44s %9.1f us %8.1f GB/s  %5.1f %%"):format(what, seconds * 1e6, rate * 1e-9, 100 * rate / copy_rate))
end

local function call(name, ...) binding.check(lib["qm_" .. name](...), name) end

local BIG = 2 ^ 28 -- elements
local x = qm.randn({ BIG }, { dtype = "bf16" })
local y, out = qm.randn({ BIG }, { dtype = "bf16" }), qm.empty({ BIG }, { dtype = "bf16" })
copy_rate = 4 * BIG / time(function() call("copy", x.desc, out.desc) end)
print(device:info().description)
print(("copy %.1f GB/s"):format(copy_rate * 1e-9))

local function view(tensor, ...) return tensor:view_as("bench", { ... }) end
local f, g = qm.randn({ BIG / 4 }), qm.empty({ BIG / 4 })
local quarter = x:narrow(1, BIG / 4)
bench("fill bf16", 2 * BIG, function() call("fill", out.desc, 1.5) end)
bench("copy bf16 to f32", 6 * BIG / 4, function() call("copy", quarter.desc, g.desc) end)
bench("copy f32 to bf16", 6 * BIG / 4, function() call("copy", f.desc, quarter.desc) end)
bench("unary silu bf16", 4 * BIG, function() call("unary", C.QM_SILU, x.desc, out.desc, 0, 0) end)
bench("unary gelu bf16", 4 * BIG, function() call("unary", C.QM_GELU, x.desc, out.desc, 0, 0) end)
bench("unary affine f32", 8 * BIG / 4, function() call("unary", C.QM_AFFINE, f.desc, g.desc, 2, 1) end)
bench("binary add bf16", 6 * BIG, function() call("binary", C.QM_ADD, x.desc, y.desc, out.desc) end)
local rows = view(x, BIG / 4096, 4096)
bench("binary add a row bf16", 4 * BIG, function()
  call("binary", C.QM_ADD, rows.desc, y:narrow(1, 4096).desc, view(out, BIG / 4096, 4096).desc)
end)
local one = qm.full({}, 0.5)
bench("binary mul by a number, f32, in place", 8 * BIG / 4, function()
  call("binary", C.QM_MUL, g.desc, one.desc, g.desc)
end)
bench("binary mul bf16 by an f32 number", 4 * BIG, function()
  call("binary", C.QM_MUL, x.desc, one.desc, out.desc)
end)
bench("accumulate bf16 into f32", 10 * BIG / 4, function() call("accumulate", quarter.desc, g.desc, 1, 1) end)
bench("accumulate bf16", 6 * BIG, function() call("accumulate", x.desc, out.desc, 1, 1) end)
local noise = ffi.new("qm_noise", 1, 2, 3, 16)
bench("random uniform bf16", 2 * BIG, function() call("random", out.desc, C.QM_UNIFORM, 0, 1, noise) end)
bench("random normal bf16", 2 * BIG, function() call("random", out.desc, C.QM_NORMAL, 0, 1, noise) end)
for _, case in ipairs({ { { 16384, 16384 }, { 2, 1 } }, { { 16, 2048, 8192 }, { 1, 3, 2 } },
  { { 65536, 32, 128 }, { 2, 1, 3 } }, { { 1024, 256, 1024 }, { 3, 2, 1 } } }) do
  local permuted, dims = {}, ffi.new("int32_t[4]")
  for i, dim in ipairs(case[2]) do
    permuted[i] = case[1][dim]
    dims[i - 1] = dim - 1
  end
  local from, to = view(x, unpack(case[1])), view(out, unpack(permuted))
  bench("permute bf16 [" .. table.concat(case[1], ", ") .. "] to " .. table.concat(case[2], " "), 4 * BIG,
    function() call("permute", from.desc, to.desc, dims) end)
end
local from32, to32 = view(f, 8192, 8192), view(g, 8192, 8192)
local swap = ffi.new("int32_t[2]", 1, 0)
bench("permute f32 [8192, 8192]", 8 * BIG / 4, function() call("permute", from32.desc, to32.desc, swap) end)
for _, shape in ipairs({ { 1, BIG }, { 65536, 4096 }, { BIG / 128, 128 }, { 16, BIG / 16 } }) do
  local from, to = view(x, unpack(shape)), qm.empty({ shape[1] })
  bench(("reduce sum bf16 [%d, %d] along 2"):format(unpack(shape)), 2 * BIG,
    function() call("reduce", C.QM_SUM, from.desc, to.desc, 1) end)
  if shape[1] == 65536 then
    local at = qm.empty({ shape[1] }, { dtype = "i32" })
    bench("reduce argmax bf16", 2 * BIG, function() call("reduce", C.QM_ARGMAX, from.desc, at.desc, 1) end)
  end
end
for _, shape in ipairs({ { 65536, 4096 }, { 262144, 1024 }, { 349525, 768 } }) do
  local from, to = view(x:narrow(1, shape[1] * shape[2]), unpack(shape)), qm.empty({ shape[2] })
  bench(("reduce sum bf16 [%d, %d] along 1"):format(unpack(shape)), 2 * shape[1] * shape[2],
    function() call("reduce", C.QM_SUM, from.desc, to.desc, 0) end)
end
bench("reduce sum f32 along 1", 4 * BIG / 4, function()
  call("reduce", C.QM_SUM, view(f, 65536, 1024).desc, qm.empty({ 1024 }).desc, 0)
end)
for name, operand in pairs({ f32 = f, bf16 = x }) do
  local list = ffi.new("const qm_tensor *[1]", { operand.desc })
  bench("sum_squares " .. name, operand:size_bytes(), function() call("sum_squares", list, 1, one.desc, 0) end)
end
-- Extents of a model's parameters: those beside the layers, and a layer's, so many times.
for name, model in pairs({ ["GPT-2 124M"] = { { 50304 * 768, 1024 * 768, 768, 768 },
  { 768, 768, 768 * 2304, 2304, 768 * 768, 768, 768, 768, 768 * 3072, 3072, 3072 * 768, 768 }, 12 },
  ["Llama 1.1B"] = { { 32000 * 2048, 2048, 2048 * 32000 },
    { 2048, 2048 * 2048, 2048 * 256, 2048 * 256, 2048 * 2048, 2048, 2048 * 5632, 2048 * 5632, 5632 * 2048 }, 22 } }) do
  local what = "sum_squares of " .. name .. "'s f32 gradients"
  local tensors, size_bytes = {}, 0
  for layer = 0, what:find(pattern) and model[3] or -1 do
    for _, count in ipairs(model[layer == 0 and 1 or 2]) do
      tensors[#tensors + 1] = qm.full({ count }, 0.5)
      size_bytes = size_bytes + 4 * count
    end
  end
  local list = ffi.new("const qm_tensor *[?]", #tensors)
  for i, tensor in ipairs(tensors) do list[i - 1] = tensor.desc end
  bench(what, size_bytes, function() call("sum_squares", list, #tensors, one.desc, 0) end)
  for _, tensor in ipairs(tensors) do tensor:free() end
end
bench("softmax bf16 [65536, 4096]", 4 * BIG, function()
  call("softmax", rows.desc, view(out, BIG / 4096, 4096).desc)
end)

for _, case in ipairs({ { 50257, 5120 }, { 50304, 5120 }, { 32000, 8192 }, { 128256, 2048 }, { 4096, 65536 } }) do
  local classes, count = unpack(case)
  local logits = view(x:narrow(1, classes * count), count, classes)
  local targets = qm.rand({ count }, nil, 0, classes):to("i32")
  local losses = qm.empty({ count })
  bench(("cross_entropy bf16 [%d, %d], in place"):format(count, classes), 4 * classes * count, function()
    call("cross_entropy", logits.desc, targets.desc, nil, losses.desc, logits.desc, 1, -100, classes)
  end)
  x:copy(y)
end
local wide, losses = view(f:narrow(1, 32000 * 2048), 2048, 32000), qm.empty({ 2048 })
local classes = qm.rand({ 2048 }, nil, 0, 32000):to("i32")
bench("cross_entropy f32 [2048, 32000], in place", 8 * 32000 * 2048, function()
  call("cross_entropy", wide.desc, classes.desc, nil, losses.desc, wide.desc, 1, -100, 32000)
end)

-- Tokens as text has them: the k-th most frequent about 1 / k of the time.
local function tokens(count, vocabulary)
  return ((qm.rand({ count }) * math.log(vocabulary)):exp() - 1):to("i32")
end
for _, case in ipairs({ { 65536, 50257, 768, "f32" }, { 65536, 50257, 768, "bf16" },
  { 16384, 32000, 2048, "bf16" } }) do
  local count, vocabulary, channels, dtype = unpack(case)
  local weight = qm.randn({ vocabulary, channels }, { dtype = dtype })
  local gradient = qm.zeros({ vocabulary, channels })
  local rows_out = view(x:narrow(1, count * channels), count, channels)
  for kind, index in pairs({ text = tokens(count, vocabulary), alike = qm.zeros({ count }, { dtype = "i32" }),
    random = qm.rand({ count }, nil, 0, vocabulary):to("i32") }) do
    local name = (" %s [%d, %d], %s tokens"):format(dtype, count, channels, kind)
    bench("gather" .. name, count * channels * (2 + (dtype == "f32" and 4 or 2)),
      function() call("gather", weight.desc, index.desc, rows_out.desc) end)
    if dtype == "bf16" then -- the rows of out that are hit are not counted
      bench("scatter_add" .. name, count * channels * 2,
        function() call("scatter_add", rows_out.desc, index.desc, gradient.desc) end)
    end
  end
end
