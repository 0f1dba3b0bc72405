---Elementwise operations on one tensor, each one kernel call, as is each gradient. All are methods too:
---qm.exp(x) is x:exp(), and -x is qm.neg(x), x ^ 3 is qm.pow(x, 3).

local ffi = require("ffi")
local check = require("quartermoon.check")
local Tensor = require("quartermoon.tensor").Tensor
local apply = require("quartermoon.ops.apply").apply
local C = ffi.C

local M = {}

---@param flat boolean|nil  true: no gradient passes
local function unary(name, op, flat)
  name = "qm." .. name
  return function(x) return apply(name, op, flat, x) end
end

---`-x`. @param x qm.Tensor float [...]. @return qm.Tensor of x's type and shape, as all below
M.neg = unary("neg", C.QM_NEG)
---Magnitude; its gradient at 0 is 0.
M.abs = unary("abs", C.QM_ABS)
---e^x.
M.exp = unary("exp", C.QM_EXP)
---Natural logarithm.
M.log = unary("log", C.QM_LOG)
---Square root.
M.sqrt = unary("sqrt", C.QM_SQRT)
---1 / sqrt(x).
M.rsqrt = unary("rsqrt", C.QM_RSQRT)
---1 / x.
M.reciprocal = unary("reciprocal", C.QM_RECIPROCAL)
---Hyperbolic tangent.
M.tanh = unary("tanh", C.QM_TANH)
---1 / (1 + e^-x).
M.sigmoid = unary("sigmoid", C.QM_SIGMOID)
---x * sigmoid(x). Source: arXiv 1702.03118.
M.silu = unary("silu", C.QM_SILU)
---max(x, 0); its gradient at 0 is 0.
M.relu = unary("relu", C.QM_RELU)
---x * x.
M.square = unary("square", C.QM_SQUARE)
---Sine, of radians.
M.sin = unary("sin", C.QM_SIN)
---Cosine, of radians.
M.cos = unary("cos", C.QM_COS)
---1, 0 or -1. Passes no gradient.
M.sign = unary("sign", C.QM_SIGN, true)
---The greatest integer not above x. Passes no gradient.
M.floor = unary("floor", C.QM_FLOOR, true)
---The nearest integer, halves to even. Passes no gradient.
M.round = unary("round", C.QM_ROUND, true)

---GELU, `x Phi(x)`. Source: arXiv 1606.08415.
---@param x qm.Tensor  float [...]
---@param approximation string|nil  "none", the default, or "tanh" as in GPT-2 ("gelu_new" there)
---@return qm.Tensor   x's type and shape
function M.gelu(x, approximation)
  local form = check.one_of("qm.gelu", "approximation", approximation or "none", { "none", "tanh" })
  return apply("qm.gelu", C.QM_GELU, false, x, form == "tanh" and 1 or 0)
end

---x held between low and high; the gradient passes where x was inside.
---@param x qm.Tensor  float [...]
---@param low number   may be -math.huge
---@param high number  at least low; may be math.huge
---@return qm.Tensor   x's type and shape
function M.clamp(x, low, high)
  check.number("qm.clamp", "low", low)
  check.number("qm.clamp", "high", high, low)
  return apply("qm.clamp", C.QM_CLAMP, false, x, low, high)
end

---x to the power of a number.
---@param x qm.Tensor       float [...]
---@param exponent number
---@return qm.Tensor        x's type and shape
function M.pow(x, exponent)
  check.desc("qm.pow", "x", x)
  check.number("qm.pow", "exponent", exponent)
  return apply("qm.pow", C.QM_POW, false, x, exponent)
end

for name, operation in pairs(M) do Tensor[name] = operation end
Tensor.__unm, Tensor.__pow = M.neg, M.pow

return M
