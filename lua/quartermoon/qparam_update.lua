---The update step of a quantized parameter: one call, in place, no dense weight.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local scopes = require("quartermoon.scope")
local lib = binding.lib

local M = {}

local OPTIONS = {
  exp_avg_s = check.optional, exp_avg_l = check.optional, step = check.required, lr = 1e-4, weight_decay = 0,
  beta1 = 0.99, beta2 = 0.9999, eps = 1e-6, dtype = check.optional, correct_bias = false, projector = check.optional,
  grad = check.optional, grad_scale = 1, mode = "own", rounding = "stochastic", feedback = check.optional,
  grid = "fixed", refit_every = 100, refit_method = "minmax", lr_next = check.optional, seed = 0,
  health = check.optional, live = check.optional, scale = check.optional,
}
local ROUNDING = { nearest = tonumber(ffi.C.QM_ROUND_NEAREST), stochastic = tonumber(ffi.C.QM_ROUND_STOCHASTIC) }
local FEEDBACK = { none = tonumber(ffi.C.QM_FEEDBACK_NONE), momentum = tonumber(ffi.C.QM_FEEDBACK_MOMENTUM),
  residual = tonumber(ffi.C.QM_FEEDBACK_RESIDUAL) }
local REFIT_STREAM = tonumber(ffi.C.QM_STREAM_WEIGHT)

local function check_options(name, q, options)
  local o = check.options(name, options, OPTIONS)
  for _, key in ipairs({ "lr", "weight_decay", "beta1", "beta2", "eps", "grad_scale" }) do
    check.number(name, key, o[key])
  end
  o.lr_next = check.number(name, "lr_next", o.lr_next or o.lr, 0)
  check.integer(name, "step", o.step, 0, 2 ^ 32 - 2)
  check.integer(name, "seed", o.seed, 0, 2 ^ 32 - 1)
  check.integer(name, "refit_every", o.refit_every, 1)
  check.type(name, "correct_bias", o.correct_bias, "boolean")
  check.one_of(name, "mode", o.mode, { "own", "bie" })
  check.one_of(name, "rounding", o.rounding, { "nearest", "stochastic" })
  check.one_of(name, "grid", o.grid, { "fixed", "refit" })
  o.feedback = o.feedback or (q.residual_bits > 0 and "residual" or "none")
  check.one_of(name, "feedback", o.feedback, { "none", "momentum", "residual" })
  if o.feedback == "momentum" and o.projector then
    binding.raise(name .. ": argument 'feedback': 'momentum' does nothing under a projector, for the moments lie in "
      .. "the subspace and hold only the projection of the rounding error: use 'residual' "
      .. "(quantize with residual_bits = 4 or 8)")
  end
  if o.feedback == "momentum" and o.rounding == "nearest" then
    binding.raise(name .. ": argument 'feedback': 'momentum' needs rounding = 'stochastic': with nearest rounding "
      .. "it keeps a dead zone of many codes")
  end
  if (o.exp_avg_s == nil) ~= (o.exp_avg_l == nil) then
    check.fail(name, o.exp_avg_s == nil and "exp_avg_s" or "exp_avg_l", "both moments, or neither", nil)
  end
  if o.dtype ~= nil then check.type(name, "dtype", o.dtype, "string") end
  if o.dtype ~= nil and o.exp_avg_l ~= nil then
    check.desc(name, "exp_avg_l", o.exp_avg_l)
    if o.exp_avg_l.dtype ~= o.dtype then check.fail(name, "exp_avg_l", o.dtype .. " (dtype)", o.exp_avg_l) end
  end
  return o
end

local function fill_adam(name, adam, q, o)
  adam.live, adam.scale = check.optional_desc(name, "live", o.live), check.optional_desc(name, "scale", o.scale)
  adam.lr, adam.lr_next, adam.beta1, adam.beta2, adam.eps = o.lr, o.lr_next, o.beta1, o.beta2, o.eps
  adam.weight_decay, adam.grad_scale, adam.step = o.weight_decay, o.grad_scale, o.step + 1
  adam.correct_bias = o.correct_bias and 1 or 0
  adam.noise.seed, adam.noise.parameter = o.seed, q.id
  return adam
end

---Check the parameter before a projector or a moment changes. Index tensors on a GPU are read back,
---which waits: that once, as long as they are the same tensors.
local seen = setmetatable({}, { __mode = "k" })
local function validate(q)
  local last = seen[q]
  if last and last.g_idx == q.g_idx and last.q_perm == q.q_perm and q.data.device.name:match("^cuda") then return end
  q:validate()
  if q.g_idx or q.q_perm then seen[q] = { g_idx = q.g_idx, q_perm = q.q_perm } end
end

---The direction in the subspace. The original rounds its moments to nearest, and knows f16 ones.
local function low_rank_direction(name, low, o, adam)
  local m, v = o.exp_avg_l, o.exp_avg_s
  local m_desc, v_desc = check.desc(name, "exp_avg_l", m), check.desc(name, "exp_avg_s", v)
  local u = low:empty_like("f32")
  if o.mode == "own" or m.dtype == "f32" then
    binding.check(lib.qm_adam_direction(low.desc, m_desc, v_desc, u.desc, adam), name)
    return u
  end
  local m32, v32 = m:to("f32"), v:to("f32")
  binding.check(lib.qm_adam_direction(low.desc, m32.desc, v32.desc, u.desc, adam), name)
  m:copy(m32)
  v:copy(v32)
  local rounded = u:to(m.dtype)
  for _, tensor in ipairs({ m32, v32, u }) do tensor:free() end
  return rounded
end

---The direction at full size: projected gradient, Adam in the subspace, back.
local function projected_direction(name, q, o, adam)
  local low = o.grad
  if not low then
    local gradient = q.privileged_grad
    check.desc(name, "grad", gradient)
    local cast = o.mode == "bie" and o.exp_avg_l and gradient.dtype ~= o.exp_avg_l.dtype
      and gradient:to(o.exp_avg_l.dtype) or nil
    low = o.projector:project(cast or gradient, o.step)
    if cast and cast ~= low then cast:free() end
  end
  check.desc(name, "grad", low)
  local u = o.exp_avg_l and low_rank_direction(name, low, o, adam) or low
  local full = o.projector:project_back(u)
  if u ~= low and u ~= full then u:free() end
  if low ~= o.grad and low ~= q.privileged_grad and low ~= full then low:free() end
  if o.exp_avg_l then adam.grad_scale = 1 end -- already in the moments
  return full
end

---Fit the grid to the weight as it stands, residual included, and round to it.
local function refit(q, o)
  local w = q:dequantize("f32", "residual")
  q:fit(w, o.refit_method)
  q:pack(w, { rounding = o.rounding, noise = { seed = o.seed, step = o.step + 1, stream = REFIT_STREAM } })
  w:free()
end

---Take one Adam step, overwriting the codes, the moments and (feedback "residual") the residual.
---
---    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g
---    a = lr * (correct_bias and sqrt(1 - beta2^step) / (1 - beta1^step) or 1), step counted from 1
---    u = m / (sqrt(v) + eps), through the projector's project_back where there is one
---    w = w - a u - lr weight_decay w, rounded to the grid
---
---`mode = "own"` rounds stochastically by default, so that the expected weight is exact however
---small the step, and can feed the rounding error back: `feedback = "momentum"` puts it into
---exp_avg_l (arXiv 2601.22101; no extra memory; for 4 bits from scratch, with beta1 = 0.9),
---"residual" keeps it in the parameter's residual (3 bits and below, projectors). Elements whose
---gradient is not finite stay as they are. `mode = "bie"` is bitorch-engine's step to the bit: nearest
---rounding (steps below half a code are lost), zeros moved at every fifth step, no weight decay.
---
---@param q qm.QParam
---@param options table
---   step                 steps taken before this one
---   exp_avg_l, exp_avg_s  first and second moment: f32 or bf16 (stochastically rounded) [K, N], low
---                        rank under a projector; both absent: the gradient is the direction u already
---   grad                 default q.privileged_grad; under a projector the projected gradient, which by
---                        default is projector:project(q.privileged_grad, step)
---   lr = 1e-4, weight_decay = 0, beta1 = 0.99, beta2 = 0.9999, eps = 1e-6, correct_bias = false
---   dtype                the moments' type; raises when they have another
---   projector            { project(grad, step), project_back(low_rank) }
---   grad_scale = 1       multiplies the gradient (clipping)
---   live                 i32 [16], a row that qm.adam_write wrote, read when the kernel runs: instead of
---                        step, lr, lr_next, weight_decay, betas, eps, correct_bias, grad_scale and seed
---                        there (`step` here still says when to refit and to project; under a
---                        projector written with grad_scale = 1)
---   scale                f32 {}, read when the kernel runs: multiplies the gradient too; where it is not
---                        finite, the step changes nothing
---   mode = "own"         or "bie"
---   rounding = "stochastic"  or "nearest"
---   feedback             "none", "momentum", "residual" (default where q has a residual)
---   lr_next = lr         the following step's learning rate, for feedback = "momentum"
---   grid = "fixed"       or "refit": fit scales and zeros anew at every refit_every = 100th step, by
---                        refit_method = "minmax" or "mse"
---   seed = 0             of the random bits, with q.id and the step
---   health               i64 [4], accumulates: elements, codes that moved, values clipped to the
---                        grid's ends, elements skipped because they were not finite
---@return integer step  steps taken now
---@raise when a type, a shape or an option does not fit; the parameter is not changed then
function M.update(q, options)
  local name = "qm.QParam.update"
  if type(q) ~= "table" or type(q.descriptor) ~= "function" then check.fail(name, "q", "a qm.QParam", q) end
  local o = check_options(name, q, options)
  local update = ffi.new("qm_mpq_update_options")
  update.rounding, update.feedback = ROUNDING[o.rounding], FEEDBACK[o.feedback]
  local adam = fill_adam(name, update.adam, q, o)
  local m, v, full = check.optional_desc(name, "exp_avg_l", o.exp_avg_l),
    check.optional_desc(name, "exp_avg_s", o.exp_avg_s), nil
  local health = check.optional_desc(name, "health", o.health)
  local grad = o.grad or q.privileged_grad
  if o.projector then
    validate(q)
    full = scopes.guard(projected_direction, name, q, o, adam)
    grad, m, v = full, nil, nil
  end
  local grad_desc = check.desc(name, "grad", grad)
  local description = q:descriptor(name)
  local status
  if o.mode == "bie" then
    status = lib.qm_mpq_update_bie(description, grad_desc, m, v, adam)
  else
    status = lib.qm_mpq_update(description, grad_desc, m, v, update, health)
  end
  if full and full ~= o.grad and full ~= q.privileged_grad then full:free() end
  binding.check(status, name)
  if o.grid == "refit" and o.mode == "own" and (o.step + 1) % o.refit_every == 0 then refit(q, o) end
  return o.step + 1
end

return M
