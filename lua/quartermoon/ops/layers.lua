---The transformer's layers without norms and attention: forward (one kernel call) next to backward.

local autograd = require("quartermoon.autograd")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local host_buffer = require("quartermoon.host_buffer")
local rope_scaling = require("quartermoon.rope_scaling")
local tensors = require("quartermoon.tensor")
local lib, record = binding.lib, autograd.record

local M = {}

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

---A step of generation in one pass: q turned as by qm.rope; k, turned, and v go to their places among the
---keys and values that are kept. No gradients.
---
---@param q qm.Tensor          float [R, H, D], D even
---@param k qm.Tensor          q's type, [R, HK, D]
---@param v qm.Tensor          the same
---@param cos qm.Tensor        f32 [P, D/2]; see qm.rope_tables
---@param sin qm.Tensor        f32 [P, D/2]
---@param positions qm.Tensor  i32 [R], from 0 to P - 1
---@param places qm.Tensor     i32 [R], from 0 to V - 1, none twice
---@param keys qm.Tensor       q's type, [V, HK, D], overwritten where places point
---@param values qm.Tensor     the same
---@return qm.Tensor           q turned
---@raise when types or shapes do not fit, a number is out of range, or a tensor needs gradients
function M.rope_append(q, k, v, cos, sin, positions, places, keys, values)
  local name = "qm.rope_append"
  local descs = {}
  for i, operand in ipairs({ { "q", q }, { "k", k }, { "v", v }, { "cos", cos }, { "sin", sin },
    { "positions", positions }, { "places", places }, { "keys", keys }, { "values", values } }) do
    descs[i] = check.desc(name, operand[1], operand[2])
  end
  for argument, x in pairs({ q = q, k = k, v = v }) do
    if autograd.needs_grad(x) then
      check.fail(name, argument, "a tensor that needs no gradient (see qm.no_grad)", x)
    end
  end
  local out = q:empty_like()
  binding.check(lib.qm_rope_append(descs[1], descs[2], descs[3], descs[4], descs[5], descs[6], descs[7], out.desc,
    keys:writable(name).desc, values:writable(name).desc), name, out)
  return out
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
    if scaling then frequency = rope_scaling.stretch(frequency, scaling) end
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
