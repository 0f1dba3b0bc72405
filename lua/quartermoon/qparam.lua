---The quantized parameter: packed integer codes on a grid of scales and zeros, and what is needed to
---read and to update them. There is no dense copy: `dequantize` makes one when asked.
---
---    q = qm.QParam.quantize(w, { w_bit = 4, group_size = 64 })
---    w = q:dequantize("bf16")
---
---A weight W is [K, N], K inputs and N outputs, in groups along K:
---`asym`: W = scales[g] * (code - zero[g]); symmetric: W = code * scales[g] - zeros[g].
---Source: the MPQ and MBWQ parameters of bitorch-engine; GPTQ and AWQ files are the asymmetric kind,
---EXL2 files the symmetric one with mixed widths. qparam_files.lua reads and makes such files' tensors.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local devices = require("quartermoon.device")
local mixed = require("quartermoon.qparam_sections")
local tensors = require("quartermoon.tensor")
local lib = binding.lib

---@class qm.QParam
---@field data qm.Tensor     i32 [K * w_bit / 32, N]: codes packed along K
---@field scales qm.Tensor   float [G, N]
---@field zeros qm.Tensor    asym: i32 [G, N * w_bit / 32], fields of zero points; else float [G, N], times scale
---@field zero_offset integer asym: the zero point of field 0. 1 (GPTQ): they are 1 .. 2^w_bit; 0 (GPTQ v2,
---   AWQ): 0 .. 2^w_bit - 1
---@field g_idx qm.Tensor|nil   i32 [K]: each feature's group; without it feature k is in k div group_size
---@field q_perm qm.Tensor|nil  i32 [K]: the feature of each packed row; without it they are in order
---@field channel_scale qm.Tensor|nil  float [K]: multiplies the activations in qlinear (never W)
---@field q_groups integer[]|nil  mixed widths: { width, first word row } of each group, widths descending
---@field sections table|nil    mixed widths: the list of { w_bit =, rows = }, from q_groups
---@field group_map qm.Tensor|nil  mixed widths: i32 [K], each packed row's group, from q_groups
---@field q_scale qm.Tensor|nil  the scales as an EXL2 file has them, to save them so: i32 [G, N / 8] and
---@field q_scale_max qm.Tensor|nil  f16 [G]
---@field residual qm.Tensor|nil  i32 [K * residual_bits / 32, N]: what the codes lose, see update
---@field privileged_grad qm.Tensor|nil  [K, N]: gradient of the dequantized weight, accumulates
---@field grad_dtype string  its type: "f32", or "bf16", which rounds every sum
---@field shape integer[]    { K, N }
---@field w_bit integer      1, 2, 3, 4, 5, 6 or 8; of mixed widths the least
---@field group_size integer rows of K to a group
---@field asym boolean
---@field layer_type integer 1 = MPQ, 2 = MBWQ
---@field residual_bits integer 0, 4 or 8
---@field requires_grad boolean
---@field id integer         whose random bits: distinct for every parameter of a model
---@field name string|nil
local QParam = {}
QParam.__index = QParam

local M = { QParam = QParam }

-- Tensors that a parameter may own, in the order in which they are listed and saved.
local TENSORS = { "data", "scales", "zeros", "g_idx", "q_perm", "residual", "qstatistic", "qscales",
  "qscales_zeros", "qscales_scales", "qzeros_zeros", "qzeros_scales", "channel_scale", "q_scale", "q_scale_max" }

local descriptor = ffi.new("qm_mpq")

---The parameter as C takes it: one struct, valid until the next call.
function QParam:descriptor(name)
  if type(self) ~= "table" or getmetatable(self) ~= QParam then check.fail(name, "q", "a qm.QParam", self) end
  if self.qscales_zeros and not self.scales then
    binding.raise(name .. ": this parameter is doubly quantized still: call q:prepare() first")
  end
  descriptor.data = check.desc(name, "q.data", self.data)
  descriptor.scales = check.desc(name, "q.scales", self.scales)
  descriptor.zeros = check.desc(name, "q.zeros", self.zeros)
  descriptor.g_idx = check.optional_desc(name, "q.g_idx", self.g_idx)
  descriptor.q_perm = check.optional_desc(name, "q.q_perm", self.q_perm)
  descriptor.residual = check.optional_desc(name, "q.residual", self.residual)
  descriptor.group_map = check.optional_desc(name, "q.group_map", self.group_map)
  for _, key in ipairs({ "w_bit", "residual_bits", "group_size", "zero_offset" }) do
    descriptor[key] = check.integer(name, "q." .. key, self[key], 0, 2 ^ 31 - 1)
  end
  if self.sections then descriptor.w_bit = 0 end
  mixed.describe_to(descriptor, self.sections)
  descriptor.asym = self.asym and 1 or 0
  return descriptor
end

local next_id = 0

---The next parameter's id, where none is given.
local function fresh_id()
  next_id = next_id + 1
  return next_id
end

---An index tensor as i32. 16-bit permutations are unsigned.
local function as_i32(tensor)
  if tensor.dtype == "i32" then return tensor end
  local values = tensor:totable()
  for i, value in ipairs(values) do values[i] = tensor.dtype == "i16" and value % 65536 or value end
  local index = tensors.tensor(values, { dtype = "i32", device = tensor.device })
  tensor:free()
  return index
end

local function all_zero(tensor)
  local values, count = tensor:host()
  for i = 0, count - 1 do if values[i] ~= 0 then return false end end
  return true
end

local function is_identity(tensor)
  local values, count = tensor:host()
  for i = 0, count - 1 do if values[i] ~= i then return false end end
  return true
end

---Old files say "none" by zeros: a q_perm of zeros is the identity, which is not kept, a g_idx of zeros
---(with more than one group) is none. With mixed widths such a q_perm means what it says: it is no
---permutation.
local function normalise_indices(self)
  if self.q_perm then
    self.q_perm = as_i32(self.q_perm)
    local fits = self.q_perm:count() == self.shape[1] and self.shape[1] > 1
    if fits and (is_identity(self.q_perm) or not self.sections and all_zero(self.q_perm)) then
      self.q_perm:free()
      self.q_perm = nil
    end
  end
  if self.g_idx then
    self.g_idx = as_i32(self.g_idx)
    if self.group_size < self.shape[1] and all_zero(self.g_idx) then
      self.g_idx:free()
      self.g_idx = nil
    end
  end
end

---What scales channels by 1 is not kept; the rest is [K].
local function normalise_channel_scale(name, self)
  local scale = self.channel_scale
  if not scale then return end
  if scale:count() ~= self.shape[1] or not ({ f32 = true, f16 = true, bf16 = true })[scale.dtype] then
    check.fail(name, "channel_scale", ("float [K=%d]"):format(self.shape[1]), scale)
  end
  local values, count = scale:host()
  local is_one = true
  for i = 0, count - 1 do is_one = is_one and values[i] == 1 end
  self.channel_scale = not is_one and (#scale.shape == 1 and scale or scale:view_as(name, { count })) or nil
  if self.channel_scale ~= scale then scale:free() end
end

---Read the list of groups: sections, each row's group, K.
local function read_groups(name, self)
  local groups, k
  -- Without columns no memory bounds the rows, for which a map is made.
  if (self.data.shape[2] or 0) == 0 then check.fail(name, "data", "i32 [words, N], N at least 1", self.data) end
  self.q_groups, groups, self.sections, k = mixed.parse(name, self.q_groups, self.data.shape[1] or 0)
  self.group_map = mixed.group_map(groups, k, self.data.device):keep()
  self.w_bit, self.group_size = 8, 1
  for _, group in ipairs(groups) do
    self.w_bit, self.group_size = math.min(self.w_bit, group.w_bit), math.max(self.group_size, group.rows)
  end
  return k
end

local PARTS = { w_bit = check.optional, asym = false, group_size = check.optional, layer_type = check.optional,
  residual_bits = 0, requires_grad = true, grad_dtype = "f32", id = check.optional, name = check.optional,
  zero_offset = 1, q_groups = check.optional }
for _, field in ipairs(TENSORS) do PARTS[field] = check.optional end
PARTS.data = check.required

---A parameter from its parts, which it owns from now on.
---
---Missing fields: `g_idx` means k div group_size, `q_perm` (also all zeros) the identity,
---`group_size` -1 means one group. 16-bit q_perm entries are read unsigned. With the raw tensors of
---double quantization instead of scales and zeros, call `prepare` next. A channel_scale may have more
---dimensions; of ones it is dropped. With `q_groups` (a list, or a tensor, which stays the caller's) the
---widths are mixed, and w_bit and group_size do not count.
---
---@param parts table  data, scales, zeros, g_idx, q_perm, w_bit, asym = false, zero_offset = 1, group_size,
---   q_groups, channel_scale, layer_type, residual, residual_bits = 0, requires_grad = true,
---   grad_dtype = "f32", id, name; see the class
---@return qm.QParam
---@raise when a type, a shape, an index or the permutation does not fit
function QParam.new(parts)
  local name = "qm.QParam.new"
  local self = setmetatable(check.options(name, parts, PARTS), QParam)
  check.desc(name, "data", self.data)
  check.type(name, "asym", self.asym, "boolean")
  check.one_of(name, "zero_offset", self.zero_offset, { 0, 1 })
  check.one_of(name, "grad_dtype", self.grad_dtype, { "f32", "bf16" })
  local k
  if self.q_groups then
    k = read_groups(name, self)
  else
    check.one_of(name, "w_bit", self.w_bit, mixed.WIDTHS)
    check.integer(name, "group_size", self.group_size, -1)
    k = (self.data.shape[1] or 0) * 32 / self.w_bit
  end
  self.shape = { k, self.data.shape[2] or 0 }
  if self.group_size == -1 then self.group_size = math.max(k, 1) end
  self.id = check.integer(name, "id", self.id or fresh_id(), 0, 2 ^ 32 - 1)
  for _, field in ipairs(TENSORS) do check.optional_desc(name, field, self[field]) end
  local layer_type = self.layer_type or ((self.q_perm or self.sections) and 2 or 1)
  normalise_indices(self)
  normalise_channel_scale(name, self)
  self.layer_type = check.one_of(name, "layer_type", layer_type, { 1, 2 })
  if self.scales or not self.qscales_zeros then binding.check(lib.qm_mpq_validate(self:descriptor(name)), name) end
  for _, entry in ipairs(self:tensors()) do entry.tensor:keep() end
  return self
end

---Check every field again: types, shapes, indices in range, q_perm a permutation. @return qm.QParam self
function QParam:validate()
  binding.check(lib.qm_mpq_validate(QParam.descriptor(self, "validate")), "validate")
  return self
end

---The codes, one byte each: u8 [K, N], rows in packed order.
function QParam:unpack()
  local description = QParam.descriptor(self, "unpack")
  local codes = tensors.empty(self.shape, { dtype = "u8", device = self.data.device })
  binding.check(lib.qm_mpq_unpack(description, codes.desc), "unpack", codes)
  return codes
end

local FORMS = { codes = tonumber(ffi.C.QM_DECODE_CODES), residual = tonumber(ffi.C.QM_DECODE_RESIDUAL),
  bie = tonumber(ffi.C.QM_DECODE_BIE) }

---The dense weight, a new tensor [K, N] in feature order, computed in f32 and rounded once.
---
---@param dtype string|nil  "f32", "f16" or "bf16"; default the scales' type
---@param form string|nil   "codes": the weight that forward passes see; "residual": with what the
---   codes lost; "bie": rounded as bitorch-engine's update does, each operation to the scales' type
---@return qm.Tensor
function QParam:dequantize(dtype, form)
  local name = "dequantize"
  local description = QParam.descriptor(self, name)
  local code = FORMS[check.one_of(name, "form", form or "codes", { "codes", "residual", "bie" })]
  dtype = check.one_of(name, "dtype", dtype or self.scales.dtype, { "f32", "f16", "bf16" })
  local w = tensors.empty(self.shape, { dtype = dtype, device = self.data.device })
  binding.check(lib.qm_mpq_dequantize(description, w.desc, code), name, w)
  return w
end

local PACK_OPTIONS = { rounding = "nearest", noise = check.optional }
local NOISE_OPTIONS = { seed = 0, step = 0, stream = tonumber(ffi.C.QM_STREAM_CODES) }

---Put a dense weight on this parameter's grid, overwriting codes (and residual).
---
---@param w qm.Tensor  float [K, N], feature order
---@param options table|nil  { rounding = "nearest" (halves to even) or "stochastic" (up with
---   probability equal to the fraction), noise = { seed = 0, step = 0 } }
---@return qm.QParam self
function QParam:pack(w, options)
  local name = "pack"
  local description, desc = QParam.descriptor(self, name), check.desc(name, "w", w)
  options = check.options(name, options, PACK_OPTIONS)
  check.one_of(name, "rounding", options.rounding, { "nearest", "stochastic" })
  local noise
  if options.rounding == "stochastic" then
    local numbers = check.options(name, options.noise, NOISE_OPTIONS)
    for key in pairs(NOISE_OPTIONS) do check.integer(name, "noise." .. key, numbers[key], 0, 2 ^ 32 - 1) end
    noise = ffi.new("qm_noise", numbers.seed, self.id, numbers.step, numbers.stream)
  end
  binding.check(lib.qm_mpq_pack(description, desc, noise), name)
  return self
end

local METHODS = { minmax = tonumber(ffi.C.QM_FIT_MINMAX), mse = tonumber(ffi.C.QM_FIT_MSE) }

---Fit the grid anew to a dense weight, overwriting scales and zeros: the codes then mean something
---else until `pack`.
---@param method string|nil  "minmax" or "mse"
---@param range number|nil   multiplies the span, default 1
function QParam:fit(w, method, range)
  local description, desc = QParam.descriptor(self, "fit"), check.desc("fit", "w", w)
  method = METHODS[check.one_of("fit", "method", method or "minmax", { "minmax", "mse" })]
  binding.check(lib.qm_mpq_fit(description, desc, method, check.number("fit", "range", range or 1)), "fit")
  return self
end

---The tensors it consists of: a list of { name =, tensor = }, in a fixed order.
function QParam:tensors()
  local list = {}
  for _, field in ipairs(TENSORS) do
    if self[field] then list[#list + 1] = { name = field, tensor = self[field] } end
  end
  return list
end

---bitorch-engine's `q_group_map` ([2 K]: group, rows left in it) and `rows` (where the widths 8, 6, 5, 4,
---3 and 2 end, and a mask of them), as lists of numbers; nil for one width.
---@return integer[]|nil q_group_map
---@return integer[]|nil rows
function QParam:bie_groups()
  if not self.sections then return nil end
  local _, groups = mixed.parse("bie_groups", self.q_groups, self.data.shape[1])
  return mixed.bie_group_map(groups), mixed.bie_rows(self.sections)
end

---Bits of a code: the width, or the average of mixed ones.
function QParam:bits()
  return self.sections and self.data.shape[1] * 32 / self.shape[1] or self.w_bit
end

---Bytes of codes, grid, indices and residual; the gradient not included.
function QParam:size_bytes()
  local total = self.group_map and self.group_map:size_bytes() or 0
  for _, entry in ipairs(self:tensors()) do total = total + entry.tensor:size_bytes() end
  return total
end

---A copy on another device (or the same), with the same id, without the gradient.
---@param device string|qm.Device
function QParam:to(device)
  device = devices.resolve("to", device)
  local copy = {}
  for field in pairs(PARTS) do copy[field] = self[field] end
  for _, entry in ipairs(self:tensors()) do copy[entry.name] = entry.tensor:to(device) end
  return QParam.new(copy)
end
function QParam:clone() return self:to(self.data.device) end

---Drop the gathered gradient.
function QParam:zero_grad()
  if self.privileged_grad then self.privileged_grad:free() end
  self.privileged_grad = nil
end

---Release everything. Freeing twice is harmless.
function QParam:free()
  for _, entry in ipairs(self:tensors()) do entry.tensor:free() end
  if self.group_map then self.group_map:free() end
  self:zero_grad()
end

---Widths and groups in words: "4 bit asym, group 64", "8/4/2 bit sym, 3.25 on average".
function QParam:layout()
  local kind = self.asym and "asym" or "sym"
  if not self.sections then return ("%d bit %s, group %d"):format(self.w_bit, kind, self.group_size) end
  local widths = {}
  for i, section in ipairs(self.sections) do widths[i] = section.w_bit end
  return ("%s bit %s, %.4g on average"):format(table.concat(widths, "/"), kind, self:bits())
end

function QParam.describe(q)
  return ("qm.QParam %s%d x %d, %s%s"):format(q.name and q.name .. " " or "", q.shape[1], q.shape[2],
    QParam.layout(q), q.residual_bits > 0 and (", residual %d bit"):format(q.residual_bits) or "")
end
QParam.__tostring = QParam.describe

---From a dense weight; see qparam_quantize.lua.
function QParam.quantize(w, options) return require("quartermoon.qparam_quantize").quantize(w, options) end

---From the tensors of a GPTQ, AWQ, EXL2 or bitorch-engine file, and as such; see qparam_files.lua.
function QParam.import(kind, fields, options)
  return require("quartermoon.qparam_files").import(kind, fields, options)
end
function QParam:export(kind, options) return require("quartermoon.qparam_files").export(self, kind, options) end

---Undo double quantization; see qparam_quantize.lua. @return qm.QParam self
function QParam:prepare() return require("quartermoon.qparam_quantize").prepare(self) end

---Give it memory for what its codes lose; see qparam_quantize.lua. @return qm.QParam self
function QParam:add_residual(bits, generator)
  return require("quartermoon.qparam_quantize").add_residual(self, bits, generator)
end

---One update step in place; see qparam_update.lua.
function QParam.update(q, options) return require("quartermoon.qparam_update").update(q, options) end

check.methods("qm.QParam", QParam, { new = true, quantize = true, import = true, update = true,
  descriptor = true })

return M
