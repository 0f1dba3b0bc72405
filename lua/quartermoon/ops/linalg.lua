---Matrix products and decompositions.

local binding = require("quartermoon.ffi")
local cast = require("quartermoon.cast")
local check = require("quartermoon.check")
local autograd = require("quartermoon.autograd")
local product = require("quartermoon.product")
local scopes = require("quartermoon.scope")
local tensors = require("quartermoon.tensor")
local lib = binding.lib
local record, needs_grad = autograd.record, autograd.needs_grad
local gemm, product_gradient = product.gemm, product.gradient

local M = {}

local MATMUL_OPTIONS = { trans_a = false, trans_b = false }

---Matrix product `op(a) op(b)`, where op transposes if its option says so. Sums run in f32.
---
---@param a qm.Tensor  float [M, K], or a batch of them [B, M, K]; [K, M] with trans_a
---@param b qm.Tensor  a's type, [K, N] or [B, K, N]; [N, K] with trans_b
---@param options table|nil  { trans_a = false, trans_b = false }
---@return qm.Tensor   a's type, [M, N] or [B, M, N]
---@raise when types, shapes or devices do not fit
function M.matmul(a, b, options)
  local name = "qm.matmul"
  check.desc(name, "a", a)
  check.desc(name, "b", b)
  options = check.options(name, options, MATMUL_OPTIONS)
  local trans_a = check.type(name, "trans_a", options.trans_a, "boolean")
  local trans_b = check.type(name, "trans_b", options.trans_b, "boolean")
  -- Wrong numbers of dimensions get a placeholder here and their sentence from the engine.
  local dims = #a.shape
  local rows = a.shape[trans_a and dims or dims - 1] or 0
  local columns = b.shape[trans_b and #b.shape - 1 or #b.shape] or 0
  local shape = dims == 3 and { a.shape[1], rows, columns } or { rows, columns }
  local out = scopes.guard(function()
    return gemm(name, a, b, tensors.empty(shape, { dtype = a.dtype, device = a.device }), trans_a, trans_b)
  end)
  return record("matmul", { a, b }, { out }, {}, function(dout)
    local da, db
    if trans_a then
      da = product_gradient(name, a, b, dout, trans_b, true)
    else
      da = product_gradient(name, a, dout, b, false, not trans_b)
    end
    if trans_b then
      db = product_gradient(name, b, dout, a, true, trans_a)
    else
      db = product_gradient(name, b, a, dout, not trans_a, false)
    end
    return da, db
  end)
end

---Linear layer: `x weight (+ bias)`. Weights may be f32 where activations are 16-bit: the product
---then runs on a copy in x's type, which stays with a parameter and is made anew when that changed, and
---the weight's gradient sums in f32.
---
---@param x qm.Tensor       float [R, K]
---@param weight qm.Tensor  float [K, N]
---@param bias qm.Tensor|nil  float [N]
---@return qm.Tensor        x's type, [R, N]
---@raise when shapes or devices do not fit
function M.linear(x, weight, bias)
  local name = "qm.linear"
  check.desc(name, "x", x)
  check.desc(name, "weight", weight)
  product.check_bias(name, bias, weight.shape[2])
  local out = scopes.guard(function()
    local y = tensors.empty({ x.shape[1] or 0, weight.shape[2] or 0 }, { dtype = x.dtype, device = x.device })
    return cast.with(weight, x.dtype, function(w) return product.linear(name, x, w, bias, y) end)
  end)
  return record("linear", { x, weight, bias or false }, { out }, {}, function(dout)
    local dx = needs_grad(x) and cast.with(weight, x.dtype, function(w)
      return product_gradient(name, x, dout, w, false, true)
    end) or nil
    return dx, product_gradient(name, weight, x, dout, true, false), product.bias_gradient(name, bias, dout)
  end)
end

---Thin singular value decomposition, `a = u diag(s) vt` with R = min(M, N). Not differentiable. The
---signs of the singular vectors are arbitrary.
---
---@param a qm.Tensor   f32 [M, N]
---@return qm.Tensor u  f32 [M, R], orthonormal columns
---@return qm.Tensor s  f32 [R], descending
---@return qm.Tensor vt f32 [R, N], orthonormal rows
---@raise when a holds NaN or infinity, or the iteration does not converge
function M.svd(a)
  local name = "qm.svd"
  local a_desc = check.desc(name, "a", a)
  local m, n = a.shape[1] or 0, a.shape[2] or 0
  local r = math.min(m, n)
  local options = { device = a.device }
  local u, s, vt = tensors.empty({ m, r }, options), tensors.empty({ r }, options), tensors.empty({ r, n }, options)
  binding.check(lib.qm_svd(a_desc, u.desc, s.desc, vt.desc), name, u, s, vt)
  return u, s, vt
end

---An orthonormal basis of a's columns: q of the thin QR decomposition. Not differentiable.
---
---@param a qm.Tensor   f32 [M, N], M >= N
---@return qm.Tensor q  f32 [M, N]
---@raise when a has more columns than rows, or holds NaN or infinity
function M.qr(a)
  local name = "qm.qr"
  local a_desc = check.desc(name, "a", a)
  local q = a:empty_like()
  binding.check(lib.qm_qr(a_desc, q.desc), name, q)
  return q
end

---The upper Cholesky factor of a symmetric matrix's inverse: `u^T u` is the inverse of a with `damping`
---times the mean of its diagonal added to the diagonal. Not differentiable.
---
---Source: what GPTQ (arXiv 2210.17323) works with. Computed in f64.
---@param a qm.Tensor   f32 [N, N], symmetric
---@param damping number|nil  default 0
---@return qm.Tensor u  f32 [N, N], zeros below the diagonal
---@raise when the damped a is not positive definite, or holds NaN or infinity
function M.cholesky_inverse(a, damping)
  local name = "qm.cholesky_inverse"
  local a_desc = check.desc(name, "a", a)
  damping = check.number(name, "damping", damping or 0, 0)
  local u = a:empty_like()
  binding.check(lib.qm_cholesky_inverse(a_desc, u.desc, damping), name, u)
  return u
end

return M
