---The transformer's layers: forward (one kernel call) next to backward.

local autograd = require("quartermoon.autograd")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local host_buffer = require("quartermoon.host_buffer")
local tensors = require("quartermoon.tensor")
local record, needs_grad = autograd.record, autograd.needs_grad
local lib = binding.lib

local M = {}

---Where rms_norm's weight gradient gathers: the leaf's own buffer, or a tensor to hand on when the
---weight was computed; nil where nobody wants it.
---@return qm.Tensor|nil buffer, boolean|nil hand_on
local function weight_grad(weight)
  if weight.node then return weight:zeros_like("f32"), true end
  if not weight.requires_grad then return nil end
  local buffer, beta = autograd.leaf_grad(weight)
  if beta == 0 then buffer:fill(0) end
  return buffer, false
end

---The gradients of the normalised tensor and of the weight (nil when it went into the leaf).
local function rms_norm_backward(name, dout, dsum, sum, weight, rstd)
  if not dout then return dsum and dsum:share() end
  local dx, dweight, hand_on = sum:empty_like(), weight_grad(weight)
  binding.check(lib.qm_rms_norm_backward(dout.desc, sum.desc, weight.desc, rstd.desc, dsum and dsum.desc,
    dx.desc, dweight and dweight.desc), name)
  if not hand_on then return dx end
  if weight.dtype == "f32" then return dx, dweight end
  local narrow = dweight:to(weight.dtype)
  dweight:free()
  return dx, narrow
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

---Rotary position embedding: for i <= D/2, (x[i], x[i + D/2]) turns by the angle of its row's
---position. Halves are rotated as in Llama checkpoints of the Hugging Face layout.
---
---Source: Su et al., arXiv 2104.09864.
---
---@param x qm.Tensor          float [R, H, D], D even
---@param cos qm.Tensor        f32 [P, D/2]; see qm.rope_tables
---@param sin qm.Tensor        f32 [P, D/2]
---@param positions qm.Tensor  i32 [R], from 0 to P - 1
---@return qm.Tensor           x's type and shape
---@raise when types or shapes do not fit or a position is not in the tables
function M.rope(x, cos, sin, positions)
  local name = "qm.rope"
  local x_desc, positions_desc = check.desc(name, "x", x), check.desc(name, "positions", positions)
  local cos_desc, sin_desc = check.desc(name, "cos", cos), check.desc(name, "sin", sin)
  local out = x:empty_like()
  binding.check(lib.qm_rope(x_desc, cos_desc, sin_desc, positions_desc, out.desc, 0), name, out)
  return record("rope", { x }, { out }, {}, function(dout)
    local dx = dout:empty_like()
    binding.check(lib.qm_rope(dout.desc, cos.desc, sin.desc, positions.desc, dx.desc, 1), name)
    return dx
  end)
end

---A pair's frequency stretched for contexts longer than the model was pretrained on: "linear" divides
---all by factor; "llama3" those whose wavelength is long against the original context, the short ones
---not at all, and goes over smoothly between.
local function stretch(frequency, scaling)
  if scaling.rope_type == "linear" then return frequency / scaling.factor end
  local turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
  local low, high = scaling.low_freq_factor, scaling.high_freq_factor
  local kept = math.min(math.max((turns - low) / (high - low), 0), 1)
  return (1 - kept) * frequency / scaling.factor + kept * frequency
end

local function check_scaling(name, scaling)
  check.type(name, "scaling", scaling, "table")
  check.one_of(name, "scaling.rope_type", scaling.rope_type, { "linear", "llama3" })
  local llama3 = scaling.rope_type == "llama3" and check.required or check.optional
  scaling = check.options(name, scaling, { rope_type = check.required, factor = check.required,
    low_freq_factor = llama3, high_freq_factor = llama3, original_max_position_embeddings = llama3 })
  check.number(name, "scaling.factor", scaling.factor, 1)
  if scaling.rope_type == "linear" then return scaling end
  check.number(name, "scaling.low_freq_factor", scaling.low_freq_factor, 0)
  check.number(name, "scaling.high_freq_factor", scaling.high_freq_factor, 0)
  if scaling.high_freq_factor <= scaling.low_freq_factor then
    check.fail(name, "scaling.high_freq_factor", "a number above low_freq_factor", scaling.high_freq_factor)
  end
  check.integer(name, "scaling.original_max_position_embeddings", scaling.original_max_position_embeddings, 1)
  return scaling
end

---The angles of qm.rope: `cos, sin of p * theta^(-2 i / D)` for positions p and pairs i, from 0.
---Computed in f64 and rounded once. Scaling as in Hugging Face's config.json and its names.
---
---@param head_size integer      D, even
---@param positions_max integer  P: how many positions
---@param theta number|nil       the base of the wavelengths, default 10000
---@param options table|nil      { device = default, scaling = nil or { rope_type = "linear", factor = }
---   or { rope_type = "llama3", factor =, low_freq_factor =, high_freq_factor =,
---   original_max_position_embeddings = } }
---@return qm.Tensor cos         f32 [P, D/2]
---@return qm.Tensor sin         f32 [P, D/2]
function M.rope_tables(head_size, positions_max, theta, options)
  local name = "qm.rope_tables"
  check.integer(name, "head_size", head_size, 2)
  if head_size % 2 ~= 0 then check.fail(name, "head_size", "an even number", head_size) end
  check.integer(name, "positions_max", positions_max, 1)
  theta = check.number(name, "theta", theta or 10000, 1)
  options = check.options(name, options, { device = check.optional, scaling = check.optional })
  local scaling = options.scaling and check_scaling(name, options.scaling)
  local half = head_size / 2
  local count = positions_max * half
  local cosines, sines = host_buffer.memory(name, "f32", count), host_buffer.memory(name, "f32", count)
  for i = 0, half - 1 do
    local frequency = theta ^ (-2 * i / head_size)
    if scaling then frequency = stretch(frequency, scaling) end
    for p = 0, positions_max - 1 do
      cosines[p * half + i], sines[p * half + i] = math.cos(p * frequency), math.sin(p * frequency)
    end
  end
  local cos = tensors.empty({ positions_max, half }, { device = options.device })
  local sin = cos:empty_like()
  binding.check(lib.qm_write(cos.desc, cosines, cos:size_bytes()), name)
  binding.check(lib.qm_write(sin.desc, sines, sin:size_bytes()), name)
  return cos, sin
end

---SwiGLU: `silu(gate) * up`.
---
---Source: Shazeer, arXiv 2002.05202.
---
---@param gate qm.Tensor  float [...]
---@param up qm.Tensor    gate's type and shape
---@return qm.Tensor      the same type and shape
---@raise when types, shapes or devices differ
function M.swiglu(gate, up)
  local name = "qm.swiglu"
  local gate_desc, up_desc = check.desc(name, "gate", gate), check.desc(name, "up", up)
  local out = gate:empty_like()
  binding.check(lib.qm_swiglu(gate_desc, up_desc, out.desc), name, out)
  return record("swiglu", { gate, up }, { out }, {}, function(dout)
    local dgate, dup = gate:empty_like(), up:empty_like()
    binding.check(lib.qm_swiglu_backward(dout.desc, gate.desc, up.desc, dgate.desc, dup.desc), name)
    return dgate, dup
  end)
end

return M
