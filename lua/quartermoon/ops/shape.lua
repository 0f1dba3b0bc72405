---Shapes: views that the gradient flows through, permutations, concatenation.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local record = require("quartermoon.autograd").record
local lib = binding.lib
local Tensor = tensors.Tensor

local M = {}

---The numbers of f(x, 1, 2, 3) or f(x, { 1, 2, 3 }).
local function numbers(first, ...)
  if type(first) == "table" then return first end
  return { first, ... }
end

---The same elements in another shape, on the same memory.
---@param x qm.Tensor   any [...]
---@param ... integer   the shape, as numbers or one table; one of them may be -1: whatever is left
---@return qm.Tensor    a view
---@raise when the number of elements is another
function M.reshape(x, ...)
  local name = "qm.reshape"
  check.desc(name, "x", x)
  local shape, unknown, known = {}, nil, 1
  for i, extent in ipairs(numbers(...)) do
    check.integer(name, "shape", extent, -1)
    shape[i] = extent
    if extent == -1 and not unknown then unknown = i else known = known * extent end
  end
  if unknown then shape[unknown] = known > 0 and x:count() / known or 0 end
  if unknown and shape[unknown] % 1 ~= 0 then
    check.fail(name, "shape", ("extents that divide %d elements"):format(x:count()), known)
  end
  local out = x:view_as(name, shape)
  return record("reshape", { x }, { out }, {}, function(dout) return dout:view_as(name, x.shape) end)
end

---A run of rows (of the first dimension), on the same memory.
---@param x qm.Tensor       any [R, ...]
---@param first integer     from 1
---@param length integer
---@return qm.Tensor        a view [length, ...]
---@raise when x has no such rows
function M.narrow(x, first, length)
  check.desc("qm.narrow", "x", x)
  local out = x:view_rows("qm.narrow", first, length)
  return record("narrow", { x }, { out }, {}, function(dout)
    local dx = x:zeros_like()
    local rows = dx:view_rows("qm.narrow", first, length):copy(dout)
    rows:free()
    return dx
  end)
end

local function permuted(name, x, dims)
  local shape, from_zero = {}, ffi.new("int32_t[4]")
  for i = 1, #x.shape do
    from_zero[i - 1] = check.integer(name, "dims", dims[i], 1, #x.shape) - 1
    shape[i] = x.shape[dims[i]]
  end
  local out = tensors.empty(shape, { dtype = x.dtype, device = x.device })
  binding.check(lib.qm_permute(x.desc, out.desc, from_zero), name, out)
  return out
end

---Dimensions in another order, copied.
---@param x qm.Tensor   any [...]
---@param ... integer   for each dimension of the result, which of x's it is, from 1; or one table
---@return qm.Tensor    x's type
---@raise when each dimension is not named once
function M.permute(x, ...)
  local name = "qm.permute"
  check.desc(name, "x", x)
  local dims = numbers(...)
  if #dims ~= #x.shape then check.fail(name, "dims", #x.shape .. " dimensions", #dims) end
  local out = permuted(name, x, dims)
  return record("permute", { x }, { out }, {}, function(dout)
    local inverse = {}
    for i, dim in ipairs(dims) do inverse[dim] = i end
    return permuted(name, dout, inverse)
  end)
end

---Two dimensions exchanged, copied.
---@param x qm.Tensor         any, at least two dimensions
---@param first integer|nil   from 1; default the last but one
---@param second integer|nil  default the last
---@return qm.Tensor          x's type
function M.transpose(x, first, second)
  local name = "qm.transpose"
  check.desc(name, "x", x)
  local count = #x.shape
  if count < 2 then check.fail(name, "x", "at least two dimensions", x) end
  first = check.integer(name, "first", first or count - 1, 1, count)
  second = check.integer(name, "second", second or count, 1, count)
  local dims = {}
  for i = 1, count do dims[i] = i end
  dims[first], dims[second] = second, first
  local out = permuted(name, x, dims)
  return record("transpose", { x }, { out }, {}, function(dout) return permuted(name, dout, dims) end)
end

---Tensors one under the other.
---@param list qm.Tensor[]  at least one; any [R, ...], alike but for R
---@return qm.Tensor        [sum of R, ...]
---@raise when types, devices or the other dimensions differ
function M.concat(list)
  local name = "qm.concat"
  check.type(name, "list", list, "table")
  local first, rows = list[1], 0
  for i = 1, math.max(#list, 1) do
    check.desc(name, "list[" .. i .. "]", list[i])
    local fits = #list[i].shape == #first.shape and #first.shape > 0 and list[i].dtype == first.dtype
      and list[i].device == first.device
    for dim = 2, #first.shape do fits = fits and list[i].shape[dim] == first.shape[dim] end
    if not fits then
      local shape = #first.shape > 0 and { "R", unpack(first.shape, 2) } or { "R" }
      check.fail(name, "list[" .. i .. "]", ("%s [%s] on %s"):format(first.dtype, table.concat(shape, ", "),
        tostring(first.device)), list[i])
    end
    rows = rows + list[i].shape[1]
  end
  local inputs = { unpack(list) }
  local out = tensors.empty({ rows, unpack(first.shape, 2) }, { dtype = first.dtype, device = first.device })
  local at = 1
  for _, x in ipairs(inputs) do
    out:view_rows(name, at, x.shape[1]):copy(x):free()
    at = at + x.shape[1]
  end
  return record("concat", inputs, { out }, {}, function(dout)
    local grads, from = {}, 1
    for i, x in ipairs(inputs) do
      grads[i] = dout:view_rows(name, from, x.shape[1])
      from = from + x.shape[1]
    end
    return unpack(grads)
  end)
end

Tensor.reshape, Tensor.narrow, Tensor.permute, Tensor.transpose = M.reshape, M.narrow, M.permute, M.transpose

return M
