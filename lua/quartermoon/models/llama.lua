---A Llama-style decoder: RMSNorm, rotary positions, grouped heads, SwiGLU. Configurations and parameter
---names are those of Hugging Face's Llama folders; weights lie [inputs, outputs] here, transposed.
---
---    local model = qm.models.llama.new({ vocab_size = 256, hidden_size = 128, intermediate_size = 384,
---      num_hidden_layers = 3, num_attention_heads = 4 }, { linear = { kind = "mpq", w_bit = 4 } })
---    model:loss(tokens, targets):backward()

local autograd = require("quartermoon.autograd")
local check = require("quartermoon.check")
local devices = require("quartermoon.device")
local generation = require("quartermoon.models.generation")
local nn = require("quartermoon.nn")
local qm = require("quartermoon")

local M = {}

---@class qm.models.Llama : qm.Module
---@field config table
---@field dtype string  of the activations
local Llama = nn.class("Llama")
M.Llama = Llama

local CONFIG = { vocab_size = check.required, hidden_size = check.required, intermediate_size = check.required,
  num_hidden_layers = check.required, num_attention_heads = check.required, num_key_value_heads = check.optional,
  head_dim = check.optional, rms_norm_eps = 1e-5, rope_theta = 10000, max_position_embeddings = 2048,
  rope_scaling = check.optional, tie_word_embeddings = false, attention_bias = false, qk_norm = false,
  sliding_window = 0, initializer_range = 0.02 }

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
  return config
end

---@param options table  { kind =, the rest for the layer }
local function linear_of(name, options)
  check.type(name, "linear", options, "table")
  local rest = {}
  for key, value in pairs(options) do if key ~= "kind" then rest[key] = value end end
  return nn.linear_factory(options.kind or "mpq", rest)
end

---The decoder without its head, so that parameter paths begin with "model." as published ones do.
local Decoder = nn.class("Decoder")

local function new_decoder(config, linear, activations, more)
  local self = nn.create(Decoder)
  self:register("embed_tokens", nn.Embedding.new(config.vocab_size, config.hidden_size, {
    std = config.initializer_range, activations = activations, device = more.device, generator = more.generator }))
  local blocks = self:register("layers", nn.List.new())
  for _ = 1, config.num_hidden_layers do
    blocks:append(nn.Block.new({ hidden_size = config.hidden_size, eps = config.rms_norm_eps, device = more.device,
      attention = { hidden_size = config.hidden_size, heads = config.num_attention_heads,
        kv_heads = config.num_key_value_heads, head_size = config.head_dim, linear = linear,
        bias = config.attention_bias, qk_norm = config.qk_norm, eps = config.rms_norm_eps, device = more.device,
        generator = more.generator },
      mlp = { hidden_size = config.hidden_size, intermediate_size = config.intermediate_size, linear = linear,
        device = more.device, generator = more.generator } }))
  end
  self:register("norm", nn.RMSNorm.new(config.hidden_size, { eps = config.rms_norm_eps, device = more.device }))
  return self
end

---A fresh model.
---@param config table  Hugging Face's names: vocab_size, hidden_size, intermediate_size, num_hidden_layers,
---   num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps = 1e-5, rope_theta = 10000,
---   max_position_embeddings = 2048, rope_scaling = nil (see qm.rope_tables), tie_word_embeddings = false;
---   also attention_bias = false (q, k, v: Qwen 2), qk_norm = false (Qwen 3), sliding_window = 0
---   (Mistral), initializer_range = 0.02
---@param options table|nil  { dtype = "auto" ("f32", "bf16": of activations; auto: bf16 where the device
---   is fast at it), linear = { kind = "mpq", w_bit = 4, group_size = 64, ... } or { kind = "dense" },
---   checkpoint = false (true: blocks recompute in backward instead of storing), device, generator }
---@return qm.models.Llama
function M.new(config, options)
  local name = "qm.models.llama.new"
  config = check_config(name, config)
  options = check.options(name, options, { dtype = "auto", linear = { kind = "mpq" }, checkpoint = false,
    device = check.optional, generator = check.optional })
  check.one_of(name, "dtype", options.dtype, { "auto", "f32", "bf16" })
  local self = nn.create(Llama)
  self.device = devices.resolve(name, options.device)
  self.config, self.recompute = config, options.checkpoint
  self.dtype = options.dtype ~= "auto" and options.dtype or self.device:info().fast_bf16 and "bf16" or "f32"
  self.linear_options = options.linear
  local more = { device = self.device, generator = options.generator }
  self:register("model", new_decoder(config, linear_of(name, options.linear), self.dtype, more))
  if not config.tie_word_embeddings then
    self:register("lm_head", nn.Linear.new(config.hidden_size, config.vocab_size, {
      std = config.initializer_range, device = more.device, generator = more.generator }))
  end
  self.cos, self.sin = qm.rope_tables(config.head_dim, config.max_position_embeddings, config.rope_theta,
    { device = self.device, scaling = config.rope_scaling })
  self.cos:keep()
  self.sin:keep()
  self.rows_fresh, self.rows_old, self.rows_count = {}, {}, 0
  return self
end

---Where sequences begin and each row's position, on the model's device.
---@param lengths integer[]  rows of each sequence
---@param start integer  the position of the first row, behind what a key/value cache holds
local function build_rows(self, name, lengths, start)
  local cu_q, cu_k, positions = { 0 }, { 0 }, {}
  for i, length in ipairs(lengths) do
    if start + length > self.config.max_position_embeddings then
      check.fail(name, "tokens", "sequences of at most " .. self.config.max_position_embeddings .. " tokens",
        start + length)
    end
    cu_q[i + 1], cu_k[i + 1] = cu_q[i] + length, cu_k[i] + start + length
    for p = start, start + length - 1 do positions[#positions + 1] = p end
  end
  local options = { dtype = "i32", device = self.device }
  return { cu_q = qm.tensor(cu_q, options), cu_k = qm.tensor(cu_k, options), positions = qm.tensor(positions, options) }
end

local function free_rows(entries)
  for _, rows in pairs(entries) do
    for _, tensor in pairs(rows) do tensor:free() end
  end
end

local ROWS_KEPT = 64

---The same, kept: a packing that comes again is not built again. The last ROWS_KEPT packings at least
---stay alive, because gradients still to be computed read them.
local function kept_rows(self, name, lengths)
  local key = table.concat(lengths, ",")
  local found = self.rows_fresh[key] or self.rows_old[key]
  if found then return found end
  if self.rows_count == ROWS_KEPT then
    free_rows(self.rows_old)
    self.rows_old, self.rows_fresh, self.rows_count = self.rows_fresh, {}, 0
  end
  found = build_rows(self, name, lengths, 0)
  for _, tensor in pairs(found) do tensor:keep() end
  self.rows_fresh[key], self.rows_count = found, self.rows_count + 1
  return found
end

---The rows of each sequence, from offsets, lengths or nothing.
local function lengths_of(name, tokens, cu_seqlens)
  check.desc(name, "tokens", tokens)
  local rows = tokens.shape[1] or 0
  if cu_seqlens == nil then return { rows } end
  local offsets = cu_seqlens
  if check.is_tensor(cu_seqlens) then offsets = cu_seqlens:totable() end
  check.type(name, "cu_seqlens", offsets, "table")
  local lengths = {}
  for i = 1, #offsets do check.integer(name, "cu_seqlens", offsets[i], 0) end
  for i = 2, #offsets do
    lengths[i - 1] = check.integer(name, "cu_seqlens", offsets[i] - offsets[i - 1], 0)
  end
  if offsets[1] ~= 0 or offsets[#offsets] ~= rows then
    check.fail(name, "cu_seqlens", "offsets from 0 to the number of tokens, " .. rows, offsets[#offsets])
  end
  return lengths
end

---The normalised output of the last block.
local function hidden_states(self, name, tokens, cu_seqlens, cache)
  local lengths = lengths_of(name, tokens, cu_seqlens)
  local rows = cache and build_rows(self, name, lengths, cache[1].length) or kept_rows(self, name, lengths)
  local context = { cos = self.cos, sin = self.sin, positions = rows.positions, cu_q = rows.cu_q, cu_k = rows.cu_k,
    window = self.config.sliding_window }
  local x, residual = self.model.embed_tokens(tokens), nil
  for i, block in ipairs(self.model.layers) do
    if self.recompute and autograd.enabled() then
      x, residual = autograd.checkpoint(function(a, b) return block(a, b, context) end, x, residual)
    else
      x, residual = block(x, residual, context, cache and cache[i])
    end
  end
  return (self.model.norm(x, residual))
end

---Mean cross entropy of the next tokens, in nats.
---@param tokens qm.Tensor   i32 [R]: the tokens of all sequences
---@param targets qm.Tensor  i32 [R]: each row's next token; -100 is not counted
---@param cu_seqlens qm.Tensor|integer[]|nil  [S+1]: where sequences begin, from 0 to R; nil: one
---   sequence. A Lua table spares reading the tensor back.
---@return qm.Tensor         f32 {}
function Llama:loss(tokens, targets, cu_seqlens)
  local name = "model:loss"
  check.desc(name, "targets", targets)
  local x = hidden_states(self, name, tokens, cu_seqlens)
  if self.lm_head then return qm.linear_cross_entropy(x, self.lm_head.weight, targets) end
  return qm.linear_cross_entropy(x, self.model.embed_tokens.weight, targets, { transposed = true })
end

---The head's product, [R, vocab_size].
local function head(self, x)
  if self.lm_head then return self.lm_head(x) end
  local weight = self.model.embed_tokens.weight
  if weight.dtype ~= x.dtype then weight = qm.cast(weight, x.dtype) end
  return qm.matmul(x, weight, { trans_b = true })
end

---Scores of the next token, for every row. Differentiable; under qm.no_grad nothing but the result stays.
---@param tokens qm.Tensor   i32 [R]
---@param cu_seqlens qm.Tensor|integer[]|nil  as for loss
---@return qm.Tensor         of the activations' type, [R, vocab_size]
function Llama:logits(tokens, cu_seqlens)
  local function body() return head(self, hidden_states(self, "model:logits", tokens, cu_seqlens)) end
  if autograd.enabled() then return body() end
  return qm.scope(body)
end

---Room for the keys and values of one growing text, for `next_logits`.
---@param rows_max integer
---@return qm.nn.KeyValues[]  one for each layer; free them
function Llama:cache(rows_max)
  check.integer("model:cache", "rows_max", rows_max, 1, self.config.max_position_embeddings)
  local config, cache = self.config, {}
  for i = 1, config.num_hidden_layers do
    cache[i] = nn.key_values(rows_max, config.num_key_value_heads, config.head_dim, self.dtype, self.device)
  end
  return cache
end

---Scores of the token after these, which follow what the cache holds.
---@param tokens qm.Tensor  i32 [R]
---@param cache qm.nn.KeyValues[]  grows by R rows
---@return qm.Tensor        [1, vocab_size]
function Llama:next_logits(tokens, cache)
  local name = "model:next_logits"
  check.type(name, "cache", cache, "table")
  for i = 1, self.config.num_hidden_layers do nn.check_key_values(name, "cache[" .. i .. "]", cache[i]) end
  return qm.no_grad(qm.scope, function()
    local x = hidden_states(self, name, tokens, nil, cache)
    return head(self, x:view_rows(name, x.shape[1], 1))
  end)
end

Llama.generate = generation.generate

---Release weights, tables and positions.
function Llama:free()
  nn.Module.free(self)
  free_rows(self.rows_fresh)
  free_rows(self.rows_old)
  self.rows_fresh, self.rows_old, self.rows_count = {}, {}, 0
  self.cos:free()
  self.sin:free()
end

function Llama:summary()
  return ("%d layers of %d, %s activations"):format(self.config.num_hidden_layers, self.config.hidden_size, self.dtype)
end

check.methods("qm.models.Llama", Llama)

return M
