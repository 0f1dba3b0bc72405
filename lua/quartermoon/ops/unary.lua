---Elementwise operations on one tensor, each forward (one kernel call) next to its gradient. All are
---methods too: qm.exp(x) is x:exp(), and -x is qm.neg(x), x ^ 3 is qm.pow(x, 3).

local ffi = require("ffi")
local check = require("quartermoon.check")
local Tensor = require("quartermoon.tensor").Tensor
local kernels = require("quartermoon.ops.apply")
local C = ffi.C
local apply, unary_into, binary_into = kernels.apply, kernels.unary_into, kernels.binary_into
local times, times_temporary = kernels.times, kernels.times_temporary

local M = {}

local function unary(name, op, gradient)
  name = "qm." .. name
  return function(x) return apply(name, op, gradient, x) end
end

---`-x`. @param x qm.Tensor float [...]. @return qm.Tensor of x's type and shape, as all below
M.neg = unary("neg", C.QM_NEG, function(dout) return unary_into(C.QM_NEG, dout, dout:empty_like()) end)

---Magnitude; its gradient at 0 is 0.
M.abs = unary("abs", C.QM_ABS, function(dout, x)
  local sign = unary_into(C.QM_SIGN, x, x:empty_like())
  return times_temporary(dout, sign)
end)

---e^x.
M.exp = unary("exp", C.QM_EXP, function(dout, _, out) return times(dout, out) end)

---Natural logarithm.
M.log = unary("log", C.QM_LOG, function(dout, x) return binary_into(C.QM_DIV, dout, x, x:empty_like()) end)

---Square root.
M.sqrt = unary("sqrt", C.QM_SQRT, function(dout, _, out)
  local dx = binary_into(C.QM_DIV, dout, out, out:empty_like())
  return unary_into(C.QM_AFFINE, dx, dx, 0.5)
end)

---1 / sqrt(x).
M.rsqrt = unary("rsqrt", C.QM_RSQRT, function(dout, _, out)
  local cube = out:to("f32")
  unary_into(C.QM_POW, cube, cube, 3)
  unary_into(C.QM_AFFINE, cube, cube, -0.5)
  return times_temporary(dout, cube)
end)

---1 / x.
M.reciprocal = unary("reciprocal", C.QM_RECIPROCAL, function(dout, _, out)
  local square = binary_into(C.QM_MUL, out, out, out:empty_like("f32"))
  unary_into(C.QM_NEG, square, square)
  return times_temporary(dout, square)
end)

---Hyperbolic tangent.
M.tanh = unary("tanh", C.QM_TANH, function(dout, _, out)
  local slope = binary_into(C.QM_MUL, out, out, out:empty_like("f32"))
  unary_into(C.QM_AFFINE, slope, slope, -1, 1)
  return times_temporary(dout, slope)
end)

---1 / (1 + e^-x).
M.sigmoid = unary("sigmoid", C.QM_SIGMOID, function(dout, _, out)
  local slope = out:to("f32")
  unary_into(C.QM_AFFINE, slope, slope, -1, 1)
  binary_into(C.QM_MUL, slope, out, slope)
  return times_temporary(dout, slope)
end)

---x * sigmoid(x). Source: arXiv 1702.03118.
M.silu = unary("silu", C.QM_SILU, function(dout, x)
  return times_temporary(dout, unary_into(C.QM_SILU_GRAD, x, x:empty_like()))
end)

---max(x, 0).
M.relu = unary("relu", C.QM_RELU, function(dout, _, out)
  return times_temporary(dout, unary_into(C.QM_SIGN, out, out:empty_like()))
end)

---x * x.
M.square = unary("square", C.QM_SQUARE, function(dout, x)
  local dx = times(dout, x)
  return unary_into(C.QM_AFFINE, dx, dx, 2)
end)

---Sine, of radians.
M.sin = unary("sin", C.QM_SIN, function(dout, x)
  return times_temporary(dout, unary_into(C.QM_COS, x, x:empty_like()))
end)

---Cosine, of radians.
M.cos = unary("cos", C.QM_COS, function(dout, x)
  local slope = unary_into(C.QM_SIN, x, x:empty_like())
  return times_temporary(dout, unary_into(C.QM_NEG, slope, slope))
end)

---1, 0 or -1. Passes no gradient.
M.sign = unary("sign", C.QM_SIGN)
---The greatest integer not above x. Passes no gradient.
M.floor = unary("floor", C.QM_FLOOR)
---The nearest integer, halves to even. Passes no gradient.
M.round = unary("round", C.QM_ROUND)

---GELU, `x Phi(x)`. Source: arXiv 1606.08415.
---@param x qm.Tensor  float [...]
---@param approximation string|nil  "none", the default, or "tanh" as in GPT-2
---@return qm.Tensor   x's type and shape
function M.gelu(x, approximation)
  local form = check.one_of("qm.gelu", "approximation", approximation or "none", { "none", "tanh" })
  local p0 = form == "tanh" and 1 or 0
  return apply("qm.gelu", C.QM_GELU, function(dout)
    return times_temporary(dout, unary_into(C.QM_GELU_GRAD, x, x:empty_like(), p0))
  end, x, p0)
end

---x held between low and high; the gradient passes where x was inside.
---@param x qm.Tensor  float [...]
---@param low number   may be -math.huge
---@param high number  at least low; may be math.huge
---@return qm.Tensor   x's type and shape
function M.clamp(x, low, high)
  check.number("qm.clamp", "low", low)
  check.number("qm.clamp", "high", high, low)
  return apply("qm.clamp", C.QM_CLAMP, function(dout, _, out)
    return times_temporary(dout, binary_into(C.QM_EQ, x, out, x:empty_like()))
  end, x, low, high)
end

---x to the power of a number.
---@param x qm.Tensor       float [...]
---@param exponent number
---@return qm.Tensor        x's type and shape
function M.pow(x, exponent)
  check.desc("qm.pow", "x", x)
  check.number("qm.pow", "exponent", exponent)
  return apply("qm.pow", C.QM_POW, function(dout)
    if exponent == 0 then return dout:zeros_like() end -- 0 * x^-1 would be NaN where x is 0
    local slope = unary_into(C.QM_POW, x, x:empty_like(), exponent - 1)
    local dx = times_temporary(dout, slope)
    return unary_into(C.QM_AFFINE, dx, dx, exponent)
  end, x, exponent)
end

for name, operation in pairs(M) do Tensor[name] = operation end
Tensor.__unm, Tensor.__pow = M.neg, M.pow

return M
