---Reductions and softmax. All but softmax run along one dimension, which goes away, or over everything.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local autograd = require("quartermoon.autograd")
local broadcast = require("quartermoon.ops.broadcast")
local lib, C = binding.lib, ffi.C
local record = autograd.record
local Tensor = tensors.Tensor

local M = {}

---Reduce x along dim (from 1), or as one long row without it.
local function reduce(name, op, x, dim, dtype)
  check.desc(name, "x", x)
  local row, shape = x, {}
  if dim == nil then
    row, dim = x:view_as(name, { x:count() }), 1
  else
    check.integer(name, "dim", dim, 1, #x.shape)
    for i = 1, #x.shape do
      if i ~= dim then shape[#shape + 1] = x.shape[i] end
    end
  end
  local out = tensors.empty(shape, { dtype = dtype or x.dtype, device = x.device })
  binding.check(lib.qm_reduce(op, row.desc, out.desc, dim - 1), name, out, row ~= x and row)
  if row ~= x then row:free() end
  return out
end

---A view of a reduced tensor that has x's dimensions again, the reduced one of size 1.
local function unreduced(reduced, x, dim)
  local shape = {}
  for i = 1, dim and #x.shape or 0 do shape[i] = i == dim and 1 or x.shape[i] end
  return reduced:view_as("backward", shape)
end

---dout spread over x's shape, times factor.
local function spread(dout, x, dim, factor)
  local view = unreduced(dout, x, dim)
  local dx = broadcast.expand(view, x.shape, x.dtype, factor)
  view:free()
  return dx
end

---Sum along a dimension, or of everything.
---@param x qm.Tensor        float [...]
---@param dim integer|nil    from 1; nil: all elements, giving a tensor without dimensions
---@return qm.Tensor         x's type, x's shape without that dimension
---@raise when x has no such dimension
function M.sum(x, dim)
  local out = reduce("qm.sum", C.QM_SUM, x, dim)
  return record("sum", { x }, { out }, {}, function(dout) return spread(dout, x, dim, 1) end)
end

---Mean along a dimension, or of everything; see qm.sum.
function M.mean(x, dim)
  local out = reduce("qm.mean", C.QM_MEAN, x, dim)
  return record("mean", { x }, { out }, {}, function(dout)
    return spread(dout, x, dim, 1 / (dim and x.shape[dim] or x:count()))
  end)
end

---The gradient goes to the elements that equal the extreme, in equal shares.
local function extreme(name, op, x, dim)
  local out = reduce("qm." .. name, op, x, dim)
  return record(name, { x }, { out }, {}, function(dout)
    local winner = unreduced(out, x, dim)
    local mask = x:empty_like()
    binding.check(lib.qm_binary(C.QM_EQ, x.desc, winner.desc, mask.desc), "backward")
    winner:free()
    local shares = reduce("backward", C.QM_SUM, mask, dim, "f32")
    binding.check(lib.qm_binary(C.QM_DIV, dout.desc, shares.desc, shares.desc), "backward")
    local share = unreduced(shares, x, dim)
    binding.check(lib.qm_binary(C.QM_MUL, mask.desc, share.desc, mask.desc), "backward")
    share:free()
    shares:free()
    return mask
  end)
end

---The largest along a dimension, or of everything; NaN if one is. See qm.sum.
function M.max(x, dim) return extreme("max", C.QM_MAX, x, dim) end

---The smallest along a dimension, or of everything; NaN if one is. See qm.sum.
function M.min(x, dim) return extreme("min", C.QM_MIN, x, dim) end

---Where the largest is. Passes no gradient.
---@param x qm.Tensor      float [...]
---@param dim integer|nil  from 1; nil: of all elements in order
---@return qm.Tensor       i32, x's shape without that dimension; positions count from 0, as qm.gather
---   and targets do; the first of equals
function M.argmax(x, dim) return reduce("qm.argmax", C.QM_ARGMAX, x, dim, "i32") end

local function square_gradient(x, dout)
  local dx = x:empty_like()
  binding.check(lib.qm_binary(C.QM_MUL, x.desc, dout.desc, dx.desc), "backward")
  binding.check(lib.qm_unary(C.QM_AFFINE, dx.desc, dx.desc, 2, 0), "backward")
  return dx
end

---Sum of the squares of all elements, in f32 whatever x's type; not finite where x is not. Of many tensors
---in one pass over them.
---@param x qm.Tensor|qm.Tensor[]  float [...], one or several of any types, on one device
---@param total qm.Tensor|nil      f32 []; then the sum is added to it, not differentiable
---@return qm.Tensor               f32 []
---@raise when something is no float tensor, or there is none and no total
function M.sum_squares(x, total)
  local name = "qm.sum_squares"
  local several = type(x) == "table" and not getmetatable(x)
  local items, list = several and x or { x }, {}
  local count = #items
  if x == nil or (count == 0 and not total) then check.fail(name, "x", "a tensor or a list of them", x) end
  local descs = ffi.new("const qm_tensor *[?]", math.max(count, 1))
  for i = 1, count do
    local item = items[i]
    if not check.is_tensor(item) then check.desc(name, several and ("x[%d]"):format(i) or "x", item) end
    list[i], descs[i - 1] = item, item.desc
  end
  if total then
    binding.check(lib.qm_sum_squares(descs, count, check.desc(name, "total", total), 1), name)
    return total
  end
  local out = tensors.empty({}, { device = list[1].device })
  binding.check(lib.qm_sum_squares(descs, count, out.desc, 0), name, out)
  return record("sum_squares", list, { out }, {}, function(dout)
    local gradients = {}
    for i, item in ipairs(list) do gradients[i] = autograd.needs_grad(item) and square_gradient(item, dout) end
    return unpack(gradients)
  end)
end

---Softmax along the last dimension.
---@param x qm.Tensor  float [..., C]
---@return qm.Tensor   x's type and shape; every row sums to 1
---@raise when x has no dimension
function M.softmax(x)
  local desc = check.desc("qm.softmax", "x", x)
  local out = x:empty_like()
  binding.check(lib.qm_softmax(desc, out.desc), "qm.softmax", out)
  return record("softmax", { x }, { out }, {}, function(dout) -- out (dout - sum(out dout))
    local product, dim = out:empty_like("f32"), #x.shape
    binding.check(lib.qm_binary(C.QM_MUL, out.desc, dout.desc, product.desc), "backward")
    local sums = reduce("backward", C.QM_SUM, product, dim)
    local column = unreduced(sums, x, dim)
    binding.check(lib.qm_binary(C.QM_SUB, dout.desc, column.desc, product.desc), "backward")
    local dx = out:empty_like()
    binding.check(lib.qm_binary(C.QM_MUL, product.desc, out.desc, dx.desc), "backward")
    column:free()
    sums:free()
    product:free()
    return dx
  end)
end

for name, operation in pairs(M) do Tensor[name] = operation end

return M
