---A Llama-style decoder: RMSNorm, rotary positions, grouped heads, SwiGLU. Mistral, Qwen 2 and Qwen 3 are
---the same with other settings (see models/config.lua). Configurations and parameter names are those of
---Hugging Face's folders; weights lie [inputs, outputs] here, transposed.
---
---    local model = qm.models.llama.new({ vocab_size = 256, hidden_size = 128, intermediate_size = 384,
---      num_hidden_layers = 3, num_attention_heads = 4 }, { linear = { kind = "mpq", w_bit = 4 } })
---    model:loss(tokens, targets):backward()

local check = require("quartermoon.check")
local decoder = require("quartermoon.models.decoder")
local module = require("quartermoon.nn.module")
local nn = require("quartermoon.nn")
local qm = require("quartermoon")

local M = {}

---@class qm.models.Llama : qm.models.Decoder
local Llama = decoder.class("Llama")
M.Llama = Llama
local decoder_free = Llama.free

local CONFIG = { vocab_size = check.required, hidden_size = check.required, intermediate_size = check.required,
  num_hidden_layers = check.required, num_attention_heads = check.required, num_key_value_heads = check.optional,
  head_dim = check.optional, rms_norm_eps = 1e-5, rope_theta = 10000, max_position_embeddings = 2048,
  rope_scaling = check.optional, tie_word_embeddings = false, attention_bias = false, output_bias = false,
  mlp_bias = false, qk_norm = false, sliding_window = 0, layer_types = check.optional, pad_token_id = check.optional,
  initializer_range = 0.02 }
local LAYER_TYPES = { "full_attention", "sliding_attention" }

local function check_config(name, config)
  config = check.options(name, config, CONFIG)
  for _, key in ipairs({ "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings" }) do
    check.integer(name, key, config[key], 1, 2 ^ 31 - 1)
  end
  config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
  check.integer(name, "num_key_value_heads", config.num_key_value_heads, 1)
  config.head_dim = config.head_dim or config.hidden_size / config.num_attention_heads
  check.integer(name, "head_dim", config.head_dim, 2)
  check.integer(name, "sliding_window", config.sliding_window, 0, 2 ^ 31 - 1)
  if config.pad_token_id then check.integer(name, "pad_token_id", config.pad_token_id, 0, config.vocab_size - 1) end
  if config.layer_types then
    check.type(name, "layer_types", config.layer_types, "table")
    for i = 1, config.num_hidden_layers do
      check.one_of(name, ("layer_types[%d]"):format(i), config.layer_types[i], LAYER_TYPES)
    end
  end
  return config
end

---How many keys back a layer sees; 0: all.
local function window_of(config, layer)
  if config.layer_types and config.layer_types[layer] ~= "sliding_attention" then return 0 end
  return config.sliding_window
end

---The decoder without its head, so that parameter paths begin with "model." as published ones do.
local Decoder = nn.class("Decoder")

local function new_decoder(config, linear, activations, more)
  local self = nn.create(Decoder)
  self:register("embed_tokens", nn.Embedding.new(config.vocab_size, config.hidden_size, {
    std = config.initializer_range, activations = activations, padding = config.pad_token_id, device = more.device,
    generator = more.generator }))
  local blocks = self:register("layers", nn.List.new())
  for i = 1, config.num_hidden_layers do
    blocks:append(nn.Block.new({ hidden_size = config.hidden_size, eps = config.rms_norm_eps, device = more.device,
      attention = { hidden_size = config.hidden_size, heads = config.num_attention_heads,
        kv_heads = config.num_key_value_heads, head_size = config.head_dim, linear = linear,
        bias = config.attention_bias, output_bias = config.output_bias, qk_norm = config.qk_norm,
        eps = config.rms_norm_eps, window = window_of(config, i), device = more.device, generator = more.generator },
      mlp = { hidden_size = config.hidden_size, intermediate_size = config.intermediate_size, linear = linear,
        bias = config.mlp_bias, recompute = more.recompute == "selective", device = more.device,
        generator = more.generator } }))
  end
  self:register("norm", nn.RMSNorm.new(config.hidden_size, { eps = config.rms_norm_eps, device = more.device }))
  return self
end

---A fresh model.
---@param config table  Hugging Face's names: vocab_size, hidden_size, intermediate_size, num_hidden_layers,
---   num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps = 1e-5, rope_theta = 10000,
---   max_position_embeddings = 2048, rope_scaling = nil (see qm.rope_tables), tie_word_embeddings = false;
---   also attention_bias = false (of q, k, v: Qwen 2), output_bias = false, mlp_bias = false, qk_norm = false
---   (Qwen 3), sliding_window = 0 (Mistral), layer_types = nil (a list of "full_attention" and
---   "sliding_attention"; without it the window holds everywhere), pad_token_id = nil (its embedding gets no
---   gradient), initializer_range = 0.02
---@param options table|nil  { dtype = "auto" ("f32", "bf16": of activations; auto: bf16 where the device
---   is fast at it), linear = { kind = "mpq", w_bit = 4, group_size = 64, ... } or { kind = "dense" },
---   checkpoint = false (true: blocks recompute in backward instead of storing; "selective": only what costs
---   next to nothing, the products within feed-forward layers), positions = max_position_embeddings
---   (fewer spare memory: their rotations are kept), device, generator }
---@return qm.models.Llama
function M.new(config, options)
  local name = "qm.models.llama.new"
  config = check_config(name, config)
  local known = { positions = config.max_position_embeddings }
  for key, value in pairs(decoder.OPTIONS) do known[key] = value end
  options = check.options(name, options, known)
  local self, linear, more = decoder.begin(name, Llama, config, options)
  self.positions_max = check.integer(name, "positions", options.positions, 1, config.max_position_embeddings)
  self.cache_heads = { layers = config.num_hidden_layers, heads = config.num_key_value_heads,
    head_size = config.head_dim }
  self:register("model", new_decoder(config, linear, self.dtype, more))
  if not config.tie_word_embeddings then
    self:register("lm_head", nn.Linear.new(config.hidden_size, config.vocab_size, {
      std = config.initializer_range, device = more.device, generator = more.generator }))
  end
  if not module.is_declaring() then self:complete() end
  return self
end

---Once the weights are there: note which one the head shares with the embedding, and make the rotations.
function Llama:complete()
  local config = self.config
  self.tied_weight = self.model.embed_tokens.weight
  self.cos, self.sin = qm.rope_tables(config.head_dim, self.positions_max, config.rope_theta,
    { device = self.device, scaling = config.rope_scaling })
  self.cos:keep()
  self.sin:keep()
end

---Published folders put this before the decoder's names, and have a linear layer's weight [outputs, inputs].
Llama.base_prefix = "model."
function Llama.stores_transposed() return true end

function Llama:hidden_states(tokens, context, cache)
  check.type("model:hidden_states", "context", context, "table")
  context.cos, context.sin = self.cos, self.sin
  local x, residual = decoder.run_blocks(self, self.model.layers, self.model.embed_tokens(tokens), nil, context, cache)
  return (self.model.norm(x, residual))
end

---Release weights, tables and positions.
function Llama:free()
  decoder_free(self)
  if not self.cos then return end
  self.cos:free()
  self.sin:free()
end

function Llama:summary()
  return ("%d layers of %d, %s activations"):format(self.config.num_hidden_layers, self.config.hidden_size, self.dtype)
end

check.methods("qm.models.Llama", Llama, { stores_transposed = true })

return M
