---Losses. Cross-entropy comes in two forms: on logits, and fused with the output layer, which never
---holds more than a chunk of the logits. Neither reads a value back, so neither waits for the device.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local cast = require("quartermoon.cast")
local check = require("quartermoon.check")
local autograd = require("quartermoon.autograd")
local broadcast = require("quartermoon.ops.broadcast")
local kernels = require("quartermoon.ops.apply")
local product = require("quartermoon.product")
local scopes = require("quartermoon.scope")
local tensors = require("quartermoon.tensor")
local lib, C = binding.lib, ffi.C
local binary_into, unary_into = kernels.binary_into, kernels.unary_into
local record, needs_grad = autograd.record, autograd.needs_grad

local M = {}

---1 / (how many targets count, at least 1), f32 {}. The comparison is made in f32, where classes below
---2^24 are exact.
local function share_of_each(name, targets, ignore_index)
  local share = tensors.empty({}, { device = targets.device })
  local ignored, which = targets:to("f32"), broadcast.scalar(ignore_index, targets.device)
  binary_into(C.QM_EQ, ignored, which, ignored)
  binding.check(lib.qm_reduce(C.QM_SUM, ignored.desc, share.desc, 0), name)
  ignored:free() which:free()
  unary_into(C.QM_AFFINE, share, share, -1, targets.shape[1])
  unary_into(C.QM_CLAMP, share, share, 1, math.huge)
  return unary_into(C.QM_RECIPROCAL, share, share)
end

---The sum of the rows' losses times each one's share, f32 {}.
local function mean_loss(name, losses, share)
  local mean = tensors.empty({}, { device = losses.device })
  binding.check(lib.qm_reduce(C.QM_SUM, losses.desc, mean.desc, 0), name)
  return binary_into(C.QM_MUL, mean, share, mean)
end

---The checks that C cannot make, and the options.
local function begin(name, tensor_name, x, targets, options, defaults)
  check.desc(name, tensor_name, x)
  check.desc(name, "targets", targets)
  options = check.options(name, options, defaults)
  check.integer(name, "ignore_index", options.ignore_index, -2 ^ 31, 2 ^ 31 - 1)
  -- Counted before the kernel sees them.
  if targets.dtype ~= "i32" or #targets.shape ~= 1 or targets.shape[1] ~= x.shape[1] then
    check.fail(name, "targets", ("i32 [R=%s]"):format(x.shape[1]), targets)
  end
  return options
end

---Mean cross-entropy of the targets that count: `-log softmax(logits[r])[targets[r]]`. With none of
---those it is 0, and so is the gradient.
---
---@param logits qm.Tensor   float [R, V]
---@param targets qm.Tensor  i32 [R], classes from 0 to V - 1, or ignore_index
---@param options table|nil  { ignore_index = -100 }
---@return qm.Tensor         f32 {}
---@raise when shapes do not fit or a target is no class
function M.cross_entropy(logits, targets, options)
  local name = "qm.cross_entropy"
  options = begin(name, "logits", logits, targets, options, { ignore_index = -100 })
  local losses, share
  local function run(dlogits, factor)
    binding.check(lib.qm_cross_entropy(logits.desc, targets.desc, factor and factor.desc, losses.desc,
      dlogits and dlogits.desc, 1, options.ignore_index, logits.shape[2] or 0), name)
  end
  local mean = scopes.guard(function()
    losses = tensors.empty(targets.shape, { device = logits.device })
    run()
    share = share_of_each(name, targets, options.ignore_index)
    return mean_loss(name, losses, share)
  end)
  return record("cross_entropy", { logits }, { mean }, { losses, share }, function(dout)
    local dlogits = logits:empty_like()
    run(dlogits, binary_into(C.QM_MUL, share, dout, share))
    return dlogits
  end)
end

-- Logits in memory at once: 16 Mi elements, but no fewer rows than a matrix product needs to be fast.
-- Measured at [4096, 256] x [256, 32000] in bf16 on two cores with AMX: 512 rows 230 ms, 128 rows 302,
-- 2048 rows 282. A GPU (no host threads) gets 512 Mi: each chunk reads and writes the weight's gradient
-- once, which takes as long as the products of some 230 rows.
local CHUNK_ELEMENTS, CHUNK_ELEMENTS_GPU, CHUNK_ROWS_MIN, CHUNK_ROWS_STEP = 2 ^ 24, 2 ^ 29, 256, 64

---So many rows, in chunks that are nearly equal.
local function default_chunk_rows(device, rows, classes)
  local elements = device:info().threads > 0 and CHUNK_ELEMENTS or CHUNK_ELEMENTS_GPU
  local most = math.max(CHUNK_ROWS_MIN, math.floor(elements / math.max(classes, 1)))
  local chunks = math.max(1, math.ceil(rows / most))
  return math.max(CHUNK_ROWS_STEP, math.ceil(rows / chunks / CHUNK_ROWS_STEP) * CHUNK_ROWS_STEP)
end

---One pass over the rows, a chunk at a time: losses, and the gradients that are asked for.
---@param job table  { x, weight, targets, losses, dx or nil, dweight or nil, share, transposed, chunk_rows,
---   ignore_index, classes, bias or nil }; weight in x's type, dweight f32
local function run_chunks(name, job)
  local function gemm(a, b, out, trans_a, trans_b, beta)
    binding.check(lib.qm_gemm(a.desc, b.desc, out.desc, trans_a and 1 or 0, trans_b and 1 or 0, 1, beta), name)
  end
  local x, weight, transposed, rows = job.x, job.weight, job.transposed, job.x.shape[1]
  local columns = weight.shape[transposed and 1 or 2]
  local buffer = tensors.empty({ math.min(rows, job.chunk_rows), columns }, { dtype = x.dtype, device = x.device })
  for first = 1, rows, job.chunk_rows do
    local length = math.min(job.chunk_rows, rows - first + 1)
    local function part(tensor) return tensor:view_rows(name, first, length) end
    local logits, x_part = buffer:view_rows(name, 1, length), part(x)
    local targets, losses = part(job.targets), part(job.losses)
    product.linear(name, x_part, weight, job.bias, logits, transposed)
    local gradient = (job.dx or job.dweight) and logits.desc or nil
    binding.check(lib.qm_cross_entropy(logits.desc, targets.desc, job.share.desc, losses.desc, gradient, 1,
      job.ignore_index, job.classes), name)
    if job.dx then
      local dx_part = part(job.dx)
      gemm(logits, weight, dx_part, false, not transposed, 0)
      dx_part:free()
    end
    if job.dweight then
      local beta = first == 1 and 0 or 1
      if transposed then
        gemm(logits, x_part, job.dweight, true, false, beta)
      else
        gemm(x_part, logits, job.dweight, true, false, beta)
      end
    end
    logits:free() x_part:free() targets:free() losses:free()
  end
  buffer:free()
end

-- Products with rows of logits of no multiple of 8 run at a seventh of the speed on a GPU (H200, bf16,
-- 768 channels: 50257 classes at 95 TFLOP/s, 50304 at 690).
local ALIGNED, PADDING, PADDED_FROM = 8, 64, 256

---How long rows of logits are: as many as the classes, or some more where those would be misaligned
---and the weight, by class, can simply have more rows.
local function columns_for(classes, transposed)
  if not transposed or classes % ALIGNED == 0 or classes < PADDED_FROM then return classes end
  return math.ceil(classes / PADDING) * PADDING
end

---Do `action` with so many rows of a tensor.
local function with_rows(name, tensor, first, length, action)
  local rows = tensor:view_rows(name, first, length)
  action(rows)
  rows:free()
end

---Run `body(weight, bias)` on the weight in x's type. Up to `columns`, zero rows follow those of the
---classes; a bias (or nil) of minus infinity takes them out of the softmax.
local function with_weight(name, x, weight, classes, columns, body)
  if columns == classes then return cast.with(weight, x.dtype, body) end
  local options = { dtype = x.dtype, device = weight.device }
  local wide, bias = tensors.empty({ columns, weight.shape[2] }, options), tensors.empty({ columns }, options)
  with_rows(name, wide, 1, classes, function(rows) rows:copy(weight) end)
  with_rows(name, wide, classes + 1, columns - classes, function(rows) rows:fill(0) end)
  with_rows(name, bias, 1, classes, function(rows) rows:fill(0) end)
  with_rows(name, bias, classes + 1, columns - classes, function(rows) rows:fill(-math.huge) end)
  body(wide, bias)
  wide:free() bias:free()
end

---Room for the weight's gradient, with rows for all columns.
local function room_for_gradient(weight, columns, transposed)
  local shape = transposed and { columns, weight.shape[2] } or weight.shape
  return tensors.empty(shape, { device = weight.device })
end

---The mean loss, and while gradients are recorded those of x and weight (else nil) for a dout of 1.
local function fused(name, x, weight, targets, job)
  local recording = autograd.enabled()
  job.x, job.targets, job.classes = x, targets, weight.shape[job.transposed and 1 or 2]
  local columns = columns_for(job.classes, job.transposed)
  job.share = share_of_each(name, targets, job.ignore_index)
  job.losses = tensors.empty(targets.shape, { device = x.device })
  job.dx = recording and needs_grad(x) and x:empty_like() or nil
  local dweight = recording and needs_grad(weight) and room_for_gradient(weight, columns, job.transposed) or nil
  if dweight and x.shape[1] == 0 then dweight:fill(0) end
  job.dweight = dweight
  with_weight(name, x, weight, job.classes, columns, function(w, bias)
    job.weight, job.bias = w, bias
    run_chunks(name, job)
  end)
  if dweight and columns ~= job.classes then
    dweight = job.dweight:view_rows(name, 1, job.classes)
    job.dweight:free()
  end
  local mean = mean_loss(name, job.losses, job.share)
  job.losses:free() job.share:free()
  return mean, job.dx, dweight
end

---The output layer and its cross-entropy in one: `qm.cross_entropy(qm.linear(x, weight), targets)`
---without ever holding all logits. Rows go through in chunks; while gradients are recorded, those of
---x and of the weight are computed on the way, and backward() only scales them.
---
---Source: the chunked form of Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2.
---
---@param x qm.Tensor        float [R, C]
---@param weight qm.Tensor   float [C, V], or [V, C] with transposed (an embedding shared with the output)
---@param targets qm.Tensor  i32 [R], classes from 0 to V - 1, or ignore_index
---@param options table|nil  { ignore_index = -100, transposed = false, chunk_rows = so many that a
---   chunk has at most 16 Mi logits (512 Mi on a GPU), or 256 rows }
---@return qm.Tensor         f32 {}: the mean over the targets that count, 0 when there is none
---@raise when shapes do not fit or a target is no class
function M.linear_cross_entropy(x, weight, targets, options)
  local name = "qm.linear_cross_entropy"
  check.desc(name, "weight", weight)
  options = begin(name, "x", x, targets, options,
    { ignore_index = -100, transposed = false, chunk_rows = check.optional })
  local transposed = check.type(name, "transposed", options.transposed, "boolean")
  if #x.shape ~= 2 then check.fail(name, "x", "float [R, C]", x) end
  if #weight.shape ~= 2 or weight.shape[transposed and 2 or 1] ~= x.shape[2] then
    check.fail(name, "weight", (transposed and "float [V, C=%d]" or "float [C=%d, V]"):format(x.shape[2]), weight)
  end
  local classes = weight.shape[transposed and 1 or 2]
  local chunk_rows = options.chunk_rows or default_chunk_rows(x.device, x.shape[1], classes)
  check.integer(name, "chunk_rows", chunk_rows, 1)
  local mean, dx, dweight = scopes.guard(fused, name, x, weight, targets, { transposed = transposed,
    chunk_rows = chunk_rows, ignore_index = options.ignore_index })
  local saved = {}
  if dx then saved[1] = dx end
  if dweight then saved[#saved + 1] = dweight end
  return record("linear_cross_entropy", { x, weight }, { mean }, saved, function(dout)
    -- Handed on, no longer the tape's to release.
    for i = #saved, 1, -1 do saved[i] = nil end
    if not autograd.is_one(dout) then
      if dx then binary_into(C.QM_MUL, dx, dout, dx) end
      if dweight then binary_into(C.QM_MUL, dweight, dout, dweight) end
    end
    if dweight and weight.node and weight.dtype ~= "f32" then
      local narrow = dweight:to(weight.dtype)
      dweight:free()
      return dx, narrow
    end
    return dx, dweight
  end)
end

return M
