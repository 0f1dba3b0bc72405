---The linear layer over a quantized weight.

local check = require("quartermoon.check")
local autograd = require("quartermoon.autograd")
local product = require("quartermoon.product")
local scopes = require("quartermoon.scope")
local tensors = require("quartermoon.tensor")
local record, needs_grad = autograd.record, autograd.needs_grad

local M = {}

---Run `body` on the dense weight in x's type, which lives no longer than that.
local function with_weight(q, dtype, body)
  local w = q:dequantize(dtype)
  local result = body(w)
  w:free()
  return result
end

---privileged_grad += x^T dout, f32.
local function gather_gradient(name, q, x, dout)
  local beta = q.privileged_grad and 1 or 0
  local sum = q.privileged_grad or tensors.empty(q.shape, { device = x.device })
  q.privileged_grad = product.gemm(name, x, dout, sum, true, false, beta):keep()
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
  check.desc(name, "x", x)
  if type(q) ~= "table" or type(q.descriptor) ~= "function" then check.fail(name, "q", "a qm.QParam", q) end
  if x.shape[2] ~= q.shape[1] or #x.shape ~= 2 then
    check.fail(name, "x", ("a matrix of K=%d columns, for %s"):format(q.shape[1], tostring(q)), x)
  end
  product.check_bias(name, bias, q.shape[2])
  local out = scopes.guard(function()
    local y = tensors.empty({ x.shape[1], q.shape[2] }, { dtype = x.dtype, device = x.device })
    with_weight(q, x.dtype, function(w) product.gemm(name, x, w, y, false, false) end)
    return product.add_bias(name, bias, y)
  end)
  return record("qlinear", { x, q, bias or false }, { out }, {}, function(dout)
    local dx = needs_grad(x) and with_weight(q, x.dtype, function(w)
      return product.gradient(name, x, dout, w, false, true)
    end) or nil
    if q.requires_grad then gather_gradient(name, q, x, dout) end
    return dx, nil, product.bias_gradient(name, bias, dout)
  end)
end

return M
