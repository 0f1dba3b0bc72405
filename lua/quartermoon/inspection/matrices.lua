---Which tensors together are one weight, in which format it is quantized, and what is wrong with it.

local report_of = require("quartermoon.inspection.report")
local values = require("quartermoon.inspection.values")
local extents = report_of.extents

local M = {}

---The last part of the names of a quantized weight's tensors.
local PARTS = {}
for part in ([[qweight qzeros scales zeros g_idx q_perm q_groups channel_scale qstatistic qscales qscales_zeros
  qscales_scales qzeros_zeros qzeros_scales wf q_weight q_scale q_scale_max q_invperm data residual]]):gmatch("%S+") do
  PARTS[part] = true
end
local FLOAT = { F32 = true, F16 = true, BF16 = true, F64 = true }

local function at(tensor, i) return tensor and tensor.shape[i] or 0 end

---------------------------------------------------------------------------------------------------
-- Formats: each says K, N, bits and groups from the tensors' shapes
---------------------------------------------------------------------------------------------------

local function read_gptq(w, p, bad)
  local n, words = at(p.qweight, 2), at(p.qweight, 1)
  w.n, w.groups = n, at(p.scales, 1)
  if at(p.scales, 2) ~= n then bad("scales are %s beside %d columns of qweight", extents(p.scales.shape), n) end
  w.bits = n > 0 and at(p.qzeros, 2) * 32 / n or 0
  if not (w.bits >= 1 and w.bits <= 8 and w.bits % 1 == 0) then
    return bad("qzeros %s do not go with qweight %s", extents(p.qzeros.shape), extents(p.qweight.shape))
  end
  w.k = words * 32 / w.bits
  if w.k % 1 ~= 0 then bad("qweight has %d rows of words: no whole number of %d-bit codes", words, w.bits) end
  if at(p.qzeros, 1) ~= w.groups then bad("qzeros have %d groups, scales %d", at(p.qzeros, 1), w.groups) end
end

local function read_awq(w, p, bad)
  w.n, w.k, w.groups = at(p.scales, 2), at(p.qweight, 1), at(p.scales, 1)
  w.bits = w.n > 0 and at(p.qweight, 2) * 32 / w.n or 0
  if at(p.qzeros, 2) ~= at(p.qweight, 2) or at(p.qzeros, 1) ~= w.groups then
    bad("qzeros %s do not go with scales %s", extents(p.qzeros.shape), extents(p.scales.shape))
  end
end

local WIDTHS = { [2] = true, [3] = true, [4] = true, [5] = true, [6] = true, [8] = true }

---Mixed widths: groups in order of descending width, each beginning where the one before ends.
local function check_groups(w, tensor, rows, k, bad)
  local groups = values.list(tensor, 2 ^ 20)
  if not groups then return bad("q_groups cannot be read") end
  if #groups % 2 ~= 0 or #groups == 0 then return bad("q_groups has %d numbers, not pairs", #groups) end
  w.groups, w.widths = #groups / 2, {}
  local before, total = 8, 0
  for i = 1, #groups, 2 do
    local bits, first, stop = groups[i], groups[i + 1], groups[i + 3] or rows
    if not WIDTHS[bits] then return bad("q_groups: group %d has %d bits", (i - 1) / 2, bits) end
    if bits > before then return bad("q_groups: group %d is wider than the one before it", (i - 1) / 2) end
    if first > stop or stop > rows or i == 1 and first ~= 0 then
      return bad("q_groups: group %d has the word rows %d to %d of %d", (i - 1) / 2, first, stop, rows)
    end
    total, before = total + (stop - first) * 32 / bits, bits
    w.widths[bits] = true
  end
  if k and total < k then bad("q_groups: the words hold %.0f rows, the weight has %d", total, k) end
end

local function check_permutation(name, tensor, k, bad)
  local list = values.list(tensor, 2 ^ 20)
  if not list then return bad("%s (%s %s) cannot be read", name, tensor.dtype, extents(tensor.shape)) end
  local seen, zeros = {}, 0
  for i, value in ipairs(list) do
    if value == 0 then zeros = zeros + 1 end
    if value < 0 or value >= k then return bad("%s: entry %d is %d, beyond the %d rows", name, i - 1, value, k) end
    seen[value] = true
  end
  if zeros == #list then return end -- means none
  for value = 0, #list - 1 do
    if not seen[value] then return bad("%s is no permutation: %d does not occur", name, value) end
  end
end

local function read_exl2(w, p, bad)
  w.k, w.n, w.groups = at(p.q_invperm, 1), at(p.q_scale, 2) * 8, at(p.q_scale, 1)
  local rows = at(p.q_weight, 1)
  if at(p.q_weight, 2) ~= w.n then bad("q_weight has %d columns, q_scale %d", at(p.q_weight, 2), w.n) end
  if not p.q_invperm then w.k = nil end
  w.bits = w.k and w.k > 0 and rows * 32 / w.k or nil
  local groups = w.groups
  if p.q_groups then check_groups(w, p.q_groups, rows, w.k, bad) else bad("q_groups are missing") end
  if w.groups ~= groups then bad("q_groups has %d groups, q_scale %d", w.groups, groups) end
  if at(p.q_scale_max, 1) ~= groups then bad("q_scale_max has %d groups, q_scale %d", at(p.q_scale_max, 1), groups) end
  if p.q_invperm then check_permutation("q_invperm", p.q_invperm, w.k, bad) end
end

---bitorch-engine's forms with zeros that are not integers: kind 2 (a permutation), kind 1 otherwise.
local function read_bie(w, p, bad)
  local rows, n = at(p.qweight or p.data, 1), at(p.qweight or p.data, 2)
  local order = p.q_perm or p.g_idx
  w.n, w.k, w.groups = n, order and at(order, 1) or w.k, at(p.scales, 1)
  if p.scales and at(p.scales, 2) ~= n then bad("scales are %s beside %d columns", extents(p.scales.shape), n) end
  if p.zeros and FLOAT[p.zeros.dtype] and extents(p.zeros.shape) ~= extents(p.scales and p.scales.shape or {}) and
      not p.qstatistic then
    bad("zeros are %s, scales %s", extents(p.zeros.shape), p.scales and extents(p.scales.shape) or "missing")
  end
  local codes = p.qstatistic or p.qscales
  if codes then
    w.groups = at(codes, 1)
    if codes.count ~= w.groups * n then bad("the codes of scales are %s beside %d columns", extents(codes.shape), n) end
  end
  if p.q_groups then check_groups(w, p.q_groups, rows, w.k, bad) end
  if w.k and w.k > 0 then w.bits = rows * 32 / w.k elseif w.bits then w.k = rows * 32 / w.bits end
  if not p.q_groups and w.bits and w.bits % 1 ~= 0 then bad("%d rows of words for %d rows of weights", rows, w.k) end
  if p.q_perm then check_permutation("q_perm", p.q_perm, w.k, bad) end
end

local function format_of(p)
  if p.q_weight then return "exl2", read_exl2 end
  if p.data then return "checkpoint", read_bie end
  if not p.qweight then return nil end
  if p.qzeros and p.scales and not FLOAT[p.qzeros.dtype] then
    local n = at(p.scales, 2)
    if at(p.qweight, 2) ~= n and n > 0 and at(p.qweight, 2) * 8 == n then return "awq", read_awq end
    return "gptq", read_gptq
  end
  if p.q_groups then return "mbwq mixed", read_bie end
  if p.q_perm or p.channel_scale then return "mbwq", read_bie end
  return (p.qstatistic or p.qscales) and "gba double" or "gba", read_bie
end

---------------------------------------------------------------------------------------------------
-- Values
---------------------------------------------------------------------------------------------------

local SCALES = { "scales", "zeros", "channel_scale", "q_scale_max", "qscales_scales", "qscales_zeros", "qzeros_scales",
  "qzeros_zeros" }

local function check_scales(p, bad)
  for _, part in ipairs(SCALES) do
    local found = p[part] and values.floats(p[part])
    if found and found.bad > 0 then bad("%s hold %d values that are NaN or infinite", part, found.bad) end
    if found and found.count > 0 and found.zero == found.count and not part:find("zeros") then
      bad("%s are all zero", part)
    end
  end
end

local function check_g_idx(w, tensor, bad)
  if w.k and at(tensor, 1) ~= w.k then bad("g_idx has %d entries for %d rows", at(tensor, 1), w.k) end
  local low, high = values.range(tensor)
  if low and (low < 0 or high >= w.groups) then
    bad("g_idx goes from %d to %d, but there are %d groups", low, high, w.groups)
  end
  local list = w.k and w.group_size and values.list(tensor, 2 ^ 20)
  for i, group in ipairs(list or {}) do
    if group ~= math.floor((i - 1) / w.group_size) and high > 0 then w.act_order = true end
  end
end

---A quantized weight from its parts.
local function read_quantized(report, path, parts, known)
  local format, read = format_of(parts)
  local file = (parts.qweight or parts.q_weight or parts.data).file
  local w = { name = path, format = format, parts = parts, size_bytes = 0, bits = known and known.bits }
  local function bad(words, ...) report:problem(file, "'%s' (%s): " .. words, path, format, ...) end
  for _, tensor in pairs(parts) do w.size_bytes = w.size_bytes + tensor.size_bytes end
  for part, tensor in pairs(parts) do
    if not tensor.element then
      bad("%s cannot be looked into", part)
      return w
    end
  end
  read(w, parts, bad)
  if w.k and w.groups and w.groups > 0 and not w.widths then
    w.group_size = known and known.group_size or math.ceil(w.k / w.groups)
    if w.group_size > 0 and math.ceil(w.k / w.group_size) ~= w.groups then
      bad("%d rows in groups of %d are not the %d groups that are there", w.k, w.group_size, w.groups)
    end
  end
  check_scales(parts, bad)
  if parts.g_idx then check_g_idx(w, parts.g_idx, bad) end
  if format == "gptq" then
    local low, high = values.range(parts.qzeros)
    w.zero_word = low == high and low or nil -- symmetric: one word everywhere
  end
  return w
end

---Find the weights among the report's tensors.
---@param report qm.InspectionReport
---@param known function  (path) -> { bits, group_size } | nil: what a description says of a weight
function M.find(report, known)
  local groups, order = {}, {}
  for _, tensor in ipairs(report.tensors) do
    local path, part = tensor.name:match("^(.*)%.([^.]+)$")
    if not path then path, part = "", tensor.name end
    if not groups[path] then
      groups[path], order[#order + 1] = {}, path
    end
    groups[path][part] = tensor
  end
  for _, path in ipairs(order) do
    local group, parts = groups[path], {}
    for part, tensor in pairs(group) do parts[part] = PARTS[part] and tensor or nil end
    local is_quantized = group.qweight or group.q_weight or group.data and group.scales
    if is_quantized then report.weights[#report.weights + 1] = read_quantized(report, path, parts, known(path)) end
    for part, tensor in pairs(group) do
      if not (is_quantized and PARTS[part]) then
        report.weights[#report.weights + 1] = { name = tensor.name, dense = tensor, size_bytes = tensor.size_bytes }
      end
    end
  end
  table.sort(report.weights, function(a, b) return a.name < b.name end)
end

return M
