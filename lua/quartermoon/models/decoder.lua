---What decoder-only models share: packed rows and where they lie, the loss, logits, generation with a
---cache. A model is a class made with `decoder.class` whose objects `decoder.begin` sets up, with a
---method `hidden_states(tokens, context, cache)` and the fields `positions_max` and `cache_heads`.

local autograd = require("quartermoon.autograd")
local caches = require("quartermoon.models.cache")
local check = require("quartermoon.check")
local devices = require("quartermoon.device")
local generation = require("quartermoon.models.generation")
local nn = require("quartermoon.nn")
local qm = require("quartermoon")

local M = {}

---@class qm.models.Decoder : qm.Module
---@field config table         Hugging Face's names
---@field dtype string         of the activations
---@field device qm.Device
---@field recompute boolean    blocks recompute in backward instead of storing
---@field positions_max integer
---@field cache_heads { layers: integer, heads: integer, head_size: integer }
---@field lm_head qm.nn.Linear|nil  nil: the embedding, `tied_weight`, is the head
---@field tied_weight qm.Tensor|nil [V, C]
local Decoder = {}

---A class of models.
---@param class_name string
function M.class(class_name)
  local class = nn.class(class_name)
  for name, method in pairs(Decoder) do class[name] = method end
  return class
end

---The options that every model takes, beside its own.
M.OPTIONS = { dtype = "auto", linear = { kind = "mpq" }, checkpoint = false, device = check.optional,
  generator = check.optional }

---A new model without its layers.
---@param options table  checked, of OPTIONS
---@return qm.models.Decoder self, function linear, table more  the layers' factory, { device, generator,
---   recompute = the option checkpoint }
function M.begin(name, class, config, options)
  check.one_of(name, "dtype", options.dtype, { "auto", "f32", "bf16" })
  check.type(name, "linear", options.linear, "table")
  check.one_of(name, "checkpoint", options.checkpoint, { false, true, "selective" })
  local self = nn.create(class)
  self.device = devices.resolve(name, options.device)
  self.config, self.recompute = config, options.checkpoint == true
  self.dtype = options.dtype ~= "auto" and options.dtype or self.device:info().fast_bf16 and "bf16" or "f32"
  self.linear_options = options.linear
  self.rows_fresh, self.rows_old, self.rows_count = {}, {}, 0
  local rest = {}
  for key, value in pairs(options.linear) do if key ~= "kind" then rest[key] = value end end
  local linear = nn.linear_factory(options.linear.kind or "mpq", rest)
  return self, linear, { device = self.device, generator = options.generator, recompute = options.checkpoint }
end

---Where sequences begin and each row's position, on the model's device.
---@param lengths integer[]  rows of each sequence
local function build_rows(self, name, lengths)
  local cu, positions = { 0 }, {}
  for i, length in ipairs(lengths) do
    if length > self.positions_max then
      check.fail(name, "tokens", ("sequences of at most %d tokens"):format(self.positions_max), length)
    end
    cu[i + 1] = cu[i] + length
    for p = 0, length - 1 do positions[#positions + 1] = p end
  end
  local options = { dtype = "i32", device = self.device }
  return { cu = qm.tensor(cu, options), positions = qm.tensor(positions, options) }
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
  found = build_rows(self, name, lengths)
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
local function hidden_states(self, name, tokens, cu_seqlens)
  local rows = kept_rows(self, name, lengths_of(name, tokens, cu_seqlens))
  return self:hidden_states(tokens, { positions = rows.positions, cu_q = rows.cu, cu_k = rows.cu })
end

---Run blocks one after the other, recomputing them in backward where the model says so.
---@param x qm.Tensor           what goes into the first block
---@param residual qm.Tensor|nil the residual stream before that
---@return qm.Tensor x, qm.Tensor residual
function M.run_blocks(self, blocks, x, residual, context, cache)
  for i, block in ipairs(blocks) do
    if self.recompute and autograd.enabled() then
      x, residual = autograd.checkpoint(function(a, b) return block(a, b, context) end, x, residual)
    else
      x, residual = block(x, residual, context, cache and cache[i])
    end
  end
  return x, residual
end

---Mean cross entropy of the next tokens, in nats.
---@param tokens qm.Tensor   i32 [R]: the tokens of all sequences
---@param targets qm.Tensor  i32 [R]: each row's next token; -100 is not counted
---@param cu_seqlens qm.Tensor|integer[]|nil  [S+1]: where sequences begin, from 0 to R; nil: one
---   sequence. A Lua table spares reading the tensor back.
---@return qm.Tensor         f32 {}
function Decoder:loss(tokens, targets, cu_seqlens)
  local name = "model:loss"
  check.desc(name, "targets", targets)
  local x = hidden_states(self, name, tokens, cu_seqlens)
  if self.lm_head and nn.is_quantized(self.lm_head.weight) then return qm.cross_entropy(self.lm_head(x), targets) end
  if self.lm_head then return qm.linear_cross_entropy(x, self.lm_head.weight, targets) end
  return qm.linear_cross_entropy(x, self.tied_weight, targets, { transposed = true })
end

---The head's product, [R, vocab_size].
local function head(self, x)
  if self.lm_head then return self.lm_head(x) end
  local weight = self.tied_weight
  if weight.shape[1] > self.config.vocab_size then weight = weight:narrow(1, self.config.vocab_size) end
  if weight.dtype ~= x.dtype then weight = qm.cast(weight, x.dtype) end
  return qm.matmul(x, weight, { trans_b = true })
end

---Scores of the next token, for every row. Differentiable; under qm.no_grad nothing but the result stays.
---@param tokens qm.Tensor   i32 [R]
---@param cu_seqlens qm.Tensor|integer[]|nil  as for loss
---@return qm.Tensor         of the activations' type, [R, vocab_size]
function Decoder:logits(tokens, cu_seqlens)
  local function body() return head(self, hidden_states(self, "model:logits", tokens, cu_seqlens)) end
  if autograd.enabled() then return body() end
  return qm.scope(body)
end

---Room for the keys and values of growing texts, for `next_logits`.
---@param rows_max integer        tokens of each text
---@param sequences integer|nil   texts, default 1
---@return qm.models.Cache        free it
function Decoder:cache(rows_max, sequences)
  check.integer("model:cache", "rows_max", rows_max, 1, self.positions_max)
  check.integer("model:cache", "sequences", sequences or 1, 1)
  return caches.new(self.cache_heads, rows_max, sequences or 1, self.dtype, self.device)
end

---Scores of the token after the last row of every sequence that has rows, from a plan of the cache. All
---that changes from one such step to the next lies in the device's memory.
---@param tokens qm.Tensor|nil  i32 [R]; nil: the plan begins with them
---@return qm.Tensor            [W, vocab_size]
local function decode(self, cache, plan, sizes, tokens)
  local context, planned = caches.parts(plan, sizes)
  local last = context.last
  context.last = nil
  local x = self:hidden_states(tokens or planned, context, cache)
  return head(self, last and qm.gather(x, last) or x)
end

---Scores of the token after these, which follow what the cache holds.
---@param tokens qm.Tensor  i32 [R], of all sequences, one behind the other
---@param cache qm.models.Cache  grows by R rows
---@param cu_seqlens qm.Tensor|integer[]|nil  [S+1]: where the tokens of each of the cache's S sequences begin; a
---   sequence may have none
---@return qm.Tensor        [W, vocab_size]: a row for each of the W sequences that have tokens, in order
function Decoder:next_logits(tokens, cache, cu_seqlens)
  local name = "model:next_logits"
  caches.check(name, cache, self.cache_heads.layers)
  local counts = lengths_of(name, tokens, cu_seqlens)
  if #counts ~= cache.sequences then
    check.fail(name, "cu_seqlens", ("offsets of %d sequences"):format(cache.sequences), #counts)
  end
  if tokens.shape[1] == 0 then check.fail(name, "tokens", "at least one token", tokens) end
  local logits = qm.no_grad(qm.scope, function()
    local plan, sizes = cache:plan(name, counts)
    return decode(self, cache, plan, sizes, tokens)
  end)
  cache:advance(counts)
  return logits
end

---Continue a text, or several at once.
---
---How a token is chosen, and in which order the samplers act: models/sampler.lua.
---
---@param prompt integer[]|qm.Tensor|string|table  token numbers, at least one, or with a tokenizer a string; or a
---   list of these, texts of different lengths
---@param options table|nil  { max_tokens = 100 (of each text; the model's positions bound it too),
---   temperature = 1 (0: always the likeliest), top_k = all, top_p = 1, min_p = 0, repetition_penalty = 1,
---   seed = 0 (text i of a list draws from seed + i - 1, so that it does not depend on the others),
---   stop = a token number, a string or a list of both (strings need a tokenizer), tokenizer = nil,
---   on_token = function(token, i) or nil, on_text = function(words, i) or nil: whole characters, without
---   special tokens, never a part of a stop string; i counts the texts from 1,
---   batch = 16 (texts in one step), prefill_rows = 2048 (rows of prompts in one step), record = on GPUs (steps
---   of one row for each text are recorded and replayed: see qm.graph) }
---@return integer[] tokens  the new ones, without the prompt; ends before a stop token, behind a stop string; of
---   several texts a list of such lists
---@return table info  { reason = "stop" or "length", text = what on_text got in all, with a tokenizer }; of
---   several texts a list of such
---@raise when options do not fit, or the scores are not numbers
function Decoder:generate(prompt, options) return generation.generate(self, decode, prompt, options) end

---The parameters as published folders have them; see models/published.lua.
function Decoder:published_parameters() return require("quartermoon.models.published").parameters(self) end

---Write a folder that transformers and what serves such folders read; see models/save.lua.
function Decoder:save(folder, options) return require("quartermoon.models.save").save(self, folder, options) end

---Release weights and positions.
function Decoder:free()
  nn.Module.free(self)
  free_rows(self.rows_fresh)
  free_rows(self.rows_old)
  self.rows_fresh, self.rows_old, self.rows_count = {}, {}, 0
end

return M
