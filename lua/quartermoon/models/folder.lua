---Model folders as the Hugging Face hub has them: config.json, weights in safetensors, tokenizer files.
---
---    local model = qm.models.load("Llama-3.2-1B", { device = "cuda" })
---    model:save("tuned")

local check = require("quartermoon.check")
local configs = require("quartermoon.models.config")
local devices = require("quartermoon.device")
local module = require("quartermoon.nn.module")
local nn = require("quartermoon.nn")
local qm = require("quartermoon")
local quant_strategy = require("quartermoon.models.quant_strategy")
local quantized = require("quartermoon.models.quantized")
local raise = require("quartermoon.ffi").raise
local weights = require("quartermoon.models.weights")

local M = {}

local IS_FLOAT = { f32 = true, f16 = true, bf16 = true }
local POSITIONS_MAX = 2 ^ 22 -- the rotations of more take gigabytes; who has such a model says how many

---A dense tensor as we keep it.
---@param load table  see M.load
---@param turned boolean  stored [N, K] where we have [K, N]
---@param dtype string|nil  nil: as it is stored
local function dense(load, key, shape, turned, dtype)
  local source = load.source
  local stored_type = source:expect(load.name, key, turned and { shape[2], shape[1] } or shape)
  if not IS_FLOAT[stored_type] then
    raise(("%s: %s: tensor '%s': expected f32, f16 or bf16, got %s"):format(load.name, source.folder, key, stored_type))
  end
  local x = source:tensor(key, load.device)
  local function replace(y)
    x:free()
    x = y
  end
  if turned then replace(x:transpose()) end
  if dtype and x.dtype ~= dtype then replace(x:to(dtype)) end
  if load.device:memory().cached_bytes > 2 ^ 27 then load.device:empty_cache() end
  return x
end

---A layer's bias that config.json does not know: quantizers write zeros.
local function skip_zero_bias(load, path)
  local key = path .. ".bias"
  if not load.source:has(key) then return end
  local bias = load.source:tensor(key, load.device)
  if not quantized.all_zero(bias) then load.source.used[load.source:stored(key)] = nil end
  bias:free()
end

---A linear layer's quantized weight from a folder that has it so.
---@return qm.Module  what stands in the layer's place
local function fill_quantized(load, layer, path, kind, declared)
  local q, note = quantized.parameter(load.name, load.source, path, kind, load.quantization, declared.weight.shape,
    load.device)
  load.quantized_count = load.quantized_count + 1
  if note then load.notes[note] = (load.notes[note] or 0) + 1 end
  local bias = declared.bias and dense(load, path .. ".bias", declared.bias.shape, false, "f32"):requires_gradient()
  if not bias then skip_zero_bias(load, path) end
  if not load.linear then return nn.QLinear.from(q, bias) end
  local w = q:dequantize("f32")
  q:free()
  if declared.weight.quantize then
    local again = qm.QParam.quantize(w, declared.weight.quantize)
    w:free()
    return nn.QLinear.from(again, bias)
  end
  layer:register("weight", w:requires_gradient())
  if bias then layer:register("bias", bias) end
  return layer
end

local function is_linear(layer) return getmetatable(layer) == nn.Linear or getmetatable(layer) == nn.QLinear end

---Give a layer what it declared. @return qm.Module|nil  another layer in its place
local function fill_layer(load, layer, path)
  local declared = {}
  for _, entry in ipairs(layer.declared) do declared[entry.name] = entry end
  local kind = is_linear(layer) and quantized.kind_of(load.source, path, load.quantization.kind)
  layer.declared = nil
  if kind then return fill_quantized(load, layer, path, kind, declared) end
  for _, name in ipairs({ "weight", "bias" }) do
    local entry = declared[name]
    if entry then
      local turned = name == "weight" and is_linear(layer) and load.model.stores_transposed(path)
      local dtype = #entry.shape == 2 and (load.weights or entry.dtype) or "f32"
      local x = dense(load, path .. "." .. name, entry.shape, turned, not entry.quantize and dtype or nil)
      if entry.quantize then
        local ok, q = pcall(qm.QParam.quantize, x, entry.quantize)
        x:free()
        if not ok then raise(("%s: %s: tensor '%s.weight': %s"):format(load.name, load.source.folder, path, q)) end
        q.requires_grad = true
        layer:register(name, q)
      else
        layer:register(name, x:requires_gradient())
      end
    end
  end
end

local function fill(load, parent, prefix)
  for _, name in ipairs(parent.members) do
    local child = parent[name]
    if module.is_module(child) then
      local path = prefix .. name
      if child.declared then
        local other = fill_layer(load, child, path)
        if other then rawset(parent, name, other) end
      end
      fill(load, parent[name], path .. ".")
    end
  end
end

---Tensors of old folders that are no weights: masks, rotations, a head that is the embedding's.
local function harmless(model, source)
  return function(key)
    return key:find("rotary_emb%.inv_freq$") ~= nil or key:find("%.attn%.bias$") ~= nil
      or key:find("%.attn%.masked_bias$") ~= nil or key == "lm_head.weight" and not model.lm_head
      or key:find("^h%.%d+%.attn%.bias$") ~= nil and source.short ~= nil
  end
end

---The sizes that only looking at the files can bound.
local function check_sizes(name, config, source, options)
  local layers_key = config.kind == "gpt2" and "n_layer" or "num_hidden_layers"
  if config.model[layers_key] > #source.names then
    raise(("%s: %s: key '%s': the files hold %d tensors, too few for %d layers"):format(name, config.path, layers_key,
      #source.names, config.model[layers_key]))
  end
  local positions_key = config.kind == "gpt2" and "n_positions" or "max_position_embeddings"
  local positions = config.model[positions_key]
  if positions > POSITIONS_MAX and not options.positions then
    raise(("%s: %s: key '%s': %d positions; say with the option 'positions' how many are needed"):format(name,
      config.path, positions_key, positions))
  end
end

local OPTIONS = { device = check.optional, dtype = "auto", linear = check.optional, weights = check.optional,
  checkpoint = false, positions = check.optional, on_note = check.optional }

local function build(load, config, options)
  local class = require("quartermoon.models." .. config.kind)
  check_sizes(load.name, config, load.source, options)
  local of_class = { dtype = options.dtype, device = load.device, checkpoint = options.checkpoint,
    linear = options.linear or { kind = "dense" } }
  if config.kind == "llama" then of_class.positions = options.positions end
  local model = module.declare(function() return class.new(config.model, of_class) end)
  load.model = model
  load.source:alias(model.base_prefix, config.kind == "gpt2" and "wte.weight" or "embed_tokens.weight")
  fill(load, model, "")
  model:complete()
  if config.quantization and load.quantized_count == 0 then
    config.quantization:fail("quant_method", "a folder without it, as no weight there is quantized",
      config.quantization:get("quant_method"))
  end
  load.source:refuse_unused(load.name, harmless(model, load.source))
  model.family, model.folder, model.published = config.family, load.source.folder, config.values
  model.generation_config, model.stored_dtype = config.generation, config.dtype
  return model
end

---Read a model folder. Every tensor goes to the device by itself: the host holds one piece of a file at a
---time, and nothing in the folder is executed or trusted.
---@param folder string  with config.json and model.safetensors, or shards and their index
---@param options table|nil  { device = default, dtype = "auto" ("f32", "bf16": of activations),
---   linear = as the folder has its linear layers (quantized ones stay so); or { kind = "dense" }, or
---   { kind = "mpq", w_bit = 4, group_size = 64, ... } to quantize while reading,
---   weights = "f32", "bf16" or "auto" (of dense matrices; default f32; auto: bf16 of a folder of bf16),
---   checkpoint = false,
---   positions = as many as config.json says (fewer spare memory), on_note = function(text): is told what
---   was decided where config and data left a choice; default: standard error is }
---@return qm.models.Decoder model  with family, generation_config (eos_token_id a list ...), published,
---   config.json's values, and stored_dtype, "f32", "f16", "bf16" or nil, as these say; notes: what was decided
---   while reading
---@raise naming file, tensor or key, and the reason
function M.load(folder, options)
  local name = "qm.models.load"
  check.type(name, "folder", folder, "string")
  options = check.options(name, options, OPTIONS)
  if options.weights then check.one_of(name, "weights", options.weights, { "f32", "bf16", "auto" }) end
  local say = options.on_note or function(note) io.stderr:write(folder, ": ", note, "\n") end
  check.type(name, "on_note", say, "function")
  folder = folder:match("^(.-)/*$")
  local config = configs.read(name, folder)
  local kept = options.weights
  if kept == "auto" then kept = config.dtype == "bf16" and "bf16" or "f32" end
  local load = { name = name, device = devices.resolve(name, options.device), linear = options.linear,
    weights = kept, notes = {}, quantized_count = 0,
    quantization = quantized.read(config.quantization, quant_strategy.read(name, folder)) }
  load.source = weights.open(name, folder)
  local ok, model = pcall(qm.no_grad, build, load, config, options)
  load.source:close()
  load.device:empty_cache()
  if not ok then
    if load.model then load.model:free() end
    error(model, 0)
  end
  model.notes = {}
  for note in pairs(load.notes) do
    model.notes[#model.notes + 1] = note
    say(note)
  end
  return model
end

return M
