---Elementwise operations on two tensors, broadcasting, each forward (one kernel call) next to its
---gradient; conversion; and changes in place. All are methods too, and + - * / are add, sub, mul, div.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local autograd = require("quartermoon.autograd")
local broadcast = require("quartermoon.ops.broadcast")
local kernels = require("quartermoon.ops.apply")
local lib, C = binding.lib, ffi.C
local record, needs_grad = autograd.record, autograd.needs_grad
local affine, unary_into, binary_into = kernels.affine, kernels.unary_into, kernels.binary_into
local Tensor = tensors.Tensor

local M = {}

---A gradient of the result's shape summed back to one operand; takes over `grad`.
local function summed(grad, like)
  local result = broadcast.sum_to(grad, like)
  grad:free()
  return result
end

---dout (op) other, summed back to `like`: f32 until the sum is made.
local function combined(op, dout, other, like)
  local same = broadcast.same_shape(dout.shape, like.shape)
  return summed(binary_into(op, dout, other, dout:empty_like(same and like.dtype or "f32")), like)
end

---Two tensors for the kernel; a number becomes a scalar tensor, listed in `made`.
local function operands(name, a, b, made)
  if type(a) == "number" and check.is_tensor(b) then
    made[1] = broadcast.scalar(a, b.device)
    return made[1], b, b.dtype
  elseif type(b) == "number" and check.is_tensor(a) then
    made[1] = broadcast.scalar(b, a.device)
    return a, made[1], a.dtype
  end
  check.desc(name, "a", a)
  check.desc(name, "b", b)
  return a, b, a.dtype == b.dtype and a.dtype or "f32"
end

---@param gradient function|nil  (dout, a, b, out) -> da, db, each only where it is needed
local function binary(name, op, gradient)
  name = "qm." .. name
  return function(a, b)
    local made = {}
    local dtype
    a, b, dtype = operands(name, a, b, made)
    local out = tensors.empty(broadcast.shape(name, a, b), { dtype = dtype, device = a.device })
    binding.check(lib.qm_binary(op, a.desc, b.desc, out.desc), name, out, made[1])
    return record(name, gradient and { a, b } or {}, { out }, made, function(dout) return gradient(dout, a, b, out) end)
  end
end

local add = binary("add", C.QM_ADD, function(dout, a, b)
  return needs_grad(a) and broadcast.sum_to(dout, a) or nil, needs_grad(b) and broadcast.sum_to(dout, b) or nil
end)

---a + b, broadcasting; either may be a number.
---@param a qm.Tensor|number  float [...]
---@param b qm.Tensor|number  float [...], a shape that broadcasts with a's
---@return qm.Tensor          their type, or f32 where the types differ
---@raise when the shapes do not broadcast
function M.add(a, b)
  if type(b) == "number" then return affine("qm.add", a, 1, b) end
  if type(a) == "number" then return affine("qm.add", b, 1, a) end
  return add(a, b)
end

local sub = binary("sub", C.QM_SUB, function(dout, a, b)
  local db
  if needs_grad(b) then db = summed(unary_into(C.QM_NEG, dout, dout:empty_like()), b) end
  return needs_grad(a) and broadcast.sum_to(dout, a) or nil, db
end)

---a - b; see qm.add.
function M.sub(a, b)
  if type(b) == "number" then return affine("qm.sub", a, 1, -b) end
  if type(a) == "number" then return affine("qm.sub", b, -1, a) end
  return sub(a, b)
end

local mul = binary("mul", C.QM_MUL, function(dout, a, b)
  return needs_grad(a) and combined(C.QM_MUL, dout, b, a) or nil,
    needs_grad(b) and combined(C.QM_MUL, dout, a, b) or nil
end)

---a * b; see qm.add.
function M.mul(a, b)
  if type(b) == "number" then return affine("qm.mul", a, b, 0) end
  if type(a) == "number" then return affine("qm.mul", b, a, 0) end
  return mul(a, b)
end

---a / b; see qm.add.
M.div = binary("div", C.QM_DIV, function(dout, a, b)
  local da, db
  if needs_grad(a) then da = combined(C.QM_DIV, dout, b, a) end
  if needs_grad(b) then -- -dout a / b^2
    local slope = binary_into(C.QM_DIV, a, b, dout:empty_like("f32"))
    binary_into(C.QM_DIV, slope, b, slope)
    unary_into(C.QM_NEG, slope, slope)
    binary_into(C.QM_MUL, slope, dout, slope)
    db = summed(slope, b)
  end
  return da, db
end)

---dout where `low (op) high` holds, summed back to the operand that won there.
local function picked(dout, low, high, op, like)
  local mask = binary_into(op, low, high, dout:empty_like())
  local grad = combined(C.QM_MUL, dout, mask, like)
  mask:free()
  return grad
end

---The larger of a and b; where they are equal the gradient is a's. See qm.add.
M.maximum = binary("maximum", C.QM_MAXIMUM, function(dout, a, b)
  return needs_grad(a) and picked(dout, b, a, C.QM_LE, a) or nil,
    needs_grad(b) and picked(dout, a, b, C.QM_LT, b) or nil
end)

---The smaller of a and b; where they are equal the gradient is a's. See qm.add.
M.minimum = binary("minimum", C.QM_MINIMUM, function(dout, a, b)
  return needs_grad(a) and picked(dout, a, b, C.QM_LE, a) or nil,
    needs_grad(b) and picked(dout, b, a, C.QM_LT, b) or nil
end)

---1 where a == b, else 0. Passes no gradient, as the next two. See qm.add.
M.eq = binary("eq", C.QM_EQ)
---1 where a < b, else 0.
M.lt = binary("lt", C.QM_LT)
---1 where a <= b, else 0.
M.le = binary("le", C.QM_LE)

---x converted to another element type; between float types the gradient passes, converted back.
---@param x qm.Tensor   any [...]
---@param dtype string  "f32", "f16", "bf16", "i8", "u8", "i16", "i32" or "i64"
---@return qm.Tensor    a new tensor, or x's memory shared where it has that type already
function M.cast(x, dtype)
  check.desc("qm.cast", "x", x)
  check.type("qm.cast", "dtype", dtype, "string")
  x:alive("qm.cast")
  local out = x.dtype == dtype and x:share()
  out = out or tensors.empty(x.shape, { dtype = dtype, device = x.device }):copy(x)
  local is_float = dtype == "f32" or dtype == "bf16" or dtype == "f16"
  return record("cast", { is_float and x }, { out }, {}, function(dout)
    if dout.dtype == x.dtype then return dout:share() end
    return dout:to(x.dtype)
  end)
end

for name, operation in pairs(M) do Tensor[name] = operation end
Tensor.__add, Tensor.__sub, Tensor.__mul, Tensor.__div = M.add, M.sub, M.mul, M.div

---------------------------------------------------------------------------------------------------
-- In place: not differentiable, so refused where the tape may still need the old value
---------------------------------------------------------------------------------------------------

---self += alpha y, in place.
---@param y qm.Tensor|number  float, a shape that broadcasts to this one's
---@param alpha number|nil    1
---@return qm.Tensor self
function Tensor:add_(y, alpha)
  check.desc("add_", "self", self)
  self:writable("add_")
  alpha = check.number("add_", "alpha", alpha or 1)
  if type(y) == "number" then
    binding.check(lib.qm_unary(C.QM_AFFINE, self.desc, self.desc, 1, alpha * y), "add_")
    return self
  end
  local desc = check.desc("add_", "y", y)
  if broadcast.same_shape(self.shape, y.shape) then
    binding.check(lib.qm_accumulate(desc, self.desc, alpha, 1), "add_")
  else
    local scaled = kernels.apply("add_", C.QM_AFFINE, true, y, alpha, 0)
    binding.check(lib.qm_binary(C.QM_ADD, self.desc, scaled.desc, self.desc), "add_", scaled)
    scaled:free()
  end
  return self
end

---self *= y, in place.
---@param y qm.Tensor|number  float, a shape that broadcasts to this one's
---@return qm.Tensor self
function Tensor:mul_(y)
  check.desc("mul_", "self", self)
  self:writable("mul_")
  if type(y) == "number" then
    binding.check(lib.qm_unary(C.QM_AFFINE, self.desc, self.desc, y, 0), "mul_")
  else
    binding.check(lib.qm_binary(C.QM_MUL, self.desc, check.desc("mul_", "y", y), self.desc), "mul_")
  end
  return self
end

return M
