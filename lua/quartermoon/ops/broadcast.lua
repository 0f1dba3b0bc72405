---What broadcasting needs around the kernels: the result's shape, and gradients summed back.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local lib = binding.lib

local M = {}

---The shape that a and b broadcast to, by numpy's rule: aligned at the last dimension, 1 stretches.
function M.shape(name, a, b)
  local dims, shape = math.max(#a.shape, #b.shape), {}
  for i = 1, dims do
    local m, n = a.shape[#a.shape - dims + i] or 1, b.shape[#b.shape - dims + i] or 1
    if m ~= n and m ~= 1 and n ~= 1 then
      check.fail(name, "b", "what broadcasts with [" .. table.concat(a.shape, ", ") .. "]", b)
    end
    shape[i] = m == 1 and n or m
  end
  return shape
end

---Do two lists of extents agree?
function M.same_shape(a, b)
  if #a ~= #b then return false end
  for i = 1, #a do
    if a[i] ~= b[i] then return false end
  end
  return true
end

---A tensor without dimensions that holds `value`, for kernels that want a tensor.
function M.scalar(value, device) return tensors.full({}, value, { device = device }) end

---What to sum so that `from` becomes `shape`: runs of neighbouring stretched dimensions, each as
---{ elements before it, in it, behind it } when its turn comes.
local function stretched_runs(from, shape, count)
  local groups, runs = {}, {}
  for i = 1, #from do
    local stretched, last = (shape[#shape - #from + i] or 1) == 1, groups[#groups]
    if last and last.stretched == stretched then
      last.length = last.length * from[i]
    else
      groups[#groups + 1] = { stretched = stretched, length = from[i] }
    end
  end
  local before, behind = 1, count
  for _, group in ipairs(groups) do
    behind = behind / group.length
    if not group.stretched then
      before = before * group.length
    elseif group.length > 1 then
      runs[#runs + 1] = { before, group.length, behind }
    end
  end
  return runs
end

---Sum the gradient of a broadcast result back to an operand: a new tensor (or a share).
---@param grad qm.Tensor  stays the caller's
---@param like qm.Tensor  the operand: shape and type of the result
function M.sum_to(grad, like)
  if M.same_shape(grad.shape, like.shape) then
    if grad.dtype == like.dtype then return grad:share() end
    return grad:to(like.dtype)
  end
  if grad:count() == 0 then return like:zeros_like() end
  local sum = grad:share()
  local runs = stretched_runs(grad.shape, like.shape, grad:count())
  for i, run in ipairs(runs) do
    local x = sum:view_as("sum_to", run)
    local out = tensors.empty({ run[1], run[3] }, { device = grad.device, dtype = i == #runs and like.dtype or "f32" })
    binding.check(lib.qm_reduce(ffi.C.QM_SUM, x.desc, out.desc, 1), "sum_to")
    x:free()
    sum:free()
    sum = out
  end
  local result = sum:view_as("sum_to", like.shape)
  sum:free()
  if result.dtype == like.dtype then return result end
  local converted = result:to(like.dtype) -- only dimensions of size 1 were added
  result:free()
  return converted
end

---`factor * x` stretched to another shape: a new tensor of type dtype.
function M.expand(x, shape, dtype, factor)
  local one = M.scalar(factor or 1, x.device)
  local out = tensors.empty(shape, { dtype = dtype, device = x.device })
  binding.check(lib.qm_binary(ffi.C.QM_MUL, x.desc, one.desc, out.desc), "expand")
  one:free()
  return out
end

return M
