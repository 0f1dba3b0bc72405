---How quantized parameters come about: from dense weights, and from doubly quantized files.

local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local random = require("quartermoon.random")
local scopes = require("quartermoon.scope")
local tensors = require("quartermoon.tensor")
local mixed = require("quartermoon.qparam_sections")
local QParam = require("quartermoon.qparam").QParam
local lib = binding.lib

local M = {}

local QUANTIZE_OPTIONS = { w_bit = 4, group_size = 64, asym = check.optional, zero_offset = 1,
  sections = check.optional, channel_scale = check.optional, dtype = "f16", method = "minmax", range = 1,
  residual_bits = 0, g_idx = check.optional, q_perm = check.optional, layer_type = check.optional,
  requires_grad = true, grad_dtype = "f32", id = check.optional, name = check.optional }

---Quantize a dense weight: fit a grid, round to it.
---
---@param w qm.Tensor  float [K, N]; K a multiple of 32, and N too for asym
---@param options table|nil
---   w_bit = 4              1, 2, 3, 4, 5, 6 or 8
---   group_size = 64        rows of K to a grid; -1: one group. The last group may be short
---   sections               instead of both, mixed widths: a list of { w_bit, rows, group_size = 32 },
---                          widths descending, rows multiples of 32 that add up to K
---   asym = true            integer zero points (GPTQ), else float zeros, as with sections
---   zero_offset = 1        of integer zero points: 1 (GPTQ) or 0 (GPTQ v2, AWQ), see the class
---   channel_scale          float [K], see the class; owned by the parameter from now on
---   dtype = "f16"          of scales (and of float zeros)
---   method = "minmax"      or "mse", which shrinks the span to the least squared error
---   range = 1              multiplies the span
---   residual_bits = 0      4 or 8: keep what the codes lose, for feedback = "residual"
---   g_idx, q_perm          i32 [K], see the class; owned by the parameter from now on
---   layer_type, requires_grad = true, grad_dtype = "f32", id, name
---@return qm.QParam
---@raise when a shape or an option does not fit
function M.quantize(w, options)
  local name = "qm.QParam.quantize"
  check.desc(name, "w", w)
  local o = check.options(name, options, QUANTIZE_OPTIONS)
  check.one_of(name, "w_bit", o.w_bit, mixed.WIDTHS)
  if o.asym == nil then o.asym = not o.sections end
  check.type(name, "asym", o.asym, "boolean")
  check.one_of(name, "dtype", o.dtype, { "f32", "f16", "bf16" })
  check.one_of(name, "residual_bits", o.residual_bits, { 0, 4, 8 })
  check.one_of(name, "method", o.method, { "minmax", "mse" })
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
  local groups, words, q_groups = math.ceil(k / size), k / 32 * o.w_bit, nil
  if o.sections then
    q_groups, words = mixed.list(name, o.sections)
    groups = #q_groups / 2
    local _, _, _, rows = mixed.parse(name, q_groups, words)
    if rows ~= k then check.fail(name, "sections", ("K=%d rows in all"):format(k), rows) end
    if o.asym then check.fail(name, "asym", "false beside sections: mixed widths have float zeros", o.asym) end
  end
  local function empty(rows, columns, dtype)
    return tensors.empty({ rows, columns }, { dtype = dtype, device = w.device })
  end
  local q = scopes.guard(function() return QParam.new {
    data = empty(words, n, "i32"), scales = empty(groups, n, o.dtype),
    zeros = o.asym and empty(groups, n / 32 * o.w_bit, "i32") or empty(groups, n, o.dtype),
    g_idx = o.g_idx, q_perm = o.q_perm, w_bit = o.w_bit, asym = o.asym, group_size = size, layer_type = o.layer_type,
    zero_offset = o.zero_offset, q_groups = q_groups, channel_scale = o.channel_scale,
    residual_bits = o.residual_bits,
    residual = o.residual_bits > 0 and empty(k * o.residual_bits / 32, n, "i32") or nil,
    requires_grad = o.requires_grad, grad_dtype = o.grad_dtype, id = o.id, name = o.name,
  } end)
  local ok, message = pcall(function() q:fit(w, o.method, o.range):pack(w) end)
  if ok then return q end
  q:free()
  error(message, 0)
end

-- A word of residuals that are all 0: each is stored as r + 2^(bits - 1).
local NO_RESIDUAL = { [4] = -0x77777778, [8] = -0x7f7f7f80 }

---Give a parameter a residual, as feedback = "residual" needs.
---
---Without a generator it is empty: the weights are what the codes say. With one it is drawn evenly from
---what rounds to the codes. Training from such codes should draw: if every weight began in the middle
---of its cell, none could be seen to move before its steps had added up to half a cell.
---@param bits integer|nil  4 or 8, default 8
---@param generator qm.Generator|nil
---@return qm.QParam self
---@raise when it has one already
function M.add_residual(self, bits, generator)
  local name = "add_residual"
  bits = check.one_of(name, "bits", bits or 8, { 4, 8 })
  if generator ~= nil and getmetatable(generator) ~= random.Generator then
    check.fail(name, "generator", "a qm.generator", generator)
  end
  if self.residual then check.fail(name, "q", "a parameter without a residual", self) end
  local shape, device = { self.shape[1] * bits / 32, self.shape[2] }, self.data.device
  if generator then
    local uniform = generator:rand({ 4 * shape[1] * shape[2] }, { device = device }, 0, 256)
    local random_bytes = uniform:to("u8")
    self.residual = random_bytes:reinterpret("i32", shape):keep()
    random_bytes:free()
    uniform:free()
  else
    self.residual = tensors.full(shape, NO_RESIDUAL[bits], { dtype = "i32", device = device }):keep()
  end
  self.residual_bits = bits
  return self
end

-- Raw double-quantization tensors: gone after prepare().
local RAW = { "qstatistic", "qscales", "qscales_zeros", "qscales_scales", "qzeros_zeros", "qzeros_scales" }

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
  binding.check(status, name, out)
  return out:keep()
end

---Undo double quantization (GBA): from the 4- or 8-bit codes of scales and zeros make the float ones,
---and release the raw tensors. Groups of 256 and more never were doubly quantized: they keep the
---scales and zeros they came with. Does nothing where there is nothing to undo.
---
---Source: bitorch-engine's layer preparation; where its shapes do not broadcast we use one rule.
---@return qm.QParam self
function M.prepare(self)
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

return M
