---Matrix products as operations use them: one kernel call, and where a product is a gradient, straight
---into the tensor that gathers it.

local ffi = require("ffi")
local autograd = require("quartermoon.autograd")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local lib = binding.lib
local C = ffi.C
local needs_grad = autograd.needs_grad

local M = {}

local EPILOGUES = { gelu = C.QM_EPILOGUE_GELU, gelu_grad = C.QM_EPILOGUE_GELU_GRAD }

---out = op(a) op(b) + beta out.
function M.gemm(name, a, b, out, trans_a, trans_b, beta)
  binding.check(lib.qm_gemm(a.desc, b.desc, out.desc, trans_a and 1 or 0, trans_b and 1 or 0, 1, beta or 0), name)
  return out
end

---out = x weight + bias, where a bias is given; x weight^T with `transposed`.
---@param epilogue string|nil  "gelu": aux = that, out = gelu(aux); "gelu_grad": out = that times gelu'(aux)
---@param aux qm.Tensor|nil    of out's type and shape
function M.linear(name, x, weight, bias, out, transposed, epilogue, aux)
  binding.check(lib.qm_linear(x.desc, weight.desc, bias and bias.desc, out.desc, transposed and 1 or 0,
    epilogue and EPILOGUES[epilogue] or C.QM_EPILOGUE_NONE, aux and aux.desc), name)
  return out
end

---The gradient op(a) op(b) of `input`: added to what has gathered of it where that is possible (into a
---leaf's own buffer always), and then nothing is left to return; else a new tensor of its type.
function M.gradient(name, input, a, b, trans_a, trans_b)
  if not needs_grad(input) then return nil end
  local sum, beta = autograd.gathered(input), 1
  if not input.node then sum, beta = autograd.leaf_grad(input) end
  if not sum then return M.gemm(name, a, b, input:empty_like(), trans_a, trans_b) end
  M.gemm(name, a, b, sum, trans_a, trans_b, beta)
  return nil
end

---Raise unless bias is nil or has one number for each of the columns.
---@param argument string|nil  its name, default "bias"
function M.check_bias(name, bias, columns, argument)
  if bias == nil then return end
  argument = argument or "bias"
  check.desc(name, argument, bias)
  if #bias.shape ~= 1 or bias.shape[1] ~= columns then
    check.fail(name, argument, ("float [N=%s]"):format(columns), bias)
  end
end

---Add a bias (or nil) to every row of out, in place.
function M.add_bias(name, bias, out)
  if bias then binding.check(lib.qm_binary(C.QM_ADD, out.desc, bias.desc, out.desc), name) end
  return out
end

---The gradient of a bias: the sum of dout's rows, f32 for a leaf.
function M.bias_gradient(name, bias, dout)
  if not needs_grad(bias) then return nil end
  local dbias = bias:empty_like("f32")
  binding.check(lib.qm_reduce(C.QM_SUM, dout.desc, dbias.desc, 0), name)
  if not bias.node or bias.dtype == "f32" then return dbias end
  local cast = dbias:to(bias.dtype)
  dbias:free()
  return cast
end

return M
