---config.json of a model that is saved: what its folder had, or what a fresh model's would be.

local cjson = require("cjson")
local configs = require("quartermoon.models.config")
local families = require("quartermoon.models.families")
local raise = require("quartermoon.ffi").raise
local words = require("quartermoon.qparam_words")

local M = {}

local NAMES = { f32 = "float32", f16 = "float16", bf16 = "bfloat16" }

local function copy(value)
  if type(value) ~= "table" then return value end
  local result = {}
  for key, member in pairs(value) do
    -- Readers of JSON cannot tell an empty list from an empty object, so neither is written.
    if not (type(member) == "table" and next(member) == nil) then result[key] = copy(member) end
  end
  return result
end

local LLAMA_KEYS = { "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
  "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
  "initializer_range", "pad_token_id" }
local GPT2_KEYS = { "vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner", "layer_norm_epsilon",
  "activation_function", "initializer_range", "tie_word_embeddings", "scale_attn_weights",
  "scale_attn_by_inverse_layer_idx" }

---The values of a model that came from no folder.
local function fresh_values(model)
  local config, kind = model.config, model.class_name == "GPT2" and "gpt2" or "llama"
  local family_name = families.of(kind, config)
  local family = families.list[family_name]
  local values = { model_type = family_name, architectures = { family.architecture },
    bos_token_id = cjson.null, eos_token_id = cjson.null }
  for _, key in ipairs(kind == "gpt2" and GPT2_KEYS or LLAMA_KEYS) do values[key] = config[key] end
  if kind == "gpt2" then return values end
  values.hidden_act = "silu"
  values.rope_scaling = config.rope_scaling and copy(config.rope_scaling) or cjson.null
  if type(family.attention_bias) == "string" then values.attention_bias = config.attention_bias end
  if family.mlp_bias then values.mlp_bias = config.mlp_bias end
  if family.window == "use_sliding_window" then values.use_sliding_window = config.sliding_window > 0 end
  if family.window then values.sliding_window = config.sliding_window > 0 and config.sliding_window or cjson.null end
  if family.layer_types and config.sliding_window > 0 then
    values.layer_types, values.max_window_layers = {}, 0
    for i = 1, config.num_hidden_layers do
      values.layer_types[i] = config.layer_types and config.layer_types[i] or "sliding_attention"
    end
  end
  return values
end

---Do two configurations mean the same model?
local function difference(ours, read)
  for key, value in pairs(read) do
    local own = ours[key]
    if type(value) == "table" then
      if key == "rope_scaling" then
        local key_inside = difference(own or {}, value)
        if key_inside then return key .. "." .. key_inside end
      elseif key == "layer_types" then
        for i, kind in ipairs(value) do
          local here = own and own[i] or (ours.sliding_window or 0) > 0 and "sliding_attention" or "full_attention"
          if here ~= kind then return key end
        end
      end
    elseif own ~= value then
      return key
    end
  end
end

---The values of config.json, without what depends on the format.
---@param name string  whose errors these are
---@param dtype string "f32", "f16" or "bf16", of the dense weights
function M.values(name, model, dtype)
  local values = model.published and copy(model.published) or fresh_values(model)
  if not model.published then
    local key = difference(model.config, configs.parse(name, values))
    if key then
      raise(("%s: no published family of models has this configuration: a %s would be other in key '%s'"):format(name,
        values.model_type, key))
    end
  end
  if values.dtype ~= nil then values.dtype = NAMES[dtype] end
  if values.torch_dtype ~= nil or values.dtype == nil then values.torch_dtype = NAMES[dtype] end
  values.quantization_config = nil
  return values
end

---------------------------------------------------------------------------------------------------

---A path as a pattern that fits nothing else.
local function pattern(path) return "^" .. path:gsub("%.", "\\.") .. "$" end

---Do all of a parameter's zero points lie in the middle of its codes?
function M.is_symmetric(q)
  local counts = words.count_fields(q.zeros, q.w_bit)
  local fields = q.zeros:count() * 32 / q.w_bit
  return counts[2 ^ (q.w_bit - 1) - q.zero_offset] == fields
end

local function size_of(q) return q.group_size >= q.shape[1] and -1 or q.group_size end

---Does a grid mean the parameter's own? A group of all rows is one of any size from there on, too.
local function is_of(q, grid)
  local size = size_of(q)
  return q.w_bit == grid.bits and (size == grid.group_size or size == -1 and grid.group_size >= q.shape[1])
end

---The grid that most parameters have, which the configuration names; the others are exceptions.
local function common_grid(entries)
  local best, most = nil, 0
  for _, entry in ipairs(entries) do
    local grid, count = { bits = entry.param.w_bit, group_size = size_of(entry.param) }, 0
    for _, other in ipairs(entries) do count = count + (is_of(other.param, grid) and 1 or 0) end
    if count > most then best, most = grid, count end
  end
  return best
end

-- Layers that vLLM makes one, and knows by that one's name.
local FUSED = { qkv_proj = { "q_proj", "k_proj", "v_proj" }, gate_up_proj = { "gate_proj", "up_proj" } }

---The exceptions of a GPTQ folder, by patterns of names. Layers that vLLM fuses are one too, if they agree.
---@param exceptions table  path to { sign = "+:" another grid or "-:" dense, bits =, group_size = }
---@return table|nil rules
local function rules_of(exceptions)
  local rules = {}
  local function add(path, e) rules[e.sign .. pattern(path)] = { bits = e.bits, group_size = e.group_size } end
  for path, e in pairs(exceptions) do
    add(path, e)
    for fused, parts in pairs(FUSED) do
      local parent, agreed = path:match("^(.*%.)" .. parts[1] .. "$"), true
      for _, part in ipairs(parent and parts or {}) do
        local other = exceptions[parent .. part]
        agreed = agreed and other and other.sign == e.sign and other.bits == e.bits
          and other.group_size == e.group_size
      end
      if parent and agreed then add(parent .. fused, e) end
    end
  end
  return next(rules) and rules or nil
end

---quantization_config of a GPTQ folder.
---@param entries table[]   quantized parameters, of published.parameters
---@param left_dense string[]  paths of linear layers of the blocks that are not quantized
---@param checkpoint_format string
function M.gptq(entries, left_dense, checkpoint_format)
  local common, sym, desc_act, exceptions = common_grid(entries), true, false, {}
  local lm_head = false
  for _, entry in ipairs(entries) do
    local q = entry.param
    if not is_of(q, common) then
      exceptions[entry.path] = { sign = "+:", bits = q.w_bit, group_size = size_of(q) }
    end
    sym, desc_act = sym and M.is_symmetric(q), desc_act or q.g_idx ~= nil
    lm_head = lm_head or entry.path == "lm_head"
  end
  for _, path in ipairs(left_dense) do exceptions[path] = { sign = "-:", bits = common.bits } end
  return { quant_method = "gptq", bits = common.bits, group_size = common.group_size, desc_act = desc_act, sym = sym,
    checkpoint_format = checkpoint_format, pack_dtype = "int32", lm_head = lm_head, true_sequential = true,
    static_groups = false, dynamic = rules_of(exceptions),
    meta = { quantizer = { "quartermoon:" .. require("quartermoon").VERSION } } }
end

---quantization_config of an AWQ folder, which has one group size for all.
---@param name string  whose errors these are
---@param left_dense string[]  as above
function M.awq(name, entries, left_dense)
  local common = common_grid(entries)
  for _, entry in ipairs(entries) do
    if not is_of(entry.param, common) then
      raise(("%s: tensor '%s': groups of %d beside groups of %d, and AWQ's configuration has one size for all"):format(
        name, entry.path, entry.param.group_size, common.group_size))
    end
  end
  return { quant_method = "awq", bits = 4, group_size = common.group_size, zero_point = true, version = "gemm",
    modules_to_not_convert = #left_dense > 0 and left_dense or nil }
end

return M
