---Adam's step on one dense parameter, and Adam's direction alone. qm.optim drives them; they are
---public so that an optimizer of your own can too. Neither is differentiable.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local lib = binding.lib

local M = {}

local ADAM_OPTIONS = { step = check.required, lr = check.required, lr_next = check.optional, beta1 = 0.9,
  beta2 = 0.99, eps = 1e-8, weight_decay = 0, grad_scale = 1, correct_bias = true, seed = 0, parameter = 0 }

---One step's numbers as the kernels take them.
---@param name string  the public function's name
---@param options table  see qm.adamw
---@return ffi.cdata* qm_adam
local function adam_numbers(name, options)
  options = check.options(name, options, ADAM_OPTIONS)
  for _, key in ipairs({ "lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale" }) do
    check.number(name, key, options[key])
  end
  local adam = ffi.new("qm_adam")
  adam.lr, adam.lr_next = options.lr, check.number(name, "lr_next", options.lr_next or options.lr)
  adam.beta1, adam.beta2, adam.eps = options.beta1, options.beta2, options.eps
  adam.weight_decay, adam.grad_scale = options.weight_decay, options.grad_scale
  adam.step = check.integer(name, "step", options.step, 1, 2 ^ 32 - 1)
  adam.correct_bias = options.correct_bias and 1 or 0
  adam.noise.seed = check.integer(name, "seed", options.seed, 0, 2 ^ 32 - 1)
  adam.noise.parameter = check.integer(name, "parameter", options.parameter, 0, 2 ^ 32 - 1)
  return adam
end

---One AdamW step on a dense parameter, in place.
---
---    g = grad_scale * grad;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g
---    a = lr * (correct_bias and sqrt(1 - beta2^step) / (1 - beta1^step) or 1)
---    param = param - a m / (sqrt(v) + eps) - lr weight_decay param
---
---`eps` is added to the uncorrected sqrt(v), so that dense and quantized parameters step alike; most
---libraries correct v first. bf16 tensors are rounded stochastically: the same seed, parameter and
---step give the same bits on every device.
---
---Source: Loshchilov and Hutter, arXiv 1711.05101 (decoupled weight decay).
---
---@param param qm.Tensor       f32 or bf16 [...], overwritten
---@param grad qm.Tensor        float, the same shape
---@param exp_avg qm.Tensor     m: f32 or bf16, the same shape, overwritten; zeros before the first step
---@param exp_avg_sq qm.Tensor  v: likewise
---@param options table  { step (from 1), lr, beta1 = 0.9, beta2 = 0.99, eps = 1e-8, weight_decay = 0,
---   grad_scale = 1, correct_bias = true, seed = 0, parameter = 0 }
---@return qm.Tensor param
---@raise when a type, a shape or an option does not fit
function M.adamw(param, grad, exp_avg, exp_avg_sq, options)
  local name = "qm.adamw"
  local param_desc, grad_desc = check.desc(name, "param", param), check.desc(name, "grad", grad)
  local m_desc, v_desc = check.desc(name, "exp_avg", exp_avg), check.desc(name, "exp_avg_sq", exp_avg_sq)
  binding.check(lib.qm_adamw(param_desc, grad_desc, m_desc, v_desc, adam_numbers(name, options)), name)
  return param
end

---Adam's direction `m / (sqrt(v) + eps)` of one step: for gradients that were projected, whose
---direction is projected back before it meets a weight.
---@param grad qm.Tensor        float [...]
---@param exp_avg qm.Tensor     m: f32 or bf16, the same shape, overwritten
---@param exp_avg_sq qm.Tensor  v: likewise
---@param options table  as for qm.adamw
---@return qm.Tensor update     f32, the same shape
---@raise when a type, a shape or an option does not fit
function M.adam_direction(grad, exp_avg, exp_avg_sq, options)
  local name = "qm.adam_direction"
  local grad_desc, m_desc = check.desc(name, "grad", grad), check.desc(name, "exp_avg", exp_avg)
  local v_desc, adam = check.desc(name, "exp_avg_sq", exp_avg_sq), adam_numbers(name, options)
  local update = grad:empty_like("f32")
  binding.check(lib.qm_adam_direction(grad_desc, m_desc, v_desc, update.desc, adam), name, update)
  return update
end

return M
