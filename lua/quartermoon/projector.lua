---Gradient projectors: optimizers keep their moments in the small space that a projector maps to.
---
---A projector is any object with `project(grad, step) -> low_rank` and `project_back(low_rank) -> full`;
---what stands here uses public tensor operations only. For checkpoints it may have `state()` and
---`load_state(state)`, and `free()`.

local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local qm = require("quartermoon")

local M = {}

---GaLore: the gradient in its leading singular subspace, found anew every so many steps.
---@class qm.projector.Galore
---@field left qm.Tensor|nil   [K, r], orthonormal columns
---@field right qm.Tensor|nil  [r, N], orthonormal rows
---@field refreshes integer    how often the matrices were computed
local Galore = {}
Galore.__index = Galore

local OPTIONS = { rank = check.required, proj_type = "std", update_proj_gap = 200, scale = 1, method = "randomized",
  power_iterations = 2, oversample = 8, seed = 0 }

---Source: Zhao et al., GaLore, arXiv 2403.03507; the five types are those of its galore_torch. A right
---matrix B [r, N] gives `grad B^T` and takes it back as `low_rank B`; a left one, A [K, r], gives
---`A^T grad` and `A low_rank`.
---
---    proj_type       K >= N   K < N
---    "std"           right    left     (the smaller low-rank gradient)
---    "reverse_std"   left     right
---    "right", "left", "full": one side, or both: A^T grad B^T
---
---galore_torch guesses the side from the low-rank gradient's shape on the way back, and so fails under
---"reverse_std" where that is square; we remember it.
---
---method "randomized" finds the subspace with a Gaussian sketch, power iterations and QR (Halko et al.,
---arXiv 0909.4061, algorithm 4.4), then orders it with the SVD of a small matrix: a few products with
---the gradient. "svd" decomposes the whole gradient.
---
---@param options table  { rank =, proj_type = "std", update_proj_gap = 200 steps, scale = 1 (of what
---   comes back), method = "randomized" | "svd", power_iterations = 2, oversample = 8 (more columns in
---   the sketch than rank), seed = 0 (of the sketch) }
---@return qm.projector.Galore
function M.galore(options)
  local name = "qm.projector.galore"
  options = check.options(name, options, OPTIONS)
  check.integer(name, "rank", options.rank, 1)
  check.one_of(name, "proj_type", options.proj_type, { "std", "reverse_std", "left", "right", "full" })
  check.integer(name, "update_proj_gap", options.update_proj_gap, 1)
  check.number(name, "scale", options.scale)
  check.one_of(name, "method", options.method, { "randomized", "svd" })
  check.integer(name, "power_iterations", options.power_iterations, 0)
  check.integer(name, "oversample", options.oversample, 0)
  check.integer(name, "seed", options.seed, 0, 2 ^ 32 - 1)
  return setmetatable({ options = options, refreshes = 0, overdue = false, pinned = false }, Galore)
end

---Run `body` without recording and release the tensors it makes, but for what it returns.
local function apart(body) return qm.no_grad(qm.scope, body) end

---Which matrices a gradient of this shape is projected with: left, right.
local function sides(proj_type, rows, columns)
  local right = proj_type == "right" or proj_type == "full"
  if proj_type == "std" then right = rows >= columns end
  if proj_type == "reverse_std" then right = rows < columns end
  return proj_type == "full" or not right, right
end

---The leading singular vectors by a randomized range finder, in descending order of singular value.
---@param generator qm.Generator
---@return qm.Tensor left_t  [sketch, K], orthonormal rows
---@return qm.Tensor right   [sketch, N], orthonormal rows
local function randomized_svd(grad, sketch, power_iterations, generator)
  local omega = generator:randn({ grad.shape[1], sketch }, { device = grad.device })
  local basis = qm.qr(qm.matmul(grad, omega, { trans_a = true }))
  for _ = 1, power_iterations do
    local other = qm.qr(qm.matmul(grad, basis))
    basis = qm.qr(qm.matmul(grad, other, { trans_a = true }))
  end
  -- grad basis = q r, and the SVD of the small r turns both bases to the singular directions.
  local image = qm.matmul(grad, basis)
  local q = qm.qr(image)
  local u, _, vt = qm.svd(qm.matmul(q, image, { trans_a = true }))
  return qm.matmul(u, q, { trans_a = true, trans_b = true }), qm.matmul(vt, basis, { trans_b = true })
end

local function is_finite(grad)
  local sum = qm.sum_squares(grad):item()
  return sum == sum and sum < math.huge
end

---@return qm.Tensor left_t  [at least rank, K]
---@return qm.Tensor right   [at least rank, N]
local function leading_vectors(self, grad, rank)
  local options, wide = self.options, grad.dtype == "f32" and grad or grad:to("f32")
  if options.method == "svd" then
    local u, _, vt = qm.svd(wide)
    return u:transpose(), vt
  end
  local sketch = math.min(rank + options.oversample, grad.shape[1], grad.shape[2])
  -- One draw per refresh, so that a resumed run draws what an uninterrupted one would.
  local generator = qm.generator(options.seed, self.refreshes)
  return randomized_svd(wide, sketch, options.power_iterations, generator)
end

local function replace(self, key, tensor)
  if self[key] then self[key]:free() end
  self[key] = tensor and tensor:keep()
end

---Find the subspace of this gradient. Matrices are in the gradient's type.
local function refresh(self, grad)
  local rank = math.min(self.options.rank, grad.shape[1], grad.shape[2])
  local need_left, need_right = sides(self.options.proj_type, grad.shape[1], grad.shape[2])
  local left, right = apart(function()
    local left_t, right = leading_vectors(self, grad, rank)
    return need_left and left_t:narrow(1, rank):transpose():to(grad.dtype),
      need_right and right:narrow(1, rank):to(grad.dtype)
  end)
  replace(self, "left", left or nil)
  replace(self, "right", right or nil)
  self.refreshes, self.overdue = self.refreshes + 1, false
end

---The low-rank gradient. Every `update_proj_gap` steps the subspace is found anew from this gradient;
---one with NaN or infinity is projected with the old matrices, and the next finite one refreshes.
---
---@param grad qm.Tensor  float [K, N]
---@param step integer    from 0: the steps taken before this one
---@return qm.Tensor      grad's type, [K, r], [r, N] or [r, r]
---@raise when the shape is another than before, or the very first gradient is not finite
function Galore:project(grad, step)
  local name = "projector:project"
  check.desc(name, "grad", grad)
  check.integer(name, "step", step, 0)
  if #grad.shape ~= 2 then check.fail(name, "grad", "float [K, N]", grad) end
  local exists = self.left or self.right
  if not self.pinned and (not exists or self.overdue or step % self.options.update_proj_gap == 0) then
    local finite = apart(function() return is_finite(grad) end)
    if finite then
      refresh(self, grad)
    elseif exists then
      self.overdue = true
    else
      binding.raise(name .. ": argument 'grad': expected finite values in the first gradient")
    end
  end
  return apart(function()
    local low = grad
    if self.left then low = qm.matmul(self.left, low, { trans_a = true }) end
    if self.right then low = qm.matmul(low, self.right, { trans_b = true }) end
    return low
  end)
end

---Back to the full shape, times `scale`.
---@param low_rank qm.Tensor  float, of the shape that project() gave
---@return qm.Tensor          low_rank's type, [K, N]
---@raise before the first project(), or when the shape does not fit
function Galore:project_back(low_rank)
  local name = "projector:project_back"
  check.desc(name, "low_rank", low_rank)
  if not (self.left or self.right) then binding.raise(name .. ": there is no projection yet: project() first") end
  local function fitting(matrix) return matrix.dtype == low_rank.dtype and matrix or matrix:to(low_rank.dtype) end
  local scale = self.options.scale
  local mantissa = math.frexp(scale)
  -- A power of two changes no digit, so that the small matrix can carry it: one pass over the large
  -- one less. (Not in f16, whose small numbers would lose digits.)
  local scale_first = scale ~= 1 and math.abs(mantissa) == 0.5 and low_rank.dtype ~= "f16"
  return apart(function()
    local full = scale_first and low_rank * scale or low_rank
    if self.left then full = qm.matmul(fitting(self.left), full) end
    if self.right then full = qm.matmul(full, fitting(self.right)) end
    return (scale_first or scale == 1) and full or full:mul_(scale)
  end)
end

---Use these matrices from now on (copies of them) and refresh no more: for tests and replays.
---@param matrices table  { left = float [K, r], right = float [r, N] }, one of them or, under "full", both
function Galore:inject(matrices)
  local name = "projector:inject"
  matrices = check.options(name, matrices, { left = check.optional, right = check.optional })
  for key, matrix in pairs(matrices) do check.desc(name, key, matrix) end
  local both, full = matrices.left and matrices.right, self.options.proj_type == "full"
  if not (full and both or not full and not both and (matrices.left or matrices.right)) then
    binding.raise(name .. ": expected " .. (full and "a left and a right matrix" or "a left or a right matrix"))
  end
  replace(self, "left", matrices.left and matrices.left:clone())
  replace(self, "right", matrices.right and matrices.right:clone())
  self.pinned = true
end

---What a checkpoint must hold.
---@return table  { tensors = { left =, right = }, the projector's own,
---   numbers = { refreshes =, overdue =, pinned = } }
function Galore:state()
  return { tensors = { left = self.left, right = self.right },
    numbers = { refreshes = self.refreshes, overdue = self.overdue and 1 or 0, pinned = self.pinned and 1 or 0 } }
end

---Would load_state take this state? Changes nothing.
---@param state table
---@return table numbers, table matrices
function Galore.check_state(_, state)
  local name = "projector:load_state"
  check.type(name, "state", state, "table")
  local numbers = check.type(name, "state.numbers", state.numbers, "table")
  local matrices = check.options(name, state.tensors, { left = check.optional, right = check.optional })
  for key, matrix in pairs(matrices) do check.desc(name, key, matrix) end
  check.integer(name, "refreshes", numbers.refreshes, 0, 2 ^ 32 - 1)
  check.integer(name, "overdue", numbers.overdue, 0, 1)
  check.integer(name, "pinned", numbers.pinned, 0, 1)
  return numbers, matrices
end

---Continue from what `state` gave.
---@param state table  its tensors are copied
function Galore:load_state(state)
  local numbers, matrices = self:check_state(state)
  self.refreshes, self.overdue, self.pinned = numbers.refreshes, numbers.overdue == 1, numbers.pinned == 1
  replace(self, "left", matrices.left and matrices.left:clone())
  replace(self, "right", matrices.right and matrices.right:clone())
end

---Release the matrices.
function Galore:free()
  replace(self, "left", nil)
  replace(self, "right", nil)
end

function Galore.describe(projector) return tostring(projector) end
function Galore:__tostring()
  local parts = { "qm.projector.Galore " .. self.options.proj_type .. ", rank " .. self.options.rank }
  for _, key in ipairs({ "left", "right" }) do
    if self[key] then parts[#parts + 1] = ("%s [%d, %d]"):format(key, self[key].shape[1], self[key].shape[2]) end
  end
  return table.concat(parts, ", ")
end

M.Galore = Galore

check.methods("qm.projector.Galore", Galore)

return M
