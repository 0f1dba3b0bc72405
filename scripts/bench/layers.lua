-- layers.lua - bytes/s of the transformer's layers between matrix products, as a share of a copy in the
-- same run.
--
--   bin/quartermoon --device cuda scripts/bench/layers.lua [rows]      default 16384
--
-- Counted: each input read once and each output written once, in bf16. Target on a GPU: 85 %.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local ceilings = require("quartermoon.ceilings")
local qm = require("quartermoon")
local lib, C = binding.lib, ffi.C

local rows = tonumber(arg[1]) or 16384
local device = qm.default_device()
local SETS = 2 -- operands in turns, so that none waits in a cache
local copy_rate = ceilings.of(device).copy
print(device:info().description)
print(("copy %.1f GB/s"):format(copy_rate * 1e-9))

---@param bytes number
---@param body function  (operands) -> nothing
local function bench(what, bytes, make, body)
  qm.scope(function()
    local sets = {}
    for i = 1, SETS do sets[i] = make() end
    local rate = bytes / ceilings.time(device, function(i) body(sets[i % SETS + 1]) end, 20, 7)
    print(("%-44s %9.1f us %8.1f GB/s  %5.1f %%"):format(what, bytes / rate * 1e6, rate * 1e-9, 100 * rate / copy_rate))
  end)
end

local function call(name, ...) binding.check(lib["qm_" .. name](...), name) end

---The tensors' descriptors by name, and the tensors, which own the memory.
local function descriptors(tensors)
  local set = { tensors = tensors }
  for name, tensor in pairs(tensors) do set[name] = tensor.desc end
  return set
end

local function norms(count, columns)
  local size = 2 * count * columns
  local function make()
    local set = { weight = qm.ones({ columns }), bias = qm.zeros({ columns }), mean = qm.empty({ count }),
      rstd = qm.empty({ count }), dweight = qm.zeros({ columns }), dbias = qm.zeros({ columns }) }
    for _, name in ipairs({ "x", "residual", "sum", "out", "dout", "dx" }) do
      set[name] = qm.randn({ count, columns }, { dtype = "bf16" })
    end
    return descriptors(set)
  end
  local function add(s, residual, sum) -- statistics for the gradients as well
    call("rms_norm", s.x, residual and s.residual, s.weight, sum and s.sum, s.out, s.rstd, 1e-5)
  end
  local at = (" [%d, %d]"):format(count, columns)
  bench("rms_norm" .. at, 2 * size, make, function(s) add(s) end)
  bench("add_rms_norm" .. at, 4 * size, make, function(s) add(s, true, true) end)
  for _, dsum in ipairs({ false, true }) do
    bench("rms_norm_backward" .. (dsum and " + dsum" or "") .. at, (dsum and 4 or 3) * size, make, function(s)
      call("rms_norm_backward", s.dout, s.x, s.weight, s.rstd, dsum and s.residual or nil, s.dx, s.dweight)
    end)
  end
  bench("layer_norm" .. at, 2 * size, make, function(s)
    call("layer_norm", s.x, nil, s.weight, s.bias, nil, s.out, s.mean, s.rstd, 1e-5)
  end)
  bench("add_layer_norm" .. at, 4 * size, make, function(s)
    call("layer_norm", s.x, s.residual, s.weight, s.bias, s.sum, s.out, s.mean, s.rstd, 1e-5)
  end)
  bench("layer_norm_backward + dsum" .. at, 4 * size, make, function(s)
    call("layer_norm_backward", s.dout, s.x, s.weight, s.mean, s.rstd, s.residual, s.dx, s.dweight, s.dbias)
  end)
end

norms(rows, 2048)
norms(rows, 4096)
norms(4 * rows, 768)

local function triple(columns)
  return function()
    local set = {}
    for _, name in ipairs({ "a", "b", "c", "d", "e" }) do
      set[name] = qm.randn({ rows, columns }, { dtype = "bf16" })
    end
    return descriptors(set)
  end
end
local size = 2 * rows * 3072
bench("swiglu", 3 * size, triple(3072), function(s) call("swiglu", s.a, s.b, s.c) end)
bench("swiglu_backward", 5 * size, triple(3072), function(s) call("swiglu_backward", s.a, s.b, s.c, s.d, s.e) end)
for form, name in pairs({ [0] = "exact", "tanh" }) do
  bench("gelu " .. name, 2 * size, triple(3072), function(s) call("unary", C.QM_GELU, s.a, s.b, form, 0) end)
  bench("gelu " .. name .. " backward", 3 * size, triple(3072), function(s)
    call("unary_backward", C.QM_GELU, s.a, s.b, s.c, form, 0)
  end)
end

for _, shape in ipairs({ { 32, 64 }, { 8, 64 }, { 32, 128 } }) do
  local heads, head_size = unpack(shape)
  local positions = {}
  for r = 1, rows do positions[r] = (r - 1) % 2048 end
  local cos, sin = qm.rope_tables(head_size, 2048)
  local at = qm.tensor(positions, { dtype = "i32" })
  bench(("rope [%d, %d, %d]"):format(rows, heads, head_size), 4 * rows * heads * head_size, function()
    local x = qm.randn({ rows, heads, head_size }, { dtype = "bf16" })
    return descriptors({ x = x, out = x:empty_like() })
  end, function(s) call("rope", s.x, cos.desc, sin.desc, at.desc, s.out, 0) end)
end
