---The feed-forward layer with GELU as one operation, so that its products take GELU and its gradient along.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local cast = require("quartermoon.cast")
local check = require("quartermoon.check")
local autograd = require("quartermoon.autograd")
local product = require("quartermoon.product")
local scopes = require("quartermoon.scope")
local tensors = require("quartermoon.tensor")
local lib, C = binding.lib, ffi.C
local record, needs_grad = autograd.record, autograd.needs_grad

local M = {}

local OPTIONS = { recompute = false }

local function check_matrix(name, argument, x, form, rows)
  check.desc(name, argument, x)
  if #x.shape ~= 2 or (rows and x.shape[1] ~= rows) then check.fail(name, argument, form, x) end
end

---gelu(aux) into out.
local function gelu_into(name, aux, out)
  binding.check(lib.qm_unary(C.QM_GELU, aux.desc, out.desc, 1, 0), name)
end

---Two linear layers with GELU's tanh form between them: `gelu(x w1 + b1) w2 + b2`. Weights may be f32 where
---activations are 16-bit, as in qm.linear. The same as qm.linear, qm.gelu(_, "tanh") and qm.linear one after
---the other; where a GPU's products do GELU on the way, it is taken before its argument is rounded to 16 bits.
---
---Source: arXiv 1606.08415; the layer of GPT-2.
---
---@param x qm.Tensor       float [R, K]
---@param w1 qm.Tensor      float [K, H]
---@param b1 qm.Tensor|nil  float [H]
---@param w2 qm.Tensor      float [H, N]
---@param b2 qm.Tensor|nil  float [N]
---@param options table|nil  { recompute = false (true: of the two [R, H] tensors that backward needs, GELU's argument
---   and its result, the result is not kept but made again) }
---@return qm.Tensor        x's type, [R, N]
---@raise when shapes or devices do not fit
function M.gelu_mlp(x, w1, b1, w2, b2, options)
  local name = "qm.gelu_mlp"
  check_matrix(name, "x", x, "float [R, K]")
  check_matrix(name, "w1", w1, ("float [K=%d, H]"):format(x.shape[2]), x.shape[2])
  local rows, width = x.shape[1], w1.shape[2]
  check_matrix(name, "w2", w2, ("float [H=%d, N]"):format(width), width)
  product.check_bias(name, b1, width, "b1")
  product.check_bias(name, b2, w2.shape[2], "b2")
  options = check.options(name, options, OPTIONS)
  local recompute = check.type(name, "recompute", options.recompute, "boolean")
  local like = { dtype = x.dtype, device = x.device }
  local out, aux, inner = scopes.guard(function()
    local argument, activation = tensors.empty({ rows, width }, like), tensors.empty({ rows, width }, like)
    local y = tensors.empty({ rows, w2.shape[2] }, like)
    cast.with(w1, x.dtype, function(w) product.linear(name, x, w, b1, activation, false, "gelu", argument) end)
    cast.with(w2, x.dtype, function(w) product.linear(name, activation, w, b2, y) end)
    return y, argument, activation
  end)
  if recompute then inner:free() end
  local saved = recompute and { aux } or { aux, inner }
  return record("gelu_mlp", { x, w1, b1 or false, w2, b2 or false }, { out }, saved, function(dout)
    if recompute then
      inner = aux:empty_like()
      if needs_grad(w2) then gelu_into(name, aux, inner) end
    end
    local dw2, db2 = product.gradient(name, w2, inner, dout, true, false), product.bias_gradient(name, b2, dout)
    local dx, dw1, db1
    if needs_grad(x) or needs_grad(w1) or needs_grad(b1) then
      local daux = inner -- nobody reads that any more
      cast.with(w2, x.dtype, function(w) product.linear(name, dout, w, nil, daux, true, "gelu_grad", aux) end)
      dw1, db1 = product.gradient(name, w1, x, daux, true, false), product.bias_gradient(name, b1, daux)
      dx = needs_grad(x) and cast.with(w1, x.dtype, function(w)
        return product.gradient(name, x, daux, w, false, true)
      end) or nil
    end
    inner:free()
    return dx, dw1, db1, dw2, db2
  end)
end

return M
