---Adam's step on dense parameters, Adam's direction alone, and a step's numbers on the device.
---qm.optim drives them; they are public so that an optimizer of your own can too. Neither is differentiable.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local lib = binding.lib

local M = {}

local ADAM_OPTIONS = { step = check.optional, lr = check.optional, lr_next = check.optional, beta1 = 0.9,
  beta2 = 0.99, eps = 1e-8, weight_decay = 0, grad_scale = 1, correct_bias = true, seed = 0, parameter = 0,
  live = check.optional, scale = check.optional }

---Put one step's numbers into a qm_adam.
---@param name string  the public function's name
---@param options table  see qm.adamw
---@param adam ffi.cdata* qm_adam, zeroed
local function fill(name, options, adam)
  options = check.options(name, options, ADAM_OPTIONS)
  adam.live, adam.scale = check.optional_desc(name, "live", options.live), check.optional_desc(name, "scale",
    options.scale)
  if options.live then return adam end
  for _, key in ipairs({ "lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale" }) do
    check.number(name, key, options[key])
  end
  adam.lr, adam.lr_next = options.lr, check.number(name, "lr_next", options.lr_next or options.lr)
  adam.beta1, adam.beta2, adam.eps = options.beta1, options.beta2, options.eps
  adam.weight_decay, adam.grad_scale = options.weight_decay, options.grad_scale
  adam.step = check.integer(name, "step", options.step, 1, 2 ^ 32 - 1)
  adam.correct_bias = options.correct_bias and 1 or 0
  adam.noise.seed = check.integer(name, "seed", options.seed, 0, 2 ^ 32 - 1)
  adam.noise.parameter = check.integer(name, "parameter", options.parameter, 0, 2 ^ 32 - 1)
  return adam
end

---Write the numbers of some steps to where kernels read them when they run: the row of a step is its
---option `live`. One write to the device; a recorded graph is then played with these numbers.
---@param steps table[]   options of qm.adamw, one table for each row; their live and scale do not count
---@param live qm.Tensor  i32 [#steps, 16], overwritten
---@return qm.Tensor live
---@raise when a shape or an option does not fit
function M.adam_write(steps, live)
  local name = "qm.adam_write"
  local count = #check.type(name, "steps", steps, "table")
  local adams = ffi.new("qm_adam[?]", math.max(count, 1))
  for i, options in ipairs(steps) do fill(name, options, adams[i - 1]) end
  binding.check(lib.qm_adam_write(adams, count, check.desc(name, "live", live)), name)
  return live
end

---One AdamW step on a dense parameter, in place; or on each of a list of them, in one call.
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
---@param param qm.Tensor|table[]  f32 or bf16 [...], overwritten; or, alone, a list of what follows by
---   name: { param =, grad =, exp_avg =, exp_avg_sq =, options = }, on one device
---@param grad qm.Tensor        float, the same shape
---@param exp_avg qm.Tensor|nil     m: f32 or bf16, the same shape, overwritten; zeros before the first step
---@param exp_avg_sq qm.Tensor|nil  v: likewise; without moments grad is the direction already
---@param options table
---   step (from 1), lr, beta1 = 0.9, beta2 = 0.99, eps = 1e-8, weight_decay = 0, grad_scale = 1,
---   correct_bias = true, seed = 0, parameter = 0
---   live                 i32 [16], a row that qm.adam_write wrote, read when the kernel runs: instead of
---                        the numbers above
---   scale                f32 {}, read when the kernel runs: multiplies the gradient too (but no
---                        direction); where it is not finite, the step changes nothing
---@return qm.Tensor|table[] param
---@raise when a type, a shape or an option does not fit; nothing changes then
function M.adamw(param, grad, exp_avg, exp_avg_sq, options)
  local name = "qm.adamw"
  local list = { { param = param, grad = grad, exp_avg = exp_avg, exp_avg_sq = exp_avg_sq, options = options } }
  if type(param) == "table" and not getmetatable(param) and grad == nil then list = param end
  local steps = ffi.new("qm_adamw_step[?]", math.max(#list, 1))
  for i = 1, #list do
    local given, step = check.type(name, ("param[%d]"):format(i), list[i], "table"), steps[i - 1]
    step.param, step.grad = check.desc(name, "param", given.param), check.desc(name, "grad", given.grad)
    step.exp_avg = check.optional_desc(name, "exp_avg", given.exp_avg)
    step.exp_avg_sq = check.optional_desc(name, "exp_avg_sq", given.exp_avg_sq)
    fill(name, given.options, step.adam)
  end
  binding.check(lib.qm_adamw(steps, #list), name)
  return param
end

---Adam's direction `m / (sqrt(v) + eps)` of one step: for gradients that were projected, whose
---direction is projected back before it meets a weight.
---@param grad qm.Tensor        float [...]
---@param exp_avg qm.Tensor     m: f32 or bf16, the same shape, overwritten
---@param exp_avg_sq qm.Tensor  v: likewise
---@param options table  as for qm.adamw
---@return qm.Tensor update     f32, the same shape; 0 where `scale` is not finite
---@raise when a type, a shape or an option does not fit
function M.adam_direction(grad, exp_avg, exp_avg_sq, options)
  local name = "qm.adam_direction"
  local grad_desc, m_desc = check.desc(name, "grad", grad), check.desc(name, "exp_avg", exp_avg)
  local v_desc = check.desc(name, "exp_avg_sq", exp_avg_sq)
  local adam = fill(name, options, ffi.new("qm_adam"))
  local update = grad:empty_like("f32")
  binding.check(lib.qm_adam_direction(grad_desc, m_desc, v_desc, update.desc, adam), name, update)
  return update
end

local SCALE_OPTIONS = { factor = 1, max_norm = math.huge }

---From the sum of the squares of all gradients, on the device: how far a step scales them, see qm.adamw's
---`scale`. Nothing is waited for.
---
---    norm = factor * sqrt(squares);  scale = factor * min(1, max_norm / norm), NaN where norm is not finite
---
---Source: Pascanu, Mikolov and Bengio, arXiv 1211.5063 (clipping by the norm).
---@param squares qm.Tensor  f32 {}: see qm.sum_squares
---@param norm qm.Tensor     f32 {}, overwritten
---@param scale qm.Tensor    f32 {}, overwritten
---@param skipped qm.Tensor  i64 {}: counts one more where the norm is not finite
---@param options table|nil  { factor = 1: multiplies every gradient, max_norm = infinite }
---@return qm.Tensor scale
---@raise when a type or a shape does not fit
function M.grad_scale(squares, norm, scale, skipped, options)
  local name = "qm.grad_scale"
  options = check.options(name, options, SCALE_OPTIONS)
  local squares_desc, norm_desc = check.desc(name, "squares", squares), check.desc(name, "norm", norm)
  local scale_desc, skipped_desc = check.desc(name, "scale", scale), check.desc(name, "skipped", skipped)
  check.number(name, "factor", options.factor)
  if type(options.max_norm) ~= "number" then check.fail(name, "max_norm", "a number", options.max_norm) end
  binding.check(lib.qm_grad_scale(squares_desc, norm_desc, scale_desc, skipped_desc, options.factor,
    options.max_norm), name)
  return scale
end

return M
