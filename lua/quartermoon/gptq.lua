---Rounding a trained weight to few bits so that its layer's output changes least: each row is rounded in
---turn, and the rows that follow make up for its error, as far as the layer's inputs let them.
---
---    local hessian = qm.gptq.hessian(w.shape[1])
---    for x in inputs do hessian:add(x) end                 -- what the layer sees
---    local q, report = qm.gptq.quantize(w, hessian, { w_bit = 4, group_size = 128, act_order = true })
---
---Source: GPTQ, arXiv 2210.17323, whose W is ours transposed. Where its published program fits a group's
---grid to weights that the same block of 128 has not finished changing, ours are always up to date.

local bit = require("bit")
local autograd = require("quartermoon.autograd")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local mixed = require("quartermoon.qparam_sections")
local module = require("quartermoon.nn.module")
local qm = require("quartermoon")
local lib = binding.lib

local M = {}

---------------------------------------------------------------------------------------------------

---What a layer's inputs say about it: the sum of x^T x, and how many rows it is of.
---@class qm.Hessian
---@field matrix qm.Tensor  f32 [K, K]
---@field rows integer
local Hessian = {}
Hessian.__index = Hessian

---@param inputs integer  K
---@param options table|nil  { device = default }
---@return qm.Hessian
function M.hessian(inputs, options)
  check.integer("qm.gptq.hessian", "inputs", inputs, 1)
  options = check.options("qm.gptq.hessian", options, { device = check.optional })
  return setmetatable({ rows = 0, matrix = qm.zeros({ inputs, inputs }, options):keep() }, Hessian)
end

---Add a layer's inputs.
---@param x qm.Tensor  float [R, K]
function Hessian:add(x)
  local desc = check.desc("hessian:add", "x", x)
  binding.check(lib.qm_gemm(desc, desc, self.matrix.desc, 1, 0, 1, 1), "hessian:add")
  self.rows = self.rows + x.shape[1]
end

function Hessian:free() self.matrix:free() end

check.methods("qm.Hessian", Hessian)

---The diagonal, on the host.
local function diagonal(matrix)
  local k, places = matrix.shape[1], {}
  for i = 1, k do places[i] = (i - 1) * (k + 1) end
  local index = qm.tensor(places, { dtype = "i32", device = matrix.device })
  return qm.gather(matrix:view_as("gptq", { k * k }), index):totable()
end

---Features with the largest entries of the diagonal first, from 0; of equals the earlier.
local function descending(values)
  local order = {}
  for i = 1, #values do order[i] = i - 1 end
  table.sort(order, function(a, b)
    if values[a + 1] ~= values[b + 1] then return values[a + 1] > values[b + 1] end
    return a < b
  end)
  return order
end

---------------------------------------------------------------------------------------------------

---Packed zero points that all lie in the middle of the codes, for one group.
local function middle_zeros(n, o, device)
  local words, field = {}, 2 ^ (o.w_bit - 1) - o.zero_offset
  for i = 1, n / 32 * o.w_bit do words[i] = 0 end
  for j = 0, n - 1 do
    local at = j * o.w_bit
    local word, shift = math.floor(at / 32) + 1, at % 32
    words[word] = bit.bor(words[word], bit.lshift(field, shift))
    if shift + o.w_bit > 32 then words[word + 1] = bit.rshift(field, 32 - shift) end
  end
  return qm.tensor({ words }, { dtype = "i32", device = device })
end

---The grid of one group of rows: scales and zeros as a QParam keeps them, and both as f32 [1, N] in units
---of the weight.
local function grid_of(rows, o)
  local n = rows.shape[2]
  if o.grid == "sym" then
    local scales = (rows:abs():max(1) * (2 / o.levels)):clamp(2 ^ -24, 65504):reshape(1, n):to(o.dtype)
    local wide = scales:to("f32")
    return { scales = scales, zeros = middle_zeros(n, o, rows.device), wide_scales = wide,
      wide_zeros = wide * 2 ^ (o.w_bit - 1) }
  end
  local q = qm.QParam.quantize(rows, { w_bit = o.w_bit, group_size = -1, asym = o.grid == "asym",
    zero_offset = o.zero_offset, dtype = o.dtype, method = o.fit })
  q.data:fill(0) -- of codes 0 the weights are minus the zeros, exactly
  local negative = q:dequantize("f32")
  local grid = { scales = q.scales:to(o.dtype), zeros = q.zeros:to(q.zeros.dtype), wide_scales = q.scales:to("f32"),
    wide_zeros = -negative:view_rows("gptq", 1, 1) }
  q:free()
  return grid
end

---The grids of w's groups as they lie.
local function grids_of(w, o)
  local grids = {}
  for first = 1, w.shape[1], o.group_size do
    local rows = math.min(o.group_size, w.shape[1] - first + 1)
    grids[#grids + 1] = qm.scope(grid_of, w:view_rows("gptq", first, rows), o)
  end
  return grids
end

local function joined(grids, field)
  local list = {}
  for i, grid in ipairs(grids) do list[i] = grid[field] end
  return #list == 1 and list[1] or qm.concat(list)
end

---The parameter of these grids whose codes are w's.
local function assemble(w, grids, g_idx, o)
  local k, n = w.shape[1], w.shape[2]
  local q = qm.QParam.new { data = qm.empty({ k / 32 * o.w_bit, n }, { dtype = "i32", device = w.device }),
    scales = joined(grids, "scales"):keep(), zeros = joined(grids, "zeros"):keep(), w_bit = o.w_bit,
    asym = o.grid ~= "float", zero_offset = o.grid ~= "float" and o.zero_offset or nil, group_size = o.group_size,
    g_idx = g_idx and qm.tensor(g_idx, { dtype = "i32", device = w.device }), name = o.name }
  return q:pack(w)
end

---------------------------------------------------------------------------------------------------

---The Hessian's factor; more damping where it is not positive definite without.
---@return qm.Tensor u, number damping
local function factor(matrix, damping)
  while true do
    local ok, u = pcall(qm.cholesky_inverse, matrix, damping)
    if ok then return u, damping end
    if not tostring(u):find("positive definite", 1, true) or damping >= 1 then error(u, 0) end
    damping = math.max(damping * 4, 1e-4)
  end
end

---Rows of w, u's order, one block after the other. Grids are fitted on the way where they are not there.
local function round_blocks(w, u, groups, grids, o)
  local k, n = w.shape[1], w.shape[2]
  local first = 1
  local function step()
    local count = math.min(o.block, k - first + 1)
    if not o.static_groups then
      count = math.min(count, o.group_size - (first - 1) % o.group_size)
      if (first - 1) % o.group_size == 0 then
        local rows = math.min(o.group_size, k - first + 1)
        grids[#grids + 1] = grid_of(w:view_rows("gptq", first, rows), o)
      end
    end
    -- In this block's columns of the factor: its own rows, and those that follow.
    local turned = u:view_rows("gptq", first, count):transpose()
    local own = turned:view_rows("gptq", first, count):transpose()
    local index, grid = {}, o.static_groups and grids or grids[#grids]
    for i = 1, count do index[i] = o.static_groups and groups[first + i - 1] or 0 end
    index = qm.tensor(index, { dtype = "i32", device = w.device })
    local errors = qm.empty({ count, n }, { device = w.device })
    binding.check(lib.qm_gptq_rows(w:view_rows("gptq", first, count).desc, own.desc, grid.wide_scales.desc,
      grid.wide_zeros.desc, index.desc, errors.desc, o.levels), "qm.gptq.quantize")
    local left = k - first + 1 - count
    if left > 0 then
      local rest = turned:view_rows("gptq", first + count, left)
      binding.check(lib.qm_gemm(rest.desc, errors.desc, w:view_rows("gptq", first + count, left).desc, 0, 0, -1, 1),
        "qm.gptq.quantize")
    end
    first = first + count
    return grids -- these live on
  end
  while first <= k do qm.scope(step) end
end

---w with every row on its grid, in w's order; grids; each row's group (nil: as it lies).
local function compensated(w, hessian, o)
  local order = o.act_order and descending(diagonal(hessian.matrix))
  local work, matrix, groups, grids = w:to("f32"), hessian.matrix, {}, {}
  if o.static_groups then
    grids = grids_of(work, o)
    grids.wide_scales, grids.wide_zeros = joined(grids, "wide_scales"), joined(grids, "wide_zeros")
  end
  local back, g_idx = {}, {}
  for i = 1, w.shape[1] do
    local feature = order and order[i] or i - 1
    back[feature + 1] = i - 1
    g_idx[feature + 1] = math.floor((i - 1) / o.group_size)
    groups[i] = math.floor(feature / o.group_size)
  end
  if order then
    local index = qm.tensor(order, { dtype = "i32", device = w.device })
    work = qm.gather(work, index)
    matrix = qm.gather(qm.gather(matrix, index):transpose(), index)
  end
  local u, damping = factor(matrix, o.damping)
  round_blocks(work, u, groups, grids, o)
  if order then work = qm.gather(work, qm.tensor(back, { dtype = "i32", device = w.device })) end
  return work, grids, order and not o.static_groups and g_idx or nil, damping
end

---------------------------------------------------------------------------------------------------

---How far q is from w: the squared error of the layer's output over that output's square, where its
---inputs are known, and the same of the weight itself.
---@param w qm.Tensor      float [K, N]
---@param q qm.QParam
---@param hessian qm.Hessian|nil
---@return { weight: number, output: number|nil }
function M.error_of(w, q, hessian)
  check.desc("qm.gptq.error_of", "w", w)
  if not module.is_quantized(q) then check.fail("qm.gptq.error_of", "q", "a QParam", q) end
  if hessian ~= nil then check.instance("qm.gptq.error_of", "hessian", hessian, Hessian, "qm.Hessian") end
  return autograd.no_grad(qm.scope, function()
    local dense = w:to("f32")
    local gap = q:dequantize("f32") - dense
    local function share(of)
      return of(gap) / math.max(of(dense), 1e-300)
    end
    local result = { weight = share(function(x) return qm.sum_squares(x):item() end) }
    if hessian then
      result.output = share(function(x) return (x * qm.matmul(hessian.matrix, x)):sum():item() end)
    end
    return result
  end)
end

local OPTIONS = { w_bit = 4, group_size = 128, grid = "asym", act_order = false, static_groups = false,
  damping = 0.01, block = 128, dtype = "f16", fit = "minmax", zero_offset = 1, name = check.optional }

local function check_quantize(name, w, hessian, options)
  check.desc(name, "w", w)
  local o = check.options(name, options, OPTIONS)
  check.one_of(name, "w_bit", o.w_bit, mixed.WIDTHS)
  check.one_of(name, "grid", o.grid, { "asym", "sym", "float" })
  check.one_of(name, "fit", o.fit, o.grid == "sym" and { "minmax" } or { "minmax", "mse" })
  check.one_of(name, "zero_offset", o.zero_offset, { 0, 1 })
  check.one_of(name, "dtype", o.dtype, { "f32", "f16", "bf16" })
  check.number(name, "damping", o.damping, 0, 1)
  check.integer(name, "block", o.block, 1)
  check.integer(name, "group_size", o.group_size, -1)
  if #w.shape ~= 2 or w.shape[1] % 32 ~= 0 or w.shape[1] == 0 then
    check.fail(name, "w", "a matrix [K, N], K a multiple of 32", w)
  end
  if o.grid ~= "float" and w.shape[2] % 32 ~= 0 then
    check.fail(name, "w", "N (columns) a multiple of 32, as packed zero points fill whole words", w)
  end
  if o.grid == "sym" and o.w_bit == 1 then check.fail(name, "w_bit", "at least 2 for a symmetric grid", 1) end
  o.group_size = (o.group_size == -1 or o.group_size > w.shape[1]) and w.shape[1] or o.group_size
  if o.group_size % 32 ~= 0 or o.group_size == 0 then
    check.fail(name, "group_size", "a multiple of 32, or -1", o.group_size)
  end
  if hessian ~= nil then
    check.instance(name, "hessian", hessian, Hessian, "qm.Hessian")
    if hessian.matrix.shape[1] ~= w.shape[1] then
      check.fail(name, "hessian", ("one of K=%d inputs"):format(w.shape[1]), hessian.matrix)
    end
    if hessian.rows == 0 then check.fail(name, "hessian", "inputs; add() some", hessian.rows) end
  end
  o.levels = 2 ^ o.w_bit - 1
  return o
end

---Quantize a weight. Without a Hessian every weight goes to its nearest code.
---
---@param w qm.Tensor             float [K, N]; K a multiple of 32, and N too unless grid is "float"
---@param hessian qm.Hessian|nil  of the layer's inputs
---@param options table|nil
---   w_bit = 4, group_size = 128 (-1: one group)
---   grid = "asym"          integer zero points; "sym": all in the middle (Q4_0, GPTQ's "sym");
---                          "float": float zeros (Q4_1)
---   act_order = false      the features with the largest inputs first; groups are then of features in
---                          that order, and q has a g_idx, unless
---   static_groups = false  grids are fitted beforehand, to groups as they lie
---   damping = 0.01         of the mean diagonal, added to the diagonal; grows where that is too little
---   block = 128            rows between updates of all the rest: speed only
---   fit = "minmax" or "mse", dtype = "f16" (of scales), zero_offset = 1, name
---@return qm.QParam q
---@return table report  { weight =, output = (see error_of), damping = }
---@raise when a shape or an option does not fit, or the inputs are not finite
function M.quantize(w, hessian, options)
  local o = check_quantize("qm.gptq.quantize", w, hessian, options)
  return autograd.no_grad(qm.scope, function()
    local q, report, damping
    if hessian then
      local rounded, grids, g_idx
      rounded, grids, g_idx, damping = compensated(w, hessian, o)
      q = assemble(rounded, grids, g_idx, o)
    else
      local dense = w:to("f32")
      q = assemble(dense, grids_of(dense, o), nil, o)
    end
    report = M.error_of(w, q, hessian)
    report.damping = damping
    return q, report
  end)
end

M.Hessian = Hessian

return M
