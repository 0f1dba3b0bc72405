---GPT-2: LayerNorm, learned positions, GELU, queries, keys and values from one projection, the embedding
---as head. Configurations and parameter names are those of Hugging Face's GPT-2 folders, whose weights
---lie [inputs, outputs] as ours do.
---
---    local model = qm.models.gpt2.new({ vocab_size = 256, n_embd = 128, n_layer = 3, n_head = 4 },
---      { linear = { kind = "dense" } })
---    model:loss(tokens, targets):backward()
---
---Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

local autograd = require("quartermoon.autograd")
local check = require("quartermoon.check")
local decoder = require("quartermoon.models.decoder")
local nn = require("quartermoon.nn")
local qm = require("quartermoon")

local M = {}

---@class qm.models.GPT2 : qm.models.Decoder
local GPT2 = decoder.class("GPT2")
M.GPT2 = GPT2

local CONFIG = { vocab_size = 50257, n_embd = 768, n_layer = 12, n_head = 12, n_positions = 1024,
  n_inner = check.optional, layer_norm_epsilon = 1e-5, activation_function = "gelu_new", initializer_range = 0.02,
  tie_word_embeddings = true, scale_attn_weights = true, scale_attn_by_inverse_layer_idx = false }
-- Hugging Face's names for forms of qm.gelu.
local ACTIVATIONS = { gelu_new = "tanh", gelu_pytorch_tanh = "tanh", gelu_fast = "tanh", gelu = "none" }
M.ACTIVATIONS = { "gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast" }

local function check_config(name, config)
  config = check.options(name, config, CONFIG)
  config.n_inner = config.n_inner or 4 * config.n_embd
  for _, key in ipairs({ "vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner" }) do
    check.integer(name, key, config[key], 1, 2 ^ 31 - 1)
  end
  check.one_of(name, "activation_function", config.activation_function, M.ACTIVATIONS)
  if config.n_embd % config.n_head ~= 0 then
    check.fail(name, "n_head", "a divisor of n_embd=" .. config.n_embd, config.n_head)
  end
  return config
end

---------------------------------------------------------------------------------------------------

---Causal self-attention whose queries, keys and values one projection makes.
local Attention = nn.class("GPT2Attention")

local function new_attention(config, layer, index)
  local self = nn.create(Attention)
  self.heads, self.head_size = config.n_head, config.n_embd / config.n_head
  local scale = config.scale_attn_weights and 1 / math.sqrt(self.head_size) or 1
  self.settings = { scale = config.scale_attn_by_inverse_layer_idx and scale / index or scale }
  self:register("c_attn", layer(config.n_embd, 3 * config.n_embd))
  self:register("c_proj", layer(config.n_embd, config.n_embd, true))
  return self
end

---Attention through a cache: its keys and values stand apart, so the projection is taken apart first.
local function attend_kept(self, qkv, context, kept)
  local turned = qkv:permute(2, 1, 3)
  local function part(i) return turned:narrow((i - 1) * self.heads + 1, self.heads):permute(2, 1, 3) end
  local k, v = kept:append(part(2), part(3), context.places)
  return qm.attention(part(1), k, v, context.cu_q, context.cu_k, self.settings)
end

function Attention:forward(x, context, kept)
  local rows = x.shape[1]
  local qkv = self.c_attn(x):reshape(rows, 3 * self.heads, self.head_size)
  local out = kept and attend_kept(self, qkv, context, kept)
    or qm.attention_packed(qkv, context.cu_q, self.heads, self.settings)
  return self.c_proj(out:reshape(rows, self.heads * self.head_size))
end

---------------------------------------------------------------------------------------------------

local MLP = nn.class("GPT2MLP")

local function new_mlp(config, layer, recompute)
  local self = nn.create(MLP)
  self.recompute = recompute
  self.form = ACTIVATIONS[config.activation_function]
  self:register("c_fc", layer(config.n_embd, config.n_inner))
  self:register("c_proj", layer(config.n_inner, config.n_embd, true))
  return self
end

---Does calling the layer multiply by a dense weight and nothing else? One that is quantized, or whose forward
---somebody replaced, is to be called.
local function is_plain(layer) return layer.forward == nn.Linear.forward end

function MLP:forward(x)
  local c_fc, c_proj = self.c_fc, self.c_proj
  if self.form == "tanh" and is_plain(c_fc) and is_plain(c_proj) then
    return qm.gelu_mlp(x, c_fc.weight, c_fc.bias, c_proj.weight, c_proj.bias, { recompute = self.recompute })
  end
  local fc = c_fc(x)
  local inner = qm.gelu(fc, self.form)
  local out = c_proj(inner)
  if self.recompute then autograd.forget(inner, qm.gelu, fc, self.form) end
  return out
end

---------------------------------------------------------------------------------------------------

---One pre-norm layer; as nn.Block it leaves adding to the residual stream to the next normalisation.
local Block = nn.class("GPT2Block")

local function new_block(config, layer, norm, index, recompute)
  local self = nn.create(Block)
  self:register("ln_1", norm())
  self:register("attn", new_attention(config, layer, index))
  self:register("ln_2", norm())
  self:register("mlp", new_mlp(config, layer, recompute))
  return self
end

function Block:forward(x, residual, context, kept)
  local normed, stream = self.ln_1(x, residual)
  normed, stream = self.ln_2(self.attn(normed, context, kept), stream)
  return self.mlp(normed), stream
end

---------------------------------------------------------------------------------------------------

---The decoder without its head, so that parameter paths begin with "transformer." as published ones do.
local Transformer = nn.class("Transformer")

local function new_transformer(config, vocab_rows, linear, activations, more)
  local self = nn.create(Transformer)
  local function norm()
    return nn.LayerNorm.new(config.n_embd, { eps = config.layer_norm_epsilon, device = more.device })
  end
  local function table_of(count)
    return nn.Embedding.new(count, config.n_embd, { std = config.initializer_range, activations = activations,
      device = more.device, generator = more.generator })
  end
  -- What adds to the residual stream, 2 n_layer times, starts smaller by the root of that.
  local function layer(inputs, outputs, adds)
    local std = adds and config.initializer_range / math.sqrt(2 * config.n_layer) or config.initializer_range
    return linear(inputs, outputs, { bias = true, std = std, device = more.device, generator = more.generator })
  end
  self:register("wte", table_of(vocab_rows))
  self:register("wpe", table_of(config.n_positions))
  local blocks = self:register("h", nn.List.new())
  for i = 1, config.n_layer do blocks:append(new_block(config, layer, norm, i, more.recompute == "selective")) end
  self:register("ln_f", norm())
  return self
end

---A fresh model.
---@param config table  Hugging Face's names: vocab_size = 50257, n_embd = 768, n_layer = 12, n_head = 12,
---   n_positions = 1024, n_inner = 4 n_embd, layer_norm_epsilon = 1e-5, activation_function = "gelu_new"
---   (GELU's tanh form) or "gelu" (the exact one), initializer_range = 0.02, tie_word_embeddings = true,
---   scale_attn_weights = true, scale_attn_by_inverse_layer_idx = false
---@param options table|nil  { dtype = "auto" ("f32", "bf16": of activations; auto: bf16 where the device
---   is fast at it), linear = { kind = "mpq", w_bit = 4, group_size = 64, ... } or { kind = "dense" },
---   checkpoint = false (true: blocks recompute in backward instead of storing; "selective": only what costs
---   next to nothing, GELU), vocab_multiple = 1 (the embedding's rows are rounded up to a multiple of it, for
---   matrix products like round numbers; rows of no token take part in the loss's softmax, and training turns
---   them away), device, generator }
---@return qm.models.GPT2
function M.new(config, options)
  local name = "qm.models.gpt2.new"
  config = check_config(name, config)
  local known = { vocab_multiple = 1 }
  for key, value in pairs(decoder.OPTIONS) do known[key] = value end
  options = check.options(name, options, known)
  local multiple = check.integer(name, "vocab_multiple", options.vocab_multiple, 1)
  local self, linear, more = decoder.begin(name, GPT2, config, options)
  self.positions_max = config.n_positions
  self.cache_heads = { layers = config.n_layer, heads = config.n_head, head_size = config.n_embd / config.n_head }
  local vocab_rows = math.ceil(config.vocab_size / multiple) * multiple
  self:register("transformer", new_transformer(config, vocab_rows, linear, self.dtype, more))
  self:complete()
  if not config.tie_word_embeddings then
    self:register("lm_head", nn.Linear.new(config.n_embd, config.vocab_size, { std = config.initializer_range,
      device = more.device, generator = more.generator }))
  end
  return self
end

---Note which weight the head shares with the embedding, once that has one.
function GPT2:complete() self.tied_weight = self.transformer.wte.weight end

---Published folders put this before the decoder's names; of linear layers only the head lies [outputs, inputs].
GPT2.base_prefix = "transformer."
function GPT2.stores_transposed(path) return path == "lm_head" end

function GPT2:hidden_states(tokens, context, cache)
  check.type("model:hidden_states", "context", context, "table")
  local transformer = self.transformer
  -- The first normalisation adds the positions, as later ones add what a block made.
  local x, residual = transformer.wte(tokens), transformer.wpe(context.positions)
  x, residual = decoder.run_blocks(self, transformer.h, x, residual, context, cache)
  return (transformer.ln_f(x, residual))
end

function GPT2:summary()
  return ("%d layers of %d, %s activations"):format(self.config.n_layer, self.config.n_embd, self.dtype)
end

check.methods("qm.models.GPT2", GPT2, { stores_transposed = true })

return M
