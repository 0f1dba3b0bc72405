---Rows by their number.

local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local autograd = require("quartermoon.autograd")
local lib = binding.lib

local M = {}

---The gradient of `x`: every row of dout added to the row it came from. A leaf's goes straight into
---its own buffer, for a vocabulary's is large.
local function scattered(name, x, index, dout, padding)
  local sum
  if x.node then
    sum = x:zeros_like("f32")
  else
    local beta
    sum, beta = autograd.leaf_grad(x)
    if beta == 0 then sum:fill(0) end
  end
  local row = padding and sum:view_rows(name, padding + 1, 1)
  local kept = row and row:clone()
  binding.check(lib.qm_scatter_add(dout.desc, index.desc, sum.desc), name)
  if row then
    row:copy(kept)
    kept:free()
    row:free()
  end
  if not x.node then return nil end
  if x.dtype == "f32" then return sum end
  local dx = sum:to(x.dtype)
  sum:free()
  return dx
end

local function rows(name, argument, x, index, dtype, padding)
  local desc, index_desc = check.desc(name, argument, x), check.desc(name, "index", index)
  local shape = { index.shape[1] or 1, x.shape[2] }
  local out = tensors.empty(shape, { dtype = dtype or x.dtype, device = x.device })
  binding.check(lib.qm_gather(desc, index_desc, out.desc), name, out)
  return autograd.record(name, { x }, { out }, {}, function(dout)
    return scattered(name, x, index, dout, padding)
  end)
end

---The rows of x that index names: `out[i] = x[index[i]]`.
---@param x qm.Tensor      any [V, C] or [V]
---@param index qm.Tensor  i32 [R], each from 0 to V - 1; must stay unchanged until backward()
---@return qm.Tensor       x's type, [R, C] or [R]
---@raise when a number in index is outside
function M.gather(x, index) return rows("qm.gather", "x", x, index) end

local IS_FLOAT = { f32 = true, f16 = true, bf16 = true }
local EMBEDDING_OPTIONS = { dtype = check.optional, padding = check.optional }

---The rows of an embedding table, converted to the activations' type.
---@param weight qm.Tensor   float [V, C]
---@param index qm.Tensor    i32 [R], token numbers from 0 to V - 1; must stay unchanged until backward()
---@param options table|nil  { dtype = weight's type, padding = nil: the token whose row gets no gradient }
---@return qm.Tensor         dtype, [R, C]
---@raise when a token number is outside
function M.embedding(weight, index, options)
  local name = "qm.embedding"
  options = check.options(name, options, EMBEDDING_OPTIONS)
  check.desc(name, "weight", weight)
  if options.dtype then check.one_of(name, "dtype", options.dtype, { "f32", "f16", "bf16" }) end
  if #weight.shape ~= 2 or not IS_FLOAT[weight.dtype] then check.fail(name, "weight", "float [V, C]", weight) end
  if options.padding then check.integer(name, "padding", options.padding, 0, weight.shape[1] - 1) end
  return rows(name, "weight", weight, index, options.dtype, options.padding)
end

---Put rows into their places: `out[index[i]] = x[i]`; the other rows of out stay. Not differentiable.
---@param x qm.Tensor      any [R, C] or [R]
---@param index qm.Tensor  i32 [R], each from 0 to V - 1, all different (of equals any row may stay)
---@param out qm.Tensor    x's type, [V, C] or [V], overwritten where index points
---@return qm.Tensor out
---@raise when a number in index is outside, or when x or out is on the gradient tape
function M.scatter(x, index, out)
  local name = "qm.scatter"
  local desc, index_desc = check.desc(name, "x", x), check.desc(name, "index", index)
  check.desc(name, "out", out)
  if autograd.needs_grad(x) then check.fail(name, "x", "a tensor that needs no gradient (see qm.no_grad)", x) end
  binding.check(lib.qm_scatter(desc, index_desc, out:writable(name).desc), name)
  return out
end

tensors.Tensor.gather = M.gather

return M
