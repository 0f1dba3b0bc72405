---The quantized parameter: packed integer codes on a grid of scales and zeros, and what is needed to
---read and to update them. There is no dense copy: `dequantize` makes one when asked.
---
---    q = qm.QParam.quantize(w, { w_bit = 4, group_size = 64 })
---    w = q:dequantize("bf16")
---
---A weight W is [K, N], K inputs and N outputs, in groups along K:
---`asym`: W = scales[g] * (code - zero[g]); symmetric: W = code * scales[g] - zeros[g].
---Source: the MPQ and MBWQ parameters of bitorch-engine; GPTQ files are the asymmetric kind.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local devices = require("quartermoon.device")
local tensors = require("quartermoon.tensor")
local lib = binding.lib

---@class qm.QParam
---@field data qm.Tensor     i32 [K * w_bit / 32, N]: codes packed along K
---@field scales qm.Tensor   float [G, N]
---@field zeros qm.Tensor    asym: i32 [G, N * w_bit / 32], fields are zero - 1; else float [G, N], times scale
---@field g_idx qm.Tensor|nil   i32 [K]: each feature's group; without it feature k is in k div group_size
---@field q_perm qm.Tensor|nil  i32 [K]: the feature of each packed row; without it they are in order
---@field residual qm.Tensor|nil  i32 [K * residual_bits / 32, N]: what the codes lose, see update
---@field privileged_grad qm.Tensor|nil  f32 [K, N]: gradient of the dequantized weight, accumulates
---@field shape integer[]    { K, N }
---@field w_bit integer      1, 2, 4 or 8
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
  "qscales_zeros", "qscales_scales", "qzeros_zeros", "qzeros_scales" }
-- Raw double-quantization tensors: gone after prepare().
local RAW = { "qstatistic", "qscales", "qscales_zeros", "qscales_scales", "qzeros_zeros", "qzeros_scales" }

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
  descriptor.w_bit, descriptor.residual_bits = self.w_bit, self.residual_bits
  descriptor.group_size, descriptor.asym = self.group_size, self.asym and 1 or 0
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

---Old files say "none" by zeros: a q_perm of zeros is the identity, a g_idx of zeros (with more than
---one group) is none.
local function normalise_indices(self)
  if self.q_perm then
    self.q_perm = as_i32(self.q_perm)
    if self.shape[1] > 1 and all_zero(self.q_perm) then
      local identity = tensors.arange(0, self.q_perm:count() - 1, { dtype = "i32", device = self.q_perm.device })
      self.q_perm:free()
      self.q_perm = identity
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

local PARTS = { w_bit = check.required, asym = false, group_size = check.required, layer_type = check.optional,
  residual_bits = 0, requires_grad = true, id = check.optional, name = check.optional,
  q_group_map = check.optional, rows = check.optional }
for _, field in ipairs(TENSORS) do PARTS[field] = check.optional end
PARTS.data = check.required

---A parameter from its parts, which it owns from now on.
---
---Missing fields: `g_idx` means k div group_size, `q_perm` (also all zeros) means the identity,
---`group_size` -1 means one group. 16-bit q_perm entries are read unsigned. With the raw tensors of
---double quantization instead of scales and zeros, call `prepare` next.
---
---@param parts table  data, scales, zeros, g_idx, q_perm, w_bit, asym = false, group_size, layer_type,
---   residual, residual_bits = 0, requires_grad = true, id, name; see the class
---@return qm.QParam
---@raise when a type, a shape, an index or the permutation does not fit
function QParam.new(parts)
  local name = "qm.QParam.new"
  local self = setmetatable(check.options(name, parts, PARTS), QParam)
  check.desc(name, "data", self.data)
  check.one_of(name, "w_bit", self.w_bit, { 1, 2, 4, 8 })
  check.type(name, "asym", self.asym, "boolean")
  check.integer(name, "group_size", self.group_size, -1)
  if self.q_group_map then
    binding.raise(name .. ": argument 'q_group_map': mixed bit widths are not trainable: expected one width")
  end
  local k = (self.data.shape[1] or 0) * 32 / self.w_bit
  self.shape = { k, self.data.shape[2] or 0 }
  if self.group_size == -1 then self.group_size = math.max(k, 1) end
  self.id = check.integer(name, "id", self.id or fresh_id(), 0, 2 ^ 32 - 1)
  normalise_indices(self)
  self.layer_type = check.one_of(name, "layer_type", self.layer_type or (self.q_perm and 2 or 1), { 1, 2 })
  for _, field in ipairs(TENSORS) do
    if self[field] then
      check.desc(name, field, self[field])
      self[field]:keep()
    end
  end
  if self.scales or not self.qscales_zeros then binding.check(lib.qm_mpq_validate(self:descriptor(name)), name) end
  return self
end

local METHODS = { minmax = tonumber(ffi.C.QM_FIT_MINMAX), mse = tonumber(ffi.C.QM_FIT_MSE) }
local QUANTIZE_OPTIONS = { w_bit = 4, group_size = 64, asym = true, dtype = "f16", method = "minmax", range = 1,
  residual_bits = 0, g_idx = check.optional, q_perm = check.optional, layer_type = check.optional,
  requires_grad = true, id = check.optional, name = check.optional }

---Quantize a dense weight: fit a grid, round to it.
---
---@param w qm.Tensor  float [K, N]; K a multiple of 32, and N too for asym
---@param options table|nil
---   w_bit = 4              1, 2, 4 or 8
---   group_size = 64        rows of K to a grid; -1: one group. The last group may be short
---   asym = true            integer zero points (GPTQ), else float zeros
---   dtype = "f16"          of scales (and of float zeros)
---   method = "minmax"      or "mse", which shrinks the span to the least squared error
---   range = 1              multiplies the span
---   residual_bits = 0      4 or 8: keep what the codes lose, for feedback = "residual"
---   g_idx, q_perm          i32 [K], see the class; owned by the parameter from now on
---   layer_type, requires_grad = true, id, name
---@return qm.QParam
---@raise when a shape or an option does not fit
function QParam.quantize(w, options)
  local name = "qm.QParam.quantize"
  check.desc(name, "w", w)
  local o = check.options(name, options, QUANTIZE_OPTIONS)
  check.one_of(name, "w_bit", o.w_bit, { 1, 2, 4, 8 })
  check.one_of(name, "dtype", o.dtype, { "f32", "f16", "bf16" })
  check.one_of(name, "residual_bits", o.residual_bits, { 0, 4, 8 })
  local method = METHODS[check.one_of(name, "method", o.method, { "minmax", "mse" })]
  check.number(name, "range", o.range)
  check.integer(name, "group_size", o.group_size, -1)
  local k, n = w.shape[1], w.shape[2]
  if #w.shape ~= 2 then check.fail(name, "w", "a matrix [K, N]", w) end
  if k % 32 ~= 0 or k == 0 then check.fail(name, "w", "K (rows) a multiple of 32, as codes fill whole words", w) end
  if o.asym and n % 32 ~= 0 then
    check.fail(name, "w", "N (columns) a multiple of 32, as packed zero points fill whole words", w)
  end
  local size = o.group_size == -1 and k or o.group_size
  if size == 0 then check.fail(name, "group_size", "-1 or at least 1", size) end
  local groups = math.ceil(k / size)
  local function empty(rows, columns, dtype)
    return tensors.empty({ rows, columns }, { dtype = dtype, device = w.device })
  end
  local q = QParam.new {
    data = empty(k * o.w_bit / 32, n, "i32"), scales = empty(groups, n, o.dtype),
    zeros = o.asym and empty(groups, n / 32 * o.w_bit, "i32") or empty(groups, n, o.dtype),
    g_idx = o.g_idx, q_perm = o.q_perm, w_bit = o.w_bit, asym = o.asym, group_size = size, layer_type = o.layer_type,
    residual_bits = o.residual_bits,
    residual = o.residual_bits > 0 and empty(k * o.residual_bits / 32, n, "i32") or nil,
    requires_grad = o.requires_grad, id = o.id, name = o.name,
  }
  binding.check(lib.qm_mpq_fit(q:descriptor(name), w.desc, method, o.range), name)
  binding.check(lib.qm_mpq_pack(q:descriptor(name), w.desc, nil), name)
  return q
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
  binding.check(lib.qm_mpq_unpack(description, codes.desc), "unpack")
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
  binding.check(lib.qm_mpq_dequantize(description, w.desc, code), name)
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

---One of double quantization's results: parameters [rows, D] or [rows, D, 1] say how codes divide.
local function undo(self, codes, shift, mask, zeros, scales)
  local name, n = "prepare", self.shape[2]
  check.desc(name, "codes", codes)
  check.desc(name, "zeros", zeros)
  check.desc(name, "scales", scales)
  local rows, blocks = zeros.shape[1] or 0, zeros.shape[2] or 1
  if n % math.max(blocks, 1) ~= 0 or blocks == 0 then check.fail(name, "zeros", "blocks that divide N=" .. n, zeros) end
  local groups = codes:count() / n
  if groups % 1 ~= 0 then check.fail(name, "codes", "N=" .. n .. " codes to a group", codes) end
  local grid = { codes:view_as(name, { groups, blocks, n / blocks }), zeros:view_as(name, { rows, blocks }),
    scales:view_as(name, { rows, blocks }) }
  local out = tensors.empty({ groups, n }, { dtype = zeros.dtype, device = zeros.device })
  local status = lib.qm_mpq_prepare(grid[1].desc, shift, mask, grid[2].desc, grid[3].desc, out.desc)
  for _, tensor in ipairs(grid) do tensor:free() end
  binding.check(status, name)
  return out:keep()
end

---Undo double quantization (GBA): from the 4- or 8-bit codes of scales and zeros make the float ones,
---and release the raw tensors. Groups of 256 and more never were doubly quantized: they keep the
---scales and zeros they came with. Does nothing where there is nothing to undo.
---
---Source: bitorch-engine's layer preparation; where its shapes do not broadcast we use one rule.
---@return qm.QParam self
function QParam:prepare()
  if not self.qscales_zeros then return self end
  if self.group_size < 256 or not self.scales then
    local codes = self.asym and self.qscales or self.qstatistic
    local shift, mask = self.asym and 0 or 4, self.asym and 255 or 15
    local scales = undo(self, codes, shift, mask, self.qscales_zeros, self.qscales_scales)
    if self.scales then self.scales:free() end
    self.scales = scales
    if not self.asym then
      local zeros = undo(self, codes, 0, 15, self.qzeros_zeros, self.qzeros_scales)
      if self.zeros then self.zeros:free() end
      self.zeros = zeros
    end
  end
  for _, field in ipairs(RAW) do
    if self[field] then self[field]:free() end
    self[field] = nil
  end
  binding.check(lib.qm_mpq_validate(self:descriptor("prepare")), "prepare")
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

---Bytes of codes, grid, indices and residual; the gradient not included.
function QParam:size_bytes()
  local total = 0
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
  self:zero_grad()
end

function QParam.describe(q)
  return ("qm.QParam %s%d x %d, %d bit %s, group %d%s"):format(q.name and q.name .. " " or "", q.shape[1], q.shape[2],
    q.w_bit, q.asym and "asym" or "sym", q.group_size,
    q.residual_bits > 0 and (", residual %d bit"):format(q.residual_bits) or "")
end
QParam.__tostring = QParam.describe

---One update step in place; see qparam_update.lua.
function QParam.update(q, options) return require("quartermoon.qparam_update").update(q, options) end

return M
