-- gemm.lua - TFLOP/s of a linear layer's three matrix products, and of the loss with its output layer.
--
--   bin/quartermoon [--device cuda] scripts/bench/gemm.lua [rows channels features classes]
--
-- Without sizes, those of a small model on a CPU; on a GPU those of single layers, of a Llama of 1.1B and
-- of GPT-2 124M. Shares are of the device's rate at 8192^3 (qm.ceilings), measured in the same run; with
-- QM_CUDA_TUNE=0, of cuBLASLt's first choices.
-- Targets, on two cores with AMX, bf16: 2 TFLOP/s forward and to x, 1.7 to the weight. On an H200 the
-- first choice of cuBLASLt ran at 600 to 870 TFLOP/s, its best of eight at 640 to 880.

local binding = require("quartermoon.ffi")
local qm = require("quartermoon")

local device = qm.default_device()
local on_gpu = device:info().threads == 0
local ceiling = qm.ceilings.of(device).gemm

---What is multiplied: name, rows, channels, features, and whether there is a bias.
local SHAPES = on_gpu and {
  { "4096 x 4096", 2048, 4096, 4096 }, { "4096 x 4096", 4096, 4096, 4096 },
  { "4096 x 14336", 2048, 4096, 14336 }, { "4096 x 14336", 4096, 4096, 14336 },
  { "llama q, o", 16384, 2048, 2048 }, { "llama k, v", 16384, 2048, 512 }, { "llama gate, up", 16384, 2048, 8192 },
  { "llama down", 16384, 8192, 2048 },
  { "gpt2 qkv", 65536, 768, 2304, true }, { "gpt2 proj", 65536, 768, 768, true },
  { "gpt2 fc", 65536, 768, 3072, true }, { "gpt2 out", 65536, 3072, 768, true },
} or { { "layer", 4096, 256, 768 } }
-- What the loss works on: rows, channels, classes, and whether the weight lies by class.
local LOSSES = on_gpu and { { 16384, 2048, 32000 }, { 65536, 768, 50304, true }, { 65536, 768, 50257, true } }
  or { { 4096, 256, 32000 } }
if arg[1] then
  local rows, channels = tonumber(arg[1]), tonumber(arg[2]) or 256
  SHAPES = { { "layer", rows, channels, tonumber(arg[3]) or 768, true } }
  LOSSES = { { rows, channels, tonumber(arg[4]) or 32000 } }
end

local function report(what, operations, seconds)
  print(("  %-26s %10.3f ms  %8.3f TFLOP/s  %5.2f"):format(what, seconds * 1e3, operations / seconds * 1e-12,
    operations / seconds / ceiling))
end

---Time a product over `sets` of operands in turn, more memory than a cache holds.
local function product(what, operations, sets, call)
  local calls = on_gpu and math.max(4, math.min(40, math.floor(4e12 / operations))) or 4
  report(what, operations, qm.ceilings.time(device, function(i) call(sets[i % #sets + 1]) end, calls))
end

---GELU and its gradient, which a product takes along, against a kernel of its own behind it.
local function joined(operations, sets, bias)
  local lib, C = binding.lib, require("ffi").C
  local function run(status) binding.check(status, "joined") end
  for _, s in ipairs(sets) do
    s.aux_x, s.aux_y = qm.randn(s.x.shape, { dtype = s.x.dtype }), s.y:empty_like()
  end
  product("y = gelu(x w + bias)", operations, sets, function(s)
    run(lib.qm_linear(s.x.desc, s.w.desc, bias.desc, s.y.desc, 0, C.QM_EPILOGUE_GELU, s.aux_y.desc))
  end)
  product("  apart", operations, sets, function(s)
    run(lib.qm_linear(s.x.desc, s.w.desc, bias.desc, s.aux_y.desc, 0, 0, nil))
    run(lib.qm_unary(C.QM_GELU, s.aux_y.desc, s.y.desc, 1, 0))
  end)
  product("dx = (dy w^T) gelu'", operations, sets, function(s)
    run(lib.qm_linear(s.y.desc, s.w.desc, nil, s.x.desc, 1, C.QM_EPILOGUE_GELU_GRAD, s.aux_x.desc))
  end)
  product("  apart", operations, sets, function(s)
    run(lib.qm_linear(s.y.desc, s.w.desc, nil, s.x.desc, 1, 0, nil))
    run(lib.qm_unary_backward(C.QM_GELU, s.x.desc, s.aux_x.desc, s.x.desc, 1, 0))
  end)
end

local function layer(name, rows, channels, features, biased, dtype)
  local elements = rows * channels + channels * features + rows * features
  local sets = {}
  for i = 1, on_gpu and math.min(8, math.ceil(2 ^ 28 / (2 * elements))) or 1 do
    sets[i] = { x = qm.randn({ rows, channels }, { dtype = dtype }), w = qm.randn({ channels, features },
      { dtype = dtype }), y = qm.randn({ rows, features }, { dtype = dtype }), dw = qm.zeros({ channels, features }) }
  end
  local bias = biased and qm.randn({ features }) or nil
  local operations = 2 * rows * channels * features
  local function gemm(a, b, out, trans_a, trans_b, beta)
    binding.check(binding.lib.qm_gemm(a.desc, b.desc, out.desc, trans_a, trans_b, 1, beta), "gemm")
  end
  print(("%s, %s: x [%d, %d], weight [%d, %d]"):format(name, dtype, rows, channels, channels, features))
  product("y = x w", operations, sets, function(s) gemm(s.x, s.w, s.y, 0, 0, 0) end)
  if bias then
    product("y = x w + bias", operations, sets, function(s)
      binding.check(binding.lib.qm_linear(s.x.desc, s.w.desc, bias.desc, s.y.desc, 0, 0, nil), "linear")
    end)
  end
  product("dx = dy w^T", operations, sets, function(s) gemm(s.y, s.w, s.x, 0, 1, 0) end)
  product("dw = dw + x^T dy, f32", operations, sets, function(s) gemm(s.x, s.y, s.dw, 1, 0, 1) end)
  if bias then joined(operations, sets, bias) end
end

local function loss(rows, channels, classes, transposed)
  local x = qm.randn({ rows, channels }, { dtype = "bf16" }):requires_gradient()
  local head = qm.randn(transposed and { classes, channels } or { channels, classes }, nil, 0, 0.02):requires_gradient()
  local ids = {}
  for i = 1, rows do ids[i] = i * 7919 % classes end
  local targets, options = qm.tensor(ids, { dtype = "i32" }), { transposed = transposed or false }
  local operations = 2 * rows * channels * classes
  print(("linear_cross_entropy, bf16: x [%d, %d], %d classes"):format(rows, channels, classes))
  report("loss", operations, qm.ceilings.time(device, function()
    qm.no_grad(qm.linear_cross_entropy, x, head, targets, options):free()
  end, 1, 3))
  report("loss and gradients", 3 * operations, qm.ceilings.time(device, function()
    local mean = qm.linear_cross_entropy(x, head, targets, options)
    mean:backward()
    mean:free()
    x:zero_grad()
    head:zero_grad()
  end, 1, 3))
end

print(("%s; bf16 at most %.1f TFLOP/s"):format(device:info().description, ceiling * 1e-12))
for _, dtype in ipairs(on_gpu and { "bf16" } or { "bf16", "f32" }) do
  for _, shape in ipairs(SHAPES) do qm.scope(layer, shape[1], shape[2], shape[3], shape[4], shape[5], dtype) end
end
for _, shape in ipairs(LOSSES) do qm.scope(loss, unpack(shape, 1, 4)) end
