---The linear layer over a quantized weight.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local autograd = require("quartermoon.autograd")
local product = require("quartermoon.product")
local scopes = require("quartermoon.scope")
local tensors = require("quartermoon.tensor")
local lib = binding.lib
local record, needs_grad = autograd.record, autograd.needs_grad

local M = {}

local TRANSPOSED_MOST = 64 -- one pass of x W^T; whether several gain anywhere has not been measured

---Whether a product runs straight from the codes: for few rows. For more, a dense weight that lives no
---longer than the product is faster; the device knows from where on.
local fused_rows = setmetatable({}, { __mode = "k" })
local function is_fused(x, transposed)
  local device = x.device
  if not fused_rows[device] then fused_rows[device] = device:info().fused_rows end
  return x.shape[1] <= (transposed and math.min(fused_rows[device], TRANSPOSED_MOST) or fused_rows[device])
end

---x W, or with `transposed` x W^T, straight from the codes: a new tensor of x's type.
local function fused(name, x, q, transposed)
  local out = tensors.empty({ x.shape[1], q.shape[transposed and 1 or 2] }, { dtype = x.dtype, device = x.device })
  binding.check(lib.qm_mpq_linear(x.desc, q:descriptor(name), out.desc, transposed and 1 or 0), name, out)
  return out
end

---Run `body` on the dense weight in x's type, which lives no longer than that.
local function with_weight(q, dtype, body)
  local w = q:dequantize(dtype)
  local result = body(w)
  w:free()
  return result
end

---x times the parameter's channel scale, a new tensor; x itself where there is none.
local function scaled(name, x, q)
  if not q.channel_scale then return x end
  local out = x:empty_like()
  binding.check(lib.qm_binary(ffi.C.QM_MUL, x.desc, q.channel_scale.desc, out.desc), name, out)
  return out
end

local function multiply(name, x, q, bias)
  if is_fused(x) then return product.add_bias(name, bias, fused(name, x, q, false)) end
  local y = tensors.empty({ x.shape[1], q.shape[2] }, { dtype = x.dtype, device = x.device })
  return with_weight(q, x.dtype, function(w) return product.linear(name, x, w, bias, y) end)
end

local function input_gradient(name, x, q, dout)
  if not needs_grad(x) then return nil end
  local dx
  if is_fused(x, true) then
    dx = fused(name, dout, q, true)
  else
    dx = with_weight(q, x.dtype, function(w)
      if not q.channel_scale then return product.gradient(name, x, dout, w, false, true) end
      return product.gemm(name, dout, w, x:empty_like(), false, true)
    end)
  end
  if not q.channel_scale then return dx end
  local through = scaled(name, dx, q)
  dx:free()
  return through
end

---privileged_grad += x^T dout, in f32 or, where q.grad_dtype says so, in bf16.
local function gather_gradient(name, q, x, dout)
  local beta = q.privileged_grad and 1 or 0
  local sum = q.privileged_grad or tensors.empty(q.shape, { dtype = q.grad_dtype, device = x.device })
  q.privileged_grad = product.gemm(name, x, dout, sum, true, false, beta):keep()
end

local function check_operands(name, x, q, bias)
  check.desc(name, "x", x)
  if type(q) ~= "table" or type(q.descriptor) ~= "function" then check.fail(name, "q", "a qm.QParam", q) end
  if x.shape[2] ~= q.shape[1] or #x.shape ~= 2 then
    check.fail(name, "x", ("a matrix of K=%d columns, for %s"):format(q.shape[1], tostring(q)), x)
  end
  product.check_bias(name, bias, q.shape[2])
end

---Linear layer over a quantized weight: `x W (+ bias)`, W the K x N dequantized weight. Where the
---parameter has a channel scale, x is multiplied by it first, and what follows says x of that.
---
---Few rows are multiplied straight from the codes; for many the dense weight exists while a product
---runs, in forward and again in backward. Backward adds `x^T dy` to `q.privileged_grad` ([K, N] of
---`q.grad_dtype`) when `q.requires_grad`.
---
---@param x qm.Tensor  float [R, K]
---@param q qm.QParam  of shape { K, N }
---@param bias qm.Tensor|nil  float [N]
---@return qm.Tensor   x's type, [R, N]
---@raise when shapes or devices do not fit
function M.qlinear(x, q, bias)
  local name = "qm.qlinear"
  check_operands(name, x, q, bias)
  local input = scaled(name, x, q)
  local out = scopes.guard(function()
    return multiply(name, input, q, bias)
  end)
  local saved = input ~= x and { input } or {}
  return record("qlinear", { x, q, bias or false }, { out }, saved, function(dout)
    local dx = input_gradient(name, x, q, dout)
    if q.requires_grad then gather_gradient(name, q, input, dout) end
    return dx, nil, product.bias_gradient(name, bias, dout)
  end)
end

local GROUP_MAX = tonumber(ffi.C.QM_MPQ_GROUP_MAX)
local group_weights, group_outs = ffi.new("qm_mpq[?]", GROUP_MAX), ffi.new("const qm_tensor *[?]", GROUP_MAX)

---Several quantized linear layers over the same x, as qm.qlinear one by one: for few rows, where no gradient
---is asked for, in one call.
---
---@param x qm.Tensor         float [R, K]
---@param weights qm.QParam[]  of shapes { K, N_i }
---@param biases table|nil    [i] = qm.Tensor float [N_i] or nil
---@return qm.Tensor ...      one for each weight
---@raise as qm.qlinear
function M.qlinear_group(x, weights, biases)
  local name = "qm.qlinear_group"
  check.type(name, "weights", weights, "table")
  biases = check.type(name, "biases", biases or {}, "table")
  local together = #weights <= GROUP_MAX
  for i, q in ipairs(weights) do
    check_operands(name, x, q, biases[i])
    together = together and not q.channel_scale and not (autograd.enabled() and
      (needs_grad(x) or q.requires_grad or needs_grad(biases[i])))
  end
  local outs = {}
  if not (together and #weights > 1 and is_fused(x)) then
    for i, q in ipairs(weights) do outs[i] = M.qlinear(x, q, biases[i]) end
    return unpack(outs)
  end
  for i, q in ipairs(weights) do
    outs[i] = tensors.empty({ x.shape[1], q.shape[2] }, { dtype = x.dtype, device = x.device })
    group_outs[i - 1] = outs[i].desc
    group_weights[i - 1] = q:descriptor(name)
  end
  binding.check(lib.qm_mpq_linear_group(x.desc, group_weights, group_outs, #weights), name)
  for i, out in ipairs(outs) do product.add_bias(name, biases[i], out) end
  return unpack(outs)
end

return M
