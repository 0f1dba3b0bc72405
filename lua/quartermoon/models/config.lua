---config.json of a Hugging Face folder, of both generations: checked, and turned into a model's own
---configuration. Nothing in it is trusted: a key that the family's code in transformers reads and ours
---cannot follow is refused by its name; keys that no code reads pass through, for `save` to write back.
---
---Sources: the configuration classes of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
---5 (`rope_parameters`, `dtype`), whose defaults hold where a key is missing.

local cjson = require("cjson")
local check = require("quartermoon.check")
local families = require("quartermoon.models.families")
local files = require("quartermoon.files")
local raise = require("quartermoon.ffi").raise

local M = {}

local INTEGER_MAX, LAYERS_MAX = 2 ^ 31 - 1, 2 ^ 16

---@class qm.models.Reader  values of one JSON object by key; a wrong one raises with file and key
---@field values table
---@field where string      the file
local Reader = {}
Reader.__index = Reader

local function reader(where, values, prefix) return setmetatable({ where = where, values = values,
  prefix = prefix or "" }, Reader) end

local function describe(value)
  if value == cjson.null then return "null" end
  if type(value) == "table" then return #value > 0 and "a list" or "an object" end
  return check.describe(value)
end

function Reader:fail(key, expected, value)
  raise(("%s: key '%s%s': expected %s, got %s"):format(self.where, self.prefix, key, expected, describe(value)))
end

---The value of a key; nil where it is missing or null.
function Reader:get(key)
  local value = self.values[key]
  if value == cjson.null then return nil end
  return value
end

---A whole number. @param default integer|nil  where the key is missing; without one it must be there
function Reader:integer(key, default, min, max)
  local value = self:get(key)
  if value == nil then value = default end
  min, max = min or 1, max or INTEGER_MAX
  if type(value) ~= "number" or value % 1 ~= 0 or value < min or value > max then
    self:fail(key, ("an integer from %d to %.0f"):format(min, max), self.values[key])
  end
  return value
end

---The same where null or nothing at all means "none".
function Reader:optional_integer(key, min, max)
  if self:get(key) ~= nil then return self:integer(key, nil, min, max) end
end

function Reader:number(key, default, min, max)
  local value = self:get(key)
  if value == nil then value = default end
  if type(value) ~= "number" or value ~= value or value < min or value > (max or math.huge) or value == math.huge then
    self:fail(key, max and ("a number from %g to %g"):format(min, max) or ("a number of at least %g"):format(min),
      self.values[key])
  end
  return value
end

function Reader:boolean(key, default)
  local value = self:get(key)
  if value == nil then return default end
  if type(value) ~= "boolean" then self:fail(key, "true or false", value) end
  return value
end

function Reader:one_of(key, default, choices)
  local value = self:get(key)
  if value == nil then value = default end
  for _, choice in ipairs(choices) do if value == choice then return value end end
  self:fail(key, (#choices > 1 and "one of '" or "'") .. table.concat(choices, "', '") .. "'", self.values[key])
end

---------------------------------------------------------------------------------------------------
-- Rotary positions
---------------------------------------------------------------------------------------------------

local ROPE_KEYS = { default = {}, linear = { "factor" },
  llama3 = { "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings" } }

---Base and scaling of the rotations, from whichever generation's keys are there.
local function rope_of(keys, default_theta, positions)
  local theta = keys:number("rope_theta", default_theta, 1)
  local key = keys:get("rope_parameters") ~= nil and "rope_parameters" or "rope_scaling"
  local values = keys:get(key)
  if values == nil then return theta, nil end
  if type(values) ~= "table" then keys:fail(key, "an object", values) end
  local rope = reader(keys.where, values, key .. ".")
  if rope:get("full_attention") ~= nil or rope:get("sliding_attention") ~= nil then
    rope:fail(rope:get("full_attention") ~= nil and "full_attention" or "sliding_attention",
      "one set of rotations for all layers", values.full_attention or values.sliding_attention)
  end
  local type_key = rope:get("rope_type") ~= nil and "rope_type" or "type"
  local kind = rope:one_of(type_key, "default", { "default", "linear", "llama3" })
  theta = rope:number("rope_theta", theta, 1)
  if rope:number("partial_rotary_factor", 1, 0, 1) ~= 1 then
    rope:fail("partial_rotary_factor", "1", values.partial_rotary_factor)
  end
  if kind == "default" then return theta, nil end
  local scaling = { rope_type = kind }
  for _, name in ipairs(ROPE_KEYS[kind]) do
    if name == "original_max_position_embeddings" then
      scaling[name] = rope:integer(name, positions)
    else
      scaling[name] = rope:number(name, nil, name == "factor" and 1 or 0)
    end
  end
  if kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor then
    rope:fail("high_freq_factor", "a number above low_freq_factor", scaling.high_freq_factor)
  end
  return theta, scaling
end

---------------------------------------------------------------------------------------------------
-- Families
---------------------------------------------------------------------------------------------------

---Which layers have a window: "full_attention" and "sliding_attention" by layer.
local function layer_types_of(keys, family, layers, window)
  local given = keys:get("layer_types")
  local types = {}
  if given ~= nil and family.layer_types then
    if type(given) ~= "table" or #given ~= layers then
      keys:fail("layer_types", ("a list of %d names, one for each layer"):format(layers), given)
    end
    local list = reader(keys.where, given, "layer_types.")
    for i = 1, layers do types[i] = list:one_of(i, nil, { "full_attention", "sliding_attention" }) end
  else
    local first = family.window_from and keys:integer("max_window_layers", family.defaults.max_window_layers, 0) or 0
    for i = 1, layers do
      types[i] = window > 0 and i > first and "sliding_attention" or "full_attention"
    end
  end
  if window == 0 then
    for i = 1, layers do
      if types[i] == "sliding_attention" then
        keys:fail("sliding_window", "a window, as layer_types names sliding_attention", keys.values.sliding_window)
      end
    end
  end
  return types
end

---The window of a family that has one; 0: none.
local function window_of(keys, family)
  if not family.window then return 0 end
  if family.window == "use_sliding_window" and not keys:boolean("use_sliding_window", false) then return 0 end
  -- A missing key means the family's default, null means none.
  if keys.values.sliding_window == nil then return family.defaults.sliding_window end
  return keys:optional_integer("sliding_window") or 0
end

---A property that a family has always, never, or as a key says.
local function flag(keys, rule)
  if type(rule) == "boolean" or rule == nil then return rule or false end
  return keys:boolean(rule, false)
end

local function llama_like(keys, family)
  local default, config = family.defaults, {}
  for _, key in ipairs({ "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings" }) do
    config[key] = keys:integer(key, default[key], 1, key == "num_hidden_layers" and LAYERS_MAX or nil)
  end
  local heads = config.num_attention_heads
  if keys.values.num_key_value_heads == nil then
    config.num_key_value_heads = default.num_key_value_heads or heads
  else
    config.num_key_value_heads = keys:optional_integer("num_key_value_heads") or heads
  end
  if heads % config.num_key_value_heads ~= 0 then
    keys:fail("num_key_value_heads", "a divisor of num_attention_heads=" .. heads, config.num_key_value_heads)
  end
  config.head_dim = keys:optional_integer("head_dim", 2, 2 ^ 16)
    or keys.values.head_dim == nil and default.head_dim or config.hidden_size / heads
  if config.head_dim % 2 ~= 0 then
    keys:fail(keys:get("head_dim") and "head_dim" or "num_attention_heads", "heads of an even size", config.head_dim)
  end
  keys:one_of("hidden_act", "silu", { "silu", "swish" })
  config.rms_norm_eps = keys:number("rms_norm_eps", 1e-6, 0)
  config.initializer_range = keys:number("initializer_range", 0.02, 0)
  config.tie_word_embeddings = keys:boolean("tie_word_embeddings", false)
  config.pad_token_id = keys:optional_integer("pad_token_id", -1)
  if config.pad_token_id and (config.pad_token_id < 0 or config.pad_token_id >= config.vocab_size) then
    config.pad_token_id = nil
  end
  config.attention_bias, config.output_bias = flag(keys, family.attention_bias), flag(keys, family.output_bias)
  config.mlp_bias, config.qk_norm = flag(keys, family.mlp_bias), flag(keys, family.qk_norm)
  config.rope_theta, config.rope_scaling = rope_of(keys, default.rope_theta, config.max_position_embeddings)
  config.sliding_window = window_of(keys, family)
  config.layer_types = layer_types_of(keys, family, config.num_hidden_layers, config.sliding_window)
  return config
end

local function gpt2_like(keys, family)
  local default, config = family.defaults, {}
  for _, key in ipairs({ "vocab_size", "n_embd", "n_layer", "n_head", "n_positions" }) do
    config[key] = keys:integer(key, default[key], 1, key == "n_layer" and LAYERS_MAX or nil)
  end
  config.n_inner = keys:optional_integer("n_inner")
  if config.n_embd % config.n_head ~= 0 then
    keys:fail("n_head", "a divisor of n_embd=" .. config.n_embd, config.n_head)
  end
  config.activation_function = keys:one_of("activation_function", "gelu_new",
    require("quartermoon.models.gpt2").ACTIVATIONS)
  config.layer_norm_epsilon = keys:number("layer_norm_epsilon", 1e-5, 0)
  config.initializer_range = keys:number("initializer_range", 0.02, 0)
  config.tie_word_embeddings = keys:boolean("tie_word_embeddings", true)
  config.scale_attn_weights = keys:boolean("scale_attn_weights", true)
  config.scale_attn_by_inverse_layer_idx = keys:boolean("scale_attn_by_inverse_layer_idx", false)
  if keys:boolean("add_cross_attention", false) then keys:fail("add_cross_attention", "false", true) end
  return config
end

local KINDS = { llama = llama_like, gpt2 = gpt2_like }

---The family of a configuration: by model_type, or else by architectures.
local function family_of(keys)
  local named = keys:get("architectures")
  if named ~= nil and (type(named) ~= "table" or type(named[1]) ~= "string") then
    keys:fail("architectures", "a list of names", named)
  end
  local name = keys:get("model_type")
  for family_name, family in pairs(families.list) do
    if name == nil and named and (named[1] == family.architecture) then name = family_name end
  end
  local family = families.list[name]
  if not family then
    keys:fail(name == nil and "architectures" or "model_type", "one of " .. table.concat(families.names, ", "),
      name or named and named[1])
  end
  local base = family.architecture:gsub("ForCausalLM$", "Model"):gsub("LMHeadModel$", "Model")
  if named and named[1] ~= family.architecture and named[1] ~= base then
    keys:fail("architectures", "'" .. family.architecture .. "'", named[1])
  end
  return name, family
end

local DTYPES = { float32 = "f32", float16 = "f16", bfloat16 = "bf16" }

---------------------------------------------------------------------------------------------------
-- Files
---------------------------------------------------------------------------------------------------

---A JSON file's object and its reader. @return table|nil  nil where the file is missing and may be
local function open(name, path, may_be_missing)
  if may_be_missing and not files.exists(path) then return nil end
  local value = files.assert(name, files.read_json(path))
  if type(value) ~= "table" or #value > 0 then raise(("%s: %s: expected a JSON object"):format(name, path)) end
  return reader(name .. ": " .. path, value)
end

local GENERATION_NUMBERS = { temperature = 0, top_p = 0, min_p = 0, repetition_penalty = 0 }
local GENERATION_INTEGERS = { top_k = 0, max_new_tokens = 0, max_length = 0, bos_token_id = 0, pad_token_id = -1 }

---What generation_config.json asks for; a list of end tokens in any case.
local function read_generation(name, folder, keys)
  local from = open(name, folder .. "/generation_config.json", true)
  local generation = {}
  if from then
    for key, min in pairs(GENERATION_NUMBERS) do
      if from:get(key) ~= nil then generation[key] = from:number(key, nil, min) end
    end
    for key, min in pairs(GENERATION_INTEGERS) do
      if from:get(key) ~= nil then generation[key] = from:integer(key, nil, min) end
    end
    if from:get("do_sample") ~= nil then generation.do_sample = from:boolean("do_sample") end
  end
  if not (from and from:get("eos_token_id") ~= nil) then from = keys end
  local ends = from:get("eos_token_id")
  if type(ends) == "number" then ends = { ends } end
  generation.eos_token_id = {}
  if ends ~= nil and type(ends) ~= "table" then from:fail("eos_token_id", "a token number or a list of them", ends) end
  for i, token in ipairs(ends or {}) do
    generation.eos_token_id[i] = reader(from.where, { eos_token_id = token }):integer("eos_token_id", nil, 0)
  end
  return generation
end

---A model's configuration, from the values of a config.json.
---@param where string  the file, for errors
function M.parse(where, values)
  local keys = reader(where, values)
  local _, family = family_of(keys)
  return KINDS[family.kind](keys, family)
end

---Read a folder's configuration.
---@param name string  whose errors these are
---@param folder string
---@return table config { family = "qwen2", kind = "llama" (which model class), model = its configuration,
---   values = config.json as it stands, dtype = "f32", "f16", "bf16" or nil, generation = generation_config's
---   settings, eos_token_id a list, quantization = qm.models.Reader of quantization_config or nil }
---@raise naming the file and the key
function M.read(name, folder)
  local path = folder .. "/config.json"
  local keys = open(name, path)
  local family_name, family = family_of(keys)
  local model = KINDS[family.kind](keys, family)
  local dtype_key = keys:get("dtype") ~= nil and "dtype" or "torch_dtype"
  local dtype = keys:get(dtype_key)
  if dtype ~= nil and type(dtype) ~= "string" then keys:fail(dtype_key, "a name", dtype) end
  local config = { family = family_name, kind = family.kind, model = model,
    values = keys.values, path = path, dtype = dtype and DTYPES[dtype:gsub("^torch%.", "")],
    generation = read_generation(name, folder, keys) }
  local quantization = keys:get("quantization_config")
  if quantization ~= nil then
    if type(quantization) ~= "table" then keys:fail("quantization_config", "an object", quantization) end
    config.quantization = reader(keys.where, quantization, "quantization_config.")
  else
    config.quantization = open(name, folder .. "/quantize_config.json", true)
  end
  return config
end

return M
