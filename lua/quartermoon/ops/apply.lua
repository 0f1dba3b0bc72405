---Kernel calls that make new tensors: what elementwise operations and their gradients are built from.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local record = require("quartermoon.autograd").record
local lib, C = binding.lib, ffi.C

local M = {}

---One kernel call for a gradient, into a tensor that is there.
function M.unary_into(op, x, out, p0, p1)
  binding.check(lib.qm_unary(op, x.desc, out.desc, p0 or 0, p1 or 0), "backward")
  return out
end

---The same with two operands.
function M.binary_into(op, a, b, out)
  binding.check(lib.qm_binary(op, a.desc, b.desc, out.desc), "backward")
  return out
end

---a * b, a new tensor of a's type and shape.
function M.times(a, b) return M.binary_into(C.QM_MUL, a, b, a:empty_like()) end

---dout times a temporary, which is released.
function M.times_temporary(dout, temporary)
  local dx = M.binary_into(C.QM_MUL, dout, temporary, dout:empty_like())
  temporary:free()
  return dx
end

---An operation of one operand: a new tensor, recorded.
---@param gradient function|nil  (dout, x, out) -> dx, a new tensor; nil: the gradient is zero everywhere
function M.apply(name, op, gradient, x, p0, p1)
  local desc = check.desc(name, "x", x)
  local out = x:empty_like()
  binding.check(lib.qm_unary(op, desc, out.desc, p0 or 0, p1 or 0), name, out)
  if not gradient then return out end
  return record(name, { x }, { out }, {}, function(dout) return gradient(dout, x, out) end)
end

---`factor * x + offset` with numbers, in one pass.
function M.affine(name, x, factor, offset)
  return M.apply(name, C.QM_AFFINE, function(dout)
    if factor == 1 then return dout:share() end
    return M.unary_into(C.QM_AFFINE, dout, dout:empty_like(), factor)
  end, x, factor, offset)
end

return M
