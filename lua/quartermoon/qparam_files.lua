---Quantized weights as files have them: the tensors of one weight, under their names without the
---layer's, become a parameter, and a parameter becomes such tensors again.
---
---    q, note = qm.QParam.import("gptq", { qweight =, qzeros =, scales =, g_idx = }, { bits = 4, sym = true })
---    fields = q:export("gptq")
---
---Formats, each an entry of M.formats: which tensors, and two functions.
---  gptq   AutoGPTQ, GPTQModel: 2, 3, 4, 8 bits; zero points stored minus one, or (gptq_v2) as they are
---  awq    AutoAWQ's "gemm" order, 4 bits
---  exl2   exllamav2: mixed widths, scales of 4 bits, no zeros
---  mbwq   bitorch-engine's layer kind 2: one width, or with q_groups mixed ones
---  mpq    bitorch-engine's layer kind 1: float zeros, doubly quantized perhaps

local raise = require("quartermoon.ffi").raise
local check = require("quartermoon.check")
local mixed = require("quartermoon.qparam_sections")
local words = require("quartermoon.qparam_words")
local QParam = require("quartermoon.qparam").QParam

local M = { formats = {} }

local FLOAT = { f32 = true, f16 = true, bf16 = true }

---The types of a weight's tensors, and how many dimensions; `optional` after them. parts: what QParam.new
---calls a tensor that the file calls otherwise.
local function format(name, fields, read, write)
  M.formats[name] = { fields = fields, read = read, write = write }
end

local function refuse(name, message, ...) raise((name .. ": " .. message):format(...)) end

---Rows to a group: what the config says, or what K rows in G groups are.
local function group_size_of(name, o, k, groups)
  if o.group_size ~= nil then return check.integer(name, "group_size", o.group_size, -1) end
  return groups > 0 and math.ceil(k / groups) or -1
end

---------------------------------------------------------------------------------------------------
-- GPTQ
---------------------------------------------------------------------------------------------------

local GPTQ_WIDTHS = { 1, 2, 3, 4, 8 }

---How zero points are stored: "v1" (minus one) or "v2" (as they are), and why, in words. Files that say
---they are symmetric have one zero point, 2^(bits-1); where their fields are not what the config's
---convention makes of it but what the other one does, the fields are right.
---@param qzeros qm.Tensor
---
---GPTQModel takes the one from whole words: a zero point of 0, which only weights that are not symmetric have,
---borrows from its neighbour ("v1 borrowed"). Of 3 bits, which no word holds evenly, it becomes 7 ("v1 wrapped").
---@param o table  { checkpoint_format = "gptq" (default) or "gptq_v2", sym, made_by = "gptqmodel" or nil }
---@return string convention
---@return string note
function M.zero_points(qzeros, bits, o)
  local said = o.checkpoint_format == "gptq_v2" and "v2" or "v1"
  local note = ("zero points are read as %s has them, %s"):format(said == "v2" and "gptq_v2" or "gptq",
    o.checkpoint_format and "as the config says" or "for the config does not say")
  if o.sym == false and said == "v1" and o.made_by == "gptqmodel" then
    return bits == 3 and "v1 wrapped" or "v1 borrowed", "zero points are read as GPTQModel stores asymmetric ones in "
      .. "gptq, minus one from whole words"
  end
  if o.sym == false or bits == 1 then return said, note end
  local counts, middle = words.count_fields(qzeros, bits), 2 ^ (bits - 1)
  local total = qzeros:count() * 32 / bits
  local found = counts[middle] == total and "v2" or counts[middle - 1] == total and "v1" or said
  if total == 0 or found == said then return said, note end
  return found, ("the config says %s, but every zero point is stored as %d, which is %s's for symmetric weights: "
    .. "they are read so"):format(o.checkpoint_format or "nothing of zero points", found == "v2" and middle
    or middle - 1, found == "v2" and "gptq_v2" or "gptq")
end

---A file's g_idx; nil where it is k div group_size, which it need not say.
local function unless_in_order(g_idx, group_size, k)
  if not g_idx or group_size == 0 then return g_idx end
  if group_size == -1 then group_size = k end
  local values, count = g_idx:host()
  for i = 0, count - 1 do if values[i] ~= math.floor(i / group_size) then return g_idx end end
  g_idx:free()
end

local function read_gptq(name, fields, o)
  local n = fields.qweight.shape[2]
  local bits = fields.qzeros.shape[2] * 32 / math.max(n, 1)
  check.one_of(name, "qzeros, bits of its fields beside qweight's columns", bits, GPTQ_WIDTHS)
  if o.bits and o.bits ~= bits then
    check.fail(name, "bits", ("%d, as qzeros has %d words for %d columns"):format(bits, fields.qzeros.shape[2], n),
      o.bits)
  end
  local k = fields.qweight.shape[1] * 32 / bits
  local group_size = group_size_of(name, o, k, fields.scales.shape[1])
  local convention, note = o.zero_points, "zero points are read as the caller says"
  if not convention then convention, note = M.zero_points(fields.qzeros, bits, o) end
  check.one_of(name, "zero_points", convention, { "v1", "v2", "v1 wrapped", "v1 borrowed" })
  local zeros = fields.qzeros
  if convention == "v1 wrapped" or convention == "v1 borrowed" then
    zeros = convention == "v1 wrapped" and words.shift_fields(zeros, bits, 1)
      or words.add_to_words(zeros, (2 ^ 32 - 1) / (2 ^ bits - 1))
    fields.qzeros:free()
  end
  return { data = fields.qweight, scales = fields.scales, zeros = zeros, g_idx = unless_in_order(fields.g_idx,
    group_size, k), w_bit = bits, asym = true,
    group_size = group_size, zero_offset = convention == "v1" and 1 or 0, layer_type = 1 }, note
end

---Zero points in the other convention, or a share of them; refuses what it cannot say.
local function zeros_from(name, q, offset)
  local delta = q.zero_offset - offset
  if delta == 0 then return q.zeros:share() end
  local lost = q.zero_offset == 0 and 0 or 2 ^ q.w_bit - 1
  local count = words.count_fields(q.zeros, q.w_bit)[lost]
  if count > 0 then
    refuse(name, "%d zero points are %d, which %s: save it as %s", count, lost + q.zero_offset,
      offset == 1 and "files that store them minus one cannot hold" or "files that store them as they are cannot hold",
      offset == 1 and "gptq_v2" or "gptq")
  end
  return words.shift_fields(q.zeros, q.w_bit, delta)
end

---Refuse a parameter that has what the format has no place for.
local function without(name, q, ...)
  for _, field in ipairs({ ... }) do
    if q[field] then refuse(name, "the format has no place for %s, which %s has", field, tostring(q)) end
  end
end

---Each feature's group, as a tensor.
local function g_idx_of(q)
  if q.g_idx then return q.g_idx:share() end
  return words.build({ q.shape[1] }, "i32", q.data.device, function(out)
    for k = 0, q.shape[1] - 1 do out[k] = math.floor(k / q.group_size) end
  end)
end

local function write_gptq(name, q, o)
  without(name, q, "q_groups", "q_perm", "channel_scale")
  if not q.asym then refuse(name, "the format has integer zero points, and those of %s are not", tostring(q)) end
  check.one_of(name, "q.w_bit", q.w_bit, GPTQ_WIDTHS)
  local convention = o.checkpoint_format or q.zero_offset == 0 and "gptq_v2" or "gptq"
  check.one_of(name, "checkpoint_format", convention, { "gptq", "gptq_v2" })
  return { qweight = q.data:share(), qzeros = zeros_from(name, q, convention == "gptq" and 1 or 0),
    scales = q.scales:share(), g_idx = g_idx_of(q) }
end

format("gptq", { qweight = { "i32", 2, part = "data" }, qzeros = { "i32", 2, part = "zeros" },
  scales = { "float", 2 }, g_idx = { "i32", 1, optional = true } }, read_gptq, write_gptq)

---------------------------------------------------------------------------------------------------
-- AWQ
---------------------------------------------------------------------------------------------------

local function read_awq(name, fields, o)
  local k, n = fields.qweight.shape[1], fields.qweight.shape[2] * 8
  if o.bits and o.bits ~= 4 then check.fail(name, "bits", "4", o.bits) end
  if k % 32 ~= 0 then check.fail(name, "qweight", "K (rows) a multiple of 32", fields.qweight) end
  if fields.qzeros.shape[2] * 8 ~= n then
    check.fail(name, "qzeros", ("i32 [G, N / 8 = %d]"):format(n / 8), fields.qzeros)
  end
  local parts = { data = words.rows_from_awq(fields.qweight), zeros = words.reorder_awq(fields.qzeros),
    scales = fields.scales, w_bit = 4, asym = true, zero_offset = 0, layer_type = 1,
    group_size = group_size_of(name, o, k, fields.scales.shape[1]) }
  fields.qweight:free()
  fields.qzeros:free()
  return parts
end

local function write_awq(name, q)
  without(name, q, "q_groups", "q_perm", "g_idx", "channel_scale")
  if not q.asym or q.w_bit ~= 4 then refuse(name, "the format is 4 bit asym, and here is %s", tostring(q)) end
  local zeros = zeros_from(name, q, 0)
  local fields = { qweight = words.rows_to_awq(q.data), qzeros = words.reorder_awq(zeros, true),
    scales = q.scales:share() }
  zeros:free()
  return fields
end

format("awq", { qweight = { "i32", 2, part = "data" }, qzeros = { "i32", 2, part = "zeros" },
  scales = { "float", 2 } }, read_awq, write_awq)

---------------------------------------------------------------------------------------------------
-- EXL2
---------------------------------------------------------------------------------------------------

---The widths of a list of groups.
local function widths_of(q_groups)
  local widths = {}
  for g = 1, #q_groups / 2 do widths[g] = q_groups[2 * g - 1] end
  return widths
end

---The first n columns, a new tensor; releases x.
local function first_columns(x, n)
  local turned = x:transpose()
  local kept = turned:narrow(1, n)
  local out = kept:transpose()
  for _, tensor in ipairs({ x, turned, kept }) do tensor:free() end
  return out
end

local function read_exl2(name, fields, o)
  local stored, groups = fields.q_weight.shape[2], fields.q_scale.shape[1]
  local n = check.integer(name, "columns", o.columns or stored, 1, stored)
  local q_groups = mixed.parse(name, fields.q_groups, fields.q_weight.shape[1])
  if #q_groups ~= 2 * groups or fields.q_scale_max:count() ~= groups or fields.q_scale.shape[2] * 8 ~= stored then
    check.fail(name, "q_scale", ("i32 [G=%d, N / 8 = %d], and q_scale_max [G]"):format(#q_groups / 2, stored / 8),
      fields.q_scale)
  end
  local scales, zeros = words.exl2_grid(fields.q_scale, fields.q_scale_max, widths_of(q_groups))
  local parts = { data = fields.q_weight, scales = scales, zeros = zeros, q_groups = q_groups, layer_type = 2,
    q_perm = words.inverse(name, "q_invperm", fields.q_invperm) }
  fields.q_invperm:free()
  fields.q_groups:free()
  if n == stored then
    parts.q_scale, parts.q_scale_max = fields.q_scale, fields.q_scale_max
    return parts
  end
  for _, field in ipairs({ "data", "scales", "zeros" }) do parts[field] = first_columns(parts[field], n) end
  fields.q_scale:free()
  fields.q_scale_max:free()
  return parts, ("columns %d to %d are padding, and left out"):format(n + 1, stored)
end

local function write_exl2(name, q)
  without(name, q, "channel_scale", "g_idx")
  if not (q.sections and q.q_scale and q.q_scale_max) then
    refuse(name, "only what came from an EXL2 file has scales that such a file can hold: save it as mbwq")
  end
  local scales, zeros = words.exl2_grid(q.q_scale, q.q_scale_max, widths_of(q.q_groups))
  local same = q.scales.dtype == "f16" and scales:bytes() == q.scales:bytes() and zeros:bytes() == q.zeros:bytes()
  scales:free()
  zeros:free()
  if not same then
    refuse(name, "its scales or zeros have moved away from those that the file had: save it as mbwq")
  end
  local identity = not q.q_perm and words.build({ q.shape[1] }, "i32", q.data.device, function(out)
    for k = 0, q.shape[1] - 1 do out[k] = k end
  end)
  return { q_weight = q.data:share(), q_scale = q.q_scale:share(), q_scale_max = q.q_scale_max:share(),
    q_invperm = identity or words.inverse(name, "q_perm", q.q_perm),
    q_groups = words.to_i16(name, "q_groups", q.q_groups, #q.q_groups, q.data.device) }
end

format("exl2", { q_weight = { "i32", 2, part = "data" }, q_scale = { "i32", 2 }, q_scale_max = { "float", 1 },
  q_invperm = { "index", 1, part = "q_perm" }, q_groups = { "index", 1 } }, read_exl2, write_exl2)

---------------------------------------------------------------------------------------------------
-- bitorch-engine's
---------------------------------------------------------------------------------------------------

---The same where nothing else says which rows are a group's: sizes that bitorch-engine's kernels have, which
---divide 128 or are multiples of it, and divide K. The last group may be short where the caller says how long
---the others are.
local function even_group_size(name, o, k, groups)
  local size = group_size_of(name, o, k, groups)
  if o.group_size ~= nil or groups <= 1 or k % groups == 0 and (128 % size == 0 or size % 128 == 0) then return size end
  check.fail(name, "group_size", ("rows to a group, which %d groups of %d rows do not tell (quant_strategy.json does)")
    :format(groups, k), nil)
end

local function read_mbwq(name, fields, o)
  local parts = { data = fields.qweight, scales = fields.scales, zeros = fields.zeros, q_perm = fields.q_perm,
    channel_scale = fields.channel_scale, layer_type = 2 }
  if fields.q_groups then
    parts.q_groups = mixed.parse(name, fields.q_groups, fields.qweight.shape[1])
    fields.q_groups:free()
  else
    parts.w_bit = check.one_of(name, "bits", o.bits, mixed.WIDTHS)
    parts.group_size = even_group_size(name, o, fields.qweight.shape[1] * 32 / o.bits, fields.scales.shape[1])
  end
  return parts
end

local function write_mbwq(name, q)
  without(name, q, "g_idx")
  if q.asym then refuse(name, "the format has float zeros, and %s has integer ones: save it as gptq", tostring(q)) end
  local k, device = q.shape[1], q.data.device
  local order = q.q_perm and q.q_perm:host() or setmetatable({}, { __index = function(_, i) return i - 1 end })
  local ones = q.channel_scale and q.channel_scale:to("f16") or words.half({ k }, device, function(out)
    for i = 0, k - 1 do out[i] = 1 end
  end)
  local channel_scale = ones:view_as(name, { 1, 1, k })
  ones:free()
  return { qweight = q.data:share(), scales = q.scales:share(), zeros = q.zeros:share(),
    q_perm = words.to_i16(name, "q_perm", order, k, device), channel_scale = channel_scale,
    q_groups = q.q_groups and words.to_i16(name, "q_groups", q.q_groups, #q.q_groups, device) or nil }
end

format("mbwq", { qweight = { "i32", 2, part = "data" }, scales = { "float", 2 }, zeros = { "float", 2 },
  q_perm = { "index", 1, optional = true }, channel_scale = { "float", optional = true },
  q_groups = { "index", 1, optional = true } }, read_mbwq, write_mbwq)

local RAW = { "qstatistic", "qscales", "qscales_zeros", "qscales_scales", "qzeros_zeros", "qzeros_scales" }

local function read_mpq(name, fields, o)
  local parts = { data = fields.qweight, scales = fields.scales, zeros = fields.zeros or fields.qzeros,
    w_bit = check.one_of(name, "bits", o.bits, mixed.WIDTHS), layer_type = 1, asym = fields.qzeros ~= nil }
  for _, field in ipairs(RAW) do parts[field] = fields[field] end
  local codes = fields.scales or fields.qstatistic or fields.qscales
  if not codes then check.fail(name, "scales", "scales, qstatistic or qscales", nil) end
  if #codes.shape == 0 then check.fail(name, "scales", "a row for each group", codes) end
  local k = fields.qweight.shape[1] * 32 / o.bits
  parts.group_size = (fields.g_idx and group_size_of or even_group_size)(name, o, k, codes.shape[1])
  parts.g_idx = unless_in_order(fields.g_idx, parts.group_size, k)
  return parts
end

local function write_mpq(name, q)
  without(name, q, "q_groups", "q_perm", "channel_scale", "qscales_zeros")
  if q.asym then refuse(name, "integer zero points are saved as gptq, and %s has them", tostring(q)) end
  return { qweight = q.data:share(), scales = q.scales:share(), zeros = q.zeros:share(), g_idx = g_idx_of(q) }
end

format("mpq", { qweight = { "i32", 2, part = "data" }, scales = { "float", 2, optional = true },
  zeros = { "float", 2, optional = true }, qzeros = { "i32", 2, optional = true, part = "zeros" },
  g_idx = { "i32", 1, optional = true }, qstatistic = { "u8", optional = true }, qscales = { "u8", optional = true },
  qscales_zeros = { "float", optional = true }, qscales_scales = { "float", optional = true },
  qzeros_zeros = { "float", optional = true }, qzeros_scales = { "float", optional = true } }, read_mpq, write_mpq)

---------------------------------------------------------------------------------------------------

local FORMATS = { "gptq", "awq", "exl2", "mbwq", "mpq" }

local IMPORT_OPTIONS = { bits = check.optional, group_size = check.optional, sym = check.optional,
  checkpoint_format = check.optional, made_by = check.optional, zero_points = check.optional,
  columns = check.optional, requires_grad = true, grad_dtype = "f32", id = check.optional, name = check.optional }

local function fits(tensor, kind, dims)
  local type_fits = tensor.dtype == kind or kind == "float" and FLOAT[tensor.dtype]
    or kind == "index" and (tensor.dtype == "i16" or tensor.dtype == "i32")
  return type_fits and (dims == nil or #tensor.shape == dims)
end

---The tensors against the format's list.
local function check_fields(name, known, fields)
  for field in pairs(check.type(name, "fields", fields, "table")) do
    if not known[field] then refuse(name, "the format has no tensor '%s'", tostring(field)) end
  end
  for field, kind in pairs(known) do
    local tensor = fields[field]
    if tensor == nil and not kind.optional then check.fail(name, field, "a tensor", nil) end
    if tensor ~= nil and not (check.is_tensor(tensor) and fits(tensor, kind[1], kind[2])) then
      check.fail(name, field, kind[1] .. (kind[2] and (" of %d dimensions"):format(kind[2]) or ""), tensor)
    end
  end
end

---A parameter from a file's tensors.
---
---@param kind string  "gptq", "awq", "exl2", "mbwq" or "mpq"
---@param fields table<string, qm.Tensor>  by their names in the file, without the layer's; the parameter
---   owns them from now on, or they are released
---@param options table|nil  bits (of mbwq and mpq; of gptq checked, where given), group_size (-1: one group;
---   where it is not given, what the scales' rows say), sym, checkpoint_format = "gptq" or "gptq_v2" and
---   made_by = "gptqmodel" (of gptq, as its config says), zero_points (of gptq: "v1", "v2", "v1 wrapped", which
---   reads the field 2^bits - 1 as 0, or "v1 borrowed", instead of the choice that M.zero_points makes),
---   columns (of exl2: what follows is padding), requires_grad = true, grad_dtype = "f32", id, name
---@return qm.QParam q
---@return string|nil note  a choice that was made, in words
---@raise naming the file's tensor that does not fit
function M.import(kind, fields, options)
  local name = "qm.QParam.import"
  check.one_of(name, "format", kind, FORMATS)
  local known = M.formats[kind]
  local o = check.options(name, options, IMPORT_OPTIONS)
  check_fields(name, known.fields, fields)
  local parts, note = known.read(name, fields, o)
  parts.requires_grad, parts.grad_dtype, parts.id, parts.name = o.requires_grad, o.grad_dtype, o.id, o.name
  local ok, q = pcall(function()
    local made = QParam.new(parts)
    return made:prepare()
  end)
  if ok then return q, note end
  for field, entry in pairs(known.fields) do
    if entry.part then q = tostring(q):gsub("'" .. entry.part .. "'", "'" .. field .. "'") end
  end
  error(q, 0)
end

---A parameter's tensors as a file has them: some share the parameter's memory. A residual stays behind.
---
---@param q qm.QParam
---@param kind string  as above
---@param options table|nil  checkpoint_format = "gptq" or "gptq_v2" (of gptq; default as they are stored)
---@return table<string, qm.Tensor>  to be released by the caller
---@raise where the format cannot hold what the parameter is, and says what can
function M.export(q, kind, options)
  local name = "export"
  check.one_of(name, "format", kind, FORMATS)
  local o = check.options(name, options, { checkpoint_format = check.optional })
  q:validate()
  return M.formats[kind].write(("%s as %s"):format(name, kind), q, o)
end

return M
