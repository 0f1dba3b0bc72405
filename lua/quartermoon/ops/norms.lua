---Rows normalised, each forward (one kernel call) next to its gradient.

local autograd = require("quartermoon.autograd")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local record, needs_grad = autograd.record, autograd.needs_grad
local lib = binding.lib

local M = {}

---Where the gradient of a weight or bias gathers: a leaf's own buffer, or a tensor to hand on when it
---was computed; nil where nobody wants it.
---@return qm.Tensor|nil buffer, boolean|nil hand_on
local function gathering(weight)
  if not needs_grad(weight) then return nil end
  if weight.node then return weight:zeros_like("f32"), true end
  local buffer, beta = autograd.leaf_grad(weight)
  if beta == 0 then buffer:fill(0) end
  return buffer, false
end

---What to return for a weight: nil when its gradient went into the leaf.
local function handed_on(weight, gathered, hand_on)
  if not hand_on then return nil end
  if weight.dtype == "f32" then return gathered end
  local narrow = gathered:to(weight.dtype)
  gathered:free()
  return narrow
end

---The gradients of the normalised tensor and of the weight (nil when it went into the leaf).
local function rms_norm_backward(name, dout, dsum, sum, weight, rstd)
  if not dout then return dsum and dsum:share() end
  local dx, dweight, hand_on = sum:empty_like(), gathering(weight)
  binding.check(lib.qm_rms_norm_backward(dout.desc, sum.desc, weight.desc, rstd.desc, dsum and dsum.desc,
    dx.desc, dweight and dweight.desc), name)
  return dx, handed_on(weight, dweight, hand_on)
end

local function rms_norm(name, x, residual, weight, eps)
  local x_desc, residual_desc = check.desc(name, "x", x), check.optional_desc(name, "residual", residual)
  local weight_desc = check.desc(name, "weight", weight)
  check.number(name, "eps", eps, 0)
  local out, sum = x:empty_like(), residual and x:empty_like()
  local rstd = tensors.empty({ x.shape[1] or 1 }, { device = x.device })
  binding.check(lib.qm_rms_norm(x_desc, residual_desc, weight_desc, sum and sum.desc, out.desc, rstd.desc, eps), name,
    out, sum, rstd)
  return out, sum, rstd
end

---Root mean square normalisation of every row: `x / sqrt(mean(x^2) + eps) * weight`.
---
---Source: Zhang and Sennrich, arXiv 1910.07467.
---
---@param x qm.Tensor       float [R, C]
---@param weight qm.Tensor  float [C], any float type; its gradient gathers in f32
---@param eps number|nil    added to the mean square, default 1e-6
---@return qm.Tensor        x's type and shape
---@raise when types, shapes or devices do not fit
function M.rms_norm(x, weight, eps)
  local name = "qm.rms_norm"
  local out, _, rstd = rms_norm(name, x, nil, weight, eps or 1e-6)
  return record("rms_norm", { x, weight }, { out }, { rstd }, function(dout)
    return rms_norm_backward(name, dout, nil, x, weight, rstd)
  end)
end

---The residual connection and the normalisation behind it in one pass:
---`sum = x + residual; out = rms_norm(sum, weight, eps)`.
---
---@param x qm.Tensor         float [R, C]
---@param residual qm.Tensor  x's type and shape
---@param weight qm.Tensor    float [C], any float type; its gradient gathers in f32
---@param eps number|nil      added to the mean square, default 1e-6
---@return qm.Tensor out      x's type and shape
---@return qm.Tensor sum      x's type and shape
---@raise when types, shapes or devices do not fit
function M.add_rms_norm(x, residual, weight, eps)
  local name = "qm.add_rms_norm"
  check.desc(name, "residual", residual)
  local out, sum, rstd = rms_norm(name, x, residual, weight, eps or 1e-6)
  return record("add_rms_norm", { x, residual, weight }, { out, sum }, { rstd }, function(dout, dsum)
    local dx, dweight = rms_norm_backward(name, dout, dsum, sum, weight, rstd)
    return dx, needs_grad(residual) and dx and dx:share() or nil, dweight
  end)
end

---The same for layer_norm; also the bias's.
local function layer_norm_backward(name, dout, dsum, sum, weight, bias, mean, rstd)
  if not dout then return dsum and dsum:share() end
  local dx, dweight, hand_weight = sum:empty_like(), gathering(weight)
  local dbias, hand_bias = gathering(bias)
  binding.check(lib.qm_layer_norm_backward(dout.desc, sum.desc, weight.desc, mean.desc, rstd.desc,
    dsum and dsum.desc, dx.desc, dweight and dweight.desc, dbias and dbias.desc), name)
  return dx, handed_on(weight, dweight, hand_weight), handed_on(bias, dbias, hand_bias)
end

local function layer_norm(name, x, residual, weight, bias, eps)
  local x_desc, residual_desc = check.desc(name, "x", x), check.optional_desc(name, "residual", residual)
  local weight_desc, bias_desc = check.desc(name, "weight", weight), check.optional_desc(name, "bias", bias)
  check.number(name, "eps", eps, 0)
  local out, sum = x:empty_like(), residual and x:empty_like()
  local mean = tensors.empty({ x.shape[1] or 1 }, { device = x.device })
  local rstd = mean:empty_like()
  binding.check(lib.qm_layer_norm(x_desc, residual_desc, weight_desc, bias_desc, sum and sum.desc, out.desc, mean.desc,
    rstd.desc, eps), name, out, sum, mean, rstd)
  return out, sum, mean, rstd
end

---Layer normalisation of every row: `(x - mean) / sqrt(variance + eps) * weight + bias`.
---
---Source: Ba, Kiros and Hinton, arXiv 1607.06450.
---
---@param x qm.Tensor         float [R, C]
---@param weight qm.Tensor    float [C], any float type; its gradient gathers in f32
---@param bias qm.Tensor|nil  weight's type [C]
---@param eps number|nil      added to the variance, default 1e-5
---@return qm.Tensor          x's type and shape
---@raise when types, shapes or devices do not fit
function M.layer_norm(x, weight, bias, eps)
  local name = "qm.layer_norm"
  local out, _, mean, rstd = layer_norm(name, x, nil, weight, bias, eps or 1e-5)
  return record("layer_norm", { x, weight, bias or false }, { out }, { mean, rstd }, function(dout)
    return layer_norm_backward(name, dout, nil, x, weight, bias, mean, rstd)
  end)
end

---The residual connection and the normalisation behind it in one pass:
---`sum = x + residual; out = layer_norm(sum, weight, bias, eps)`.
---
---@param x qm.Tensor         float [R, C]
---@param residual qm.Tensor  x's type and shape
---@param weight qm.Tensor    float [C], any float type; its gradient gathers in f32
---@param bias qm.Tensor|nil  weight's type [C]
---@param eps number|nil      added to the variance, default 1e-5
---@return qm.Tensor out      x's type and shape
---@return qm.Tensor sum      x's type and shape
---@raise when types, shapes or devices do not fit
function M.add_layer_norm(x, residual, weight, bias, eps)
  local name = "qm.add_layer_norm"
  check.desc(name, "residual", residual)
  local out, sum, mean, rstd = layer_norm(name, x, residual, weight, bias, eps or 1e-5)
  local inputs = { x, residual, weight, bias or false }
  return record("add_layer_norm", inputs, { out, sum }, { mean, rstd }, function(dout, dsum)
    local dx, dweight, dbias = layer_norm_backward(name, dout, dsum, sum, weight, bias, mean, rstd)
    return dx, needs_grad(residual) and dx and dx:share() or nil, dweight, dbias
  end)
end

return M
