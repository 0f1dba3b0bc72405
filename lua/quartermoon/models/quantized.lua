---What config.json says of quantization, and the quantized weights of a folder as parameters.

local check = require("quartermoon.check")
local raise = require("quartermoon.ffi").raise
local qm = require("quartermoon")

local M = {}

local WIDTHS = { [2] = true, [3] = true, [4] = true, [8] = true }

---Some per-module overrides, which the data then answer instead?
local function has_overrides(keys)
  local dynamic = keys:get("dynamic")
  if dynamic ~= nil and type(dynamic) ~= "table" then keys:fail("dynamic", "an object", dynamic) end
  return dynamic ~= nil and next(dynamic) ~= nil
end

---The width and the group size, where they hold for every weight.
local function grid_of(keys)
  local bits = keys:integer("bits", nil, 1, 32)
  if not WIDTHS[bits] then keys:fail("bits", "2, 3, 4 or 8", bits) end
  local size = keys:integer("group_size", nil, -1)
  if size == 0 then keys:fail("group_size", "-1 or at least 1", size) end
  if has_overrides(keys) then return nil, nil end
  return bits, size
end

---Is this program among those that "meta" says made the folder ("name:version", or a list of such)?
local function made_by(keys, program)
  local meta = keys:get("meta")
  local made = type(meta) == "table" and meta.quantizer
  for _, name in ipairs(type(made) == "table" and made or { made or nil }) do
    if tostring(name):lower():match("^[^:]*") == program then return program end
  end
end

local READERS = {
  gptq = function(keys)
    local format_key = keys:get("checkpoint_format") ~= nil and "checkpoint_format" or "format"
    local o = { sym = keys:boolean("sym", true), made_by = made_by(keys, "gptqmodel") }
    o.bits, o.group_size = grid_of(keys)
    keys:boolean("desc_act", false)
    if keys:get(format_key) ~= nil then
      o.checkpoint_format = keys:one_of(format_key, nil, { "gptq", "gptq_v2" })
    end
    keys:one_of("pack_dtype", "int32", { "int32" })
    return o
  end,
  awq = function(keys)
    local bits = keys:integer("bits", keys:get("w_bit"), 1, 32)
    if bits ~= 4 then keys:fail("bits", "4", bits) end
    keys:one_of("version", "gemm", { "gemm", "GEMM" })
    if not keys:boolean("zero_point", true) then keys:fail("zero_point", "true", false) end
    local size = keys:integer("group_size", keys:get("q_group_size"), -1)
    return { bits = 4, group_size = size }
  end,
  exl2 = function() return {} end,
}
READERS.bie = function() return {} end

---How the weights of a folder are quantized.
---@param keys qm.models.Reader|nil  of quantization_config
---@param strategy qm.models.QuantStrategy|nil
---@return { kind: string|nil, options: table, strategy: table|nil }  kind nil: each weight's tensors say it
function M.read(keys, strategy)
  if not keys then return { options = {}, strategy = strategy } end
  local key = keys:get("quant_method") ~= nil and "quant_method" or keys:get("method") ~= nil and "method"
  local kind = key and keys:one_of(key, nil, { "gptq", "awq", "exl2", "bie" }) or "gptq"
  return { kind = kind ~= "bie" and kind or nil, options = READERS[kind](keys), strategy = strategy }
end

---What a linear layer's tensors are: "gptq", "awq", "exl2", "mbwq", "mpq", or nil of a dense one.
---@param source qm.models.Weights
---@param path string  of the layer
---@param known string|nil  what the configuration says
function M.kind_of(source, path, known)
  local function has(field) return source:has(path .. "." .. field) end
  if has("q_weight") then return "exl2" end
  if not has("qweight") then return nil end
  if known then return known end
  if has("q_perm") or has("q_groups") then return "mbwq" end
  if has("qstatistic") or has("qscales") or has("zeros") then return "mpq" end
  return "gptq"
end

---A layer's quantized weight, its tensors read to a device.
---@param name string   whose errors these are
---@param shape integer[]  { K, N } as config.json has it
---@return qm.QParam, string|nil note
function M.parameter(name, source, path, kind, how, shape, device)
  local fields, place = {}, path
  local known = require("quartermoon.qparam_files").formats[kind].fields
  local options = { name = path .. ".weight" }
  for key, value in pairs(how.options) do options[key] = value end
  if kind == "exl2" then options.columns = shape[2] end
  if kind == "mbwq" or kind == "mpq" then
    local dtype, words, file = source:info(path .. ".qweight")
    if #words ~= 2 then
      raise(("%s: %s: tensor '%s.qweight': expected i32 [words, N], got %s [%s]"):format(name, file, path, dtype,
        table.concat(words, ", ")))
    end
    options.bits, place = words[1] * 32 / shape[1], file .. ": " .. path
    if how.strategy and not source:has(path .. ".q_groups") then
      options.group_size = how.strategy:group_size(name, path, options.bits)
    end
  end
  local ok, q, note = pcall(function()
    for field in pairs(known) do
      local key = path .. "." .. field
      if source:has(key) then fields[field] = source:tensor(key, device) end
    end
    if kind == "mbwq" and fields.q_groups then options.bits = nil end
    return qm.QParam.import(kind, fields, options)
  end)
  if not ok then
    for _, tensor in pairs(fields) do tensor:free() end
    raise(("%s: %s: %s: %s"):format(name, source.folder, place, tostring(q)))
  end
  if q.shape[1] ~= shape[1] or q.shape[2] ~= shape[2] then
    local got = ("%d x %d"):format(q.shape[1], q.shape[2])
    q:free()
    raise(("%s: %s: tensor '%s': expected a weight of %d x %d as config.json has it, got %s"):format(name,
      source.folder, path, shape[1], shape[2], got))
  end
  return q, note
end

---Is every value 0?
function M.all_zero(tensor)
  check.desc("all_zero", "tensor", tensor)
  local values, count = tensor:host()
  for i = 0, count - 1 do if values[i] ~= 0 then return false end end
  return true
end

return M
