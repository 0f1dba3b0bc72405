---Writing model folders that transformers, GPTQModel and vLLM read, and that load back to equal logits.

local check = require("quartermoon.check")
local files = require("quartermoon.files")
local json_text = require("quartermoon.models.json_text")
local module = require("quartermoon.nn.module")
local nn = require("quartermoon.nn")
local published = require("quartermoon.models.published")
local quant_strategy = require("quartermoon.models.quant_strategy")
local raise = require("quartermoon.ffi").raise
local safetensors = require("quartermoon.safetensors")
local save_config = require("quartermoon.models.save_config")
local tensors = require("quartermoon.tensor")
local words = require("quartermoon.qparam_words")

local M = {}

-- What tokenizers and generation need, copied from the folder that a model came from.
local COMPANIONS = { "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
  "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
  "generation_config.json" }

---A dense tensor as the file has it, made when its turn comes.
---@param shape integer[]  ours
---@param value function   () -> a tensor to release, of ours' shape
local function plan_of(shape, dtype, transposed, value)
  return { dtype = dtype, shape = transposed and { shape[2], shape[1] } or shape, make = function()
    local x = value()
    local function replace(y)
      x:free()
      x = y
    end
    if x.dtype ~= dtype then replace(x:to(dtype)) end
    if transposed then replace(x:transpose()) end
    return x
  end }
end

---A dense parameter; rows of an embedding beyond the vocabulary stay behind.
local function dense_part(model, entry, dtype)
  local x, shape = entry.param, entry.param.shape
  local is_table = getmetatable(entry.layer) == nn.Embedding and x == model.tied_weight
  if is_table and shape[1] > model.config.vocab_size then shape = { model.config.vocab_size, shape[2] } end
  return { entry.name, plan_of(shape, dtype or x.dtype, entry.transposed, function()
    return shape ~= x.shape and x:view_rows("model:save", 1, shape[1]) or x:share()
  end) }
end

---A quantized parameter as a dense one.
local function decoded_part(model, entry, dtype)
  return { entry.name, plan_of(entry.param.shape, dtype or "f32", model.stores_transposed(entry.path), function()
    return entry.param:dequantize("f32")
  end) }
end

---The tensors of a quantized parameter in a format.
local function exported_parts(name, entry, kind, options, list)
  local ok, fields = pcall(entry.param.export, entry.param, kind, options)
  if not ok then raise(("%s: tensor '%s': %s"):format(name, entry.path, tostring(fields))) end
  for field, tensor in pairs(fields) do
    list[#list + 1] = { entry.path .. "." .. field, { dtype = tensor.dtype, shape = tensor.shape,
      make = function() return tensor end } }
  end
end

---How a GPTQ folder holds the zero points: "gptq" where all lie in the middle, for every program reads that;
---else "gptq_v2", for GPTQModel trusts nobody's asymmetric "gptq" but its own, unless one is 2^bits.
local function zero_convention(entries)
  local convention = "gptq"
  for _, entry in ipairs(entries) do
    local q = entry.param
    if q.asym and not save_config.is_symmetric(q) then
      if q.zero_offset == 1 and words.count_fields(q.zeros, q.w_bit)[2 ^ q.w_bit - 1] > 0 then return "gptq" end
      convention = "gptq_v2"
    end
  end
  return convention
end

---The format that a model has already.
local function natural_format(quantized)
  if #quantized == 0 then return "dense" end
  local q = quantized[1].param
  if q.asym then return "gptq" end
  return q.layer_type == 2 and "mbwq" or "mpq"
end

---Tensors in shards of at most `size` bytes, a larger tensor alone.
local function shards_of(list, size)
  local shards, total = { {} }, 0
  local room = size
  for _, part in ipairs(list) do
    local bytes = tensors.dtype_size[part[2].dtype]
    for _, extent in ipairs(part[2].shape) do bytes = bytes * extent end
    if bytes > room and #shards[#shards] > 0 then
      shards[#shards + 1], room = {}, size
    end
    local shard = shards[#shards]
    shard[#shard + 1] = part
    room, total = room - bytes, total + bytes
  end
  return shards, total
end

---Widest type first, so that each tensor lies at a multiple of its element's size.
local function sort_for_file(shard)
  table.sort(shard, function(a, b)
    local wide_a, wide_b = tensors.dtype_size[a[2].dtype], tensors.dtype_size[b[2].dtype]
    if wide_a ~= wide_b then return wide_a > wide_b end
    return a[1] < b[1]
  end)
end

local function write_weights(folder, list, shard_bytes)
  local shards, total = shards_of(list, shard_bytes)
  local map = {}
  for i, shard in ipairs(shards) do
    local base = #shards == 1 and "model.safetensors" or ("model-%05d-of-%05d.safetensors"):format(i, #shards)
    sort_for_file(shard)
    safetensors.save(folder .. "/" .. base, shard, { format = "pt" })
    for _, part in ipairs(shard) do map[part[1]] = base end
  end
  if #shards > 1 then
    files.write(folder .. "/model.safetensors.index.json",
      json_text.encode({ metadata = { total_size = total }, weight_map = map }))
  end
end

local function copy_companions(from, to)
  for _, base in ipairs(COMPANIONS) do
    if from and files.exists(from .. "/" .. base) then
      files.write(to .. "/" .. base, files.assert("model:save", files.read(from .. "/" .. base)))
    end
  end
end

---What goes into the folder: its tensors and its configuration.
local function plan(name, model, kind, o, entries, quantized)
  local list, left_dense, dense_type = {}, {}, o.dtype
  local export = { checkpoint_format = kind == "gptq" and (o.checkpoint_format or zero_convention(quantized)) or nil }
  for _, entry in ipairs(entries) do
    if not module.is_quantized(entry.param) then
      list[#list + 1] = dense_part(model, entry, o.dtype)
      local matrix = #entry.param.shape == 2
      if matrix then dense_type = dense_type or entry.param.dtype end
      if matrix and getmetatable(entry.layer) == nn.Linear and entry.path ~= "lm_head" then
        left_dense[#left_dense + 1] = entry.path
      end
    elseif kind == "dense" then
      list[#list + 1] = decoded_part(model, entry, o.dtype)
    else
      exported_parts(name, entry, kind, export, list)
    end
  end
  local values = save_config.values(name, model, dense_type or "f32")
  if kind == "gptq" then
    values.quantization_config = save_config.gptq(quantized, left_dense, export.checkpoint_format)
  end
  if kind == "awq" then values.quantization_config = save_config.awq(name, quantized, left_dense) end
  if kind == "exl2" then values.quantization_config = model.published and model.published.quantization_config end
  return list, values
end

local OPTIONS = { format = "auto", dtype = check.optional, shard_bytes = 5e9, tokenizer = check.optional,
  checkpoint_format = check.optional, overwrite = false }
local FORMATS = { "auto", "dense", "gptq", "awq", "exl2", "mbwq", "mpq" }

local function check_options(name, folder, options)
  check.type(name, "folder", folder, "string")
  local o = check.options(name, options, OPTIONS)
  check.one_of(name, "format", o.format, FORMATS)
  check.number(name, "shard_bytes", o.shard_bytes, 1)
  check.type(name, "overwrite", o.overwrite, "boolean")
  if o.dtype then check.one_of(name, "dtype", o.dtype, { "f32", "f16", "bf16" }) end
  if o.tokenizer then check.type(name, "tokenizer", o.tokenizer, "string") end
  if o.checkpoint_format then
    check.one_of(name, "checkpoint_format", o.checkpoint_format, { "gptq", "gptq_v2" })
  end
  return o
end

---@param strategy table[]|nil  parameters that quant_strategy.json describes
local function write_folder(folder, list, values, o, from, strategy)
  write_weights(folder, list, o.shard_bytes)
  copy_companions(from, folder)
  if strategy then quant_strategy.write(folder, strategy) end
  if values.quantization_config and values.quantization_config.quant_method == "gptq" then
    files.write(folder .. "/quantize_config.json", json_text.encode(values.quantization_config))
  end
  files.write(folder .. "/config.json", json_text.encode(values))
end

---Write a folder: config.json, model.safetensors (shards and their index above a size), and the tokenizer's
---files from the folder that the model came from. It is complete or not there at all.
---
---Of a GPTQ folder, layers that have another width or group size than most, or none, are exceptions by name in
---the configuration's `dynamic`: GPTQModel knows such, and vLLM, where q, k and v, and gate and up, are alike;
---transformers does not. vLLM 0.32 takes 4 and 8 bits, symmetric, groups of 32, 64, 128 or -1 as they lie (static
---with act-order); the asymmetric of 4 bits it reads as "awq".
---
---@param model qm.models.Decoder
---@param folder string
---@param options table|nil  { format = "auto" (dense, or what the quantized weights are), "dense", "gptq",
---   "awq", "exl2", "mbwq" or "mpq", dtype = as they are ("f32", "f16", "bf16": of dense tensors; what is
---   rounded loads back rounded), shard_bytes = 5e9, tokenizer = a folder to take its files from instead,
---   checkpoint_format = "gptq" or "gptq_v2" (of gptq; default the first for symmetric weights, the second for
---   others, as GPTQModel wants it), overwrite = false: a folder that is there already is refused, or replaced }
---@return string folder
---@raise naming the tensor that the format cannot hold, or the file that cannot be written
function M.save(model, folder, options)
  local name = "model:save"
  local o = check_options(name, folder, options)
  folder = folder:match("^(.-)/*$")
  local there = files.list(folder)
  if there and #there > 0 and not (o.overwrite and files.exists(folder .. "/config.json")) then
    raise(("%s: %s is there already; %s"):format(name, folder, o.overwrite and "it is no model folder to replace"
      or "the option overwrite = true replaces it with all that is in it"))
  end
  local entries, quantized = published.parameters(model), {}
  for _, entry in ipairs(entries) do
    if module.is_quantized(entry.param) then quantized[#quantized + 1] = entry end
  end
  local kind = o.format == "auto" and natural_format(quantized) or o.format
  if kind ~= "dense" and #quantized == 0 then
    check.fail(name, "format", "'dense', as no weight of this model is quantized", kind)
  end
  local list, values = plan(name, model, kind, o, entries, quantized)
  local partial = folder .. ".partial"
  if files.list(partial) then files.remove_folder(partial) end
  files.make_folder(partial)
  local strategy = (kind == "mbwq" or kind == "mpq") and quantized or nil
  local ok, message = pcall(write_folder, partial, list, values, o, o.tokenizer or model.folder, strategy)
  if not ok then
    files.remove_folder(partial)
    error(message, 0)
  end
  local old = folder .. ".old"
  if there then files.rename_folder(folder, old) end
  files.rename_folder(partial, folder)
  if there then files.remove_folder(old) end
  return folder
end

return M
