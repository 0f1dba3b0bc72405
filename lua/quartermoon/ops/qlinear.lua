---The linear layer over a quantized weight.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local autograd = require("quartermoon.autograd")
local tensors = require("quartermoon.tensor")
local lib = binding.lib
local record, needs_grad = autograd.record, autograd.needs_grad

local M = {}

---Run `body` on the dense weight in x's type, which lives no longer than that.
local function with_weight(q, dtype, body)
  local w = q:dequantize(dtype)
  local status = body(w)
  w:free()
  return status
end

---privileged_grad += x^T dout, f32.
local function gather_gradient(name, q, x, dout)
  local beta = q.privileged_grad and 1 or 0
  local sum = q.privileged_grad or tensors.empty(q.shape, { device = x.device }):keep()
  q.privileged_grad = sum
  binding.check(lib.qm_gemm(x.desc, dout.desc, sum.desc, 1, 0, 1, beta), name)
end

local function bias_gradient(name, bias, dout)
  local dbias = bias:empty_like("f32")
  binding.check(lib.qm_reduce(ffi.C.QM_SUM, dout.desc, dbias.desc, 0), name)
  if not bias.node or bias.dtype == "f32" then return dbias end
  local cast = dbias:to(bias.dtype)
  dbias:free()
  return cast
end

---Linear layer over a quantized weight: `x W (+ bias)`, W the K x N dequantized weight.
---
---The dense weight exists only while a product runs, in forward and again in backward. Backward adds
---`x^T dy` to `q.privileged_grad` (f32 [K, N]) when `q.requires_grad`.
---
---@param x qm.Tensor  float [R, K]
---@param q qm.QParam  of shape { K, N }
---@param bias qm.Tensor|nil  float [N]
---@return qm.Tensor   x's type, [R, N]
---@raise when shapes or devices do not fit
function M.qlinear(x, q, bias)
  local name = "qm.qlinear"
  local x_desc = check.desc(name, "x", x)
  if type(q) ~= "table" or type(q.descriptor) ~= "function" then check.fail(name, "q", "a qm.QParam", q) end
  local bias_desc = check.optional_desc(name, "bias", bias)
  if x.shape[2] ~= q.shape[1] or #x.shape ~= 2 then
    check.fail(name, "x", ("a matrix of K=%d columns, for %s"):format(q.shape[1], tostring(q)), x)
  end
  local out = tensors.empty({ x.shape[1], q.shape[2] }, { dtype = x.dtype, device = x.device })
  binding.check(with_weight(q, x.dtype, function(w)
    return lib.qm_gemm(x_desc, w.desc, out.desc, 0, 0, 1, 0)
  end), name)
  if bias then binding.check(lib.qm_binary(ffi.C.QM_ADD, out.desc, bias_desc, out.desc), name) end
  return record("qlinear", { x, q, bias or false }, { out }, {}, function(dout)
    local dx
    if needs_grad(x) then
      dx = x:empty_like()
      binding.check(with_weight(q, x.dtype, function(w)
        return lib.qm_gemm(dout.desc, w.desc, dx.desc, 0, 1, 1, 0)
      end), name)
    end
    if q.requires_grad then gather_gradient(name, q, x, dout) end
    return dx, nil, bias and needs_grad(bias) and bias_gradient(name, bias, dout) or nil
  end)
end

return M
