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

---An operation of one operand: a new tensor, recorded; its gradient is one kernel call too.
---@param flat boolean|nil  true: the gradient is zero everywhere, and nothing is recorded
function M.apply(name, op, flat, x, p0, p1)
  local desc = check.desc(name, "x", x)
  local out = x:empty_like()
  p0, p1 = p0 or 0, p1 or 0
  binding.check(lib.qm_unary(op, desc, out.desc, p0, p1), name, out)
  if flat then return out end
  return record(name, { x }, { out }, {}, function(dout)
    local dx = x:empty_like()
    binding.check(lib.qm_unary_backward(op, dout.desc, x.desc, dx.desc, p0, p1), name)
    return dx
  end)
end

---`factor * x + offset` with numbers, in one pass.
function M.affine(name, x, factor, offset)
  if factor ~= 1 then return M.apply(name, C.QM_AFFINE, false, x, factor, offset) end
  local out = M.apply(name, C.QM_AFFINE, true, x, factor, offset)
  return record(name, { x }, { out }, {}, function(dout) return dout:share() end)
end

return M
