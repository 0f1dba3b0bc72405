-- decode.lua - tokens per second of one text that a Llama of 8B, its linear layers in 4 bits, goes on with.
--
--   bin/quartermoon --device cuda scripts/bench/decode.lua [--tokens 128] [--layers 32] ...
--
-- Random weights: speed does not depend on them. The bound is what must be read for a token, the weights of all
-- layers and of the head, over a copy's bandwidth. Target, one H200: 60 % of it.

local qm = require("quartermoon")

local o = qm.options.parse(arg, { name = "scripts/bench/decode.lua", about = "Time a Llama's decoding.", arguments = {},
  { "tokens", 128, "tokens to generate", min = 16 },
  { "prompt", 64, "tokens before them", min = 1 },
  { "texts", 1, "texts at once", min = 1 },
  { "layers", 32, "blocks", min = 1 },
  { "width", 4096, "channels", min = 128 },
  { "heads", 32, "query heads", min = 1 },
  { "kv-heads", 8, "heads of keys and values", min = 1 },
  { "inner", 14336, "channels of the feed-forward layers", min = 32 },
  { "vocab", 128256, "tokens there are", min = 1 },
  { "group-size", 128, "weights that share a scale", min = 32 },
  { "profile", false, "time each operation of some tokens as well" },
})

qm.seed(1)
local device = qm.default_device()
local model = qm.models.llama.new({ vocab_size = o.vocab, hidden_size = o.width, intermediate_size = o.inner,
  num_hidden_layers = o.layers, num_attention_heads = o.heads, num_key_value_heads = o.kv_heads,
  max_position_embeddings = o.prompt + o.tokens }, { linear = { kind = "mpq", w_bit = 4, group_size = o.group_size } })
-- A published head is of 16 bits.
local head = model.lm_head.weight
model.lm_head.weight = head:to(model.dtype):keep()
head:free()

local bytes = model:weight_bytes() - model.model.embed_tokens.weight:size_bytes()
local prompts = {}
for i = 1, o.texts do
  prompts[i] = {}
  for j = 1, o.prompt do prompts[i][j] = (31 * i + 17 * j) % o.vocab end
end

local function generate(tokens)
  local times = {}
  qm.no_grad(function()
    model:generate(prompts, { max_tokens = tokens, temperature = 0, on_token = function(_, i)
      if i == 1 then times[#times + 1] = qm.clock.now() end
    end })
  end)
  return times
end

local WARMUP = 8 -- the prompt, and the steps until one is recorded
generate(WARMUP)
local times = generate(o.tokens)
local seconds = (times[#times] - times[WARMUP]) / (#times - WARMUP)
local bandwidth = require("quartermoon.ceilings").of(device).copy
print(("%s: %d million weights, %.2f GB to read for a token"):format(device:info().description,
  model:parameter_count() / 1e6, bytes * 1e-9))
print(("%.1f tokens/s of each of %d texts, %.3f ms a token; at most %.1f by a copy's %.2f TB/s: %.1f %%"):format(
  1 / seconds, o.texts, seconds * 1e3, bandwidth / bytes, bandwidth * 1e-12, 100 * bytes / bandwidth / seconds))
if o.profile then
  print(tostring(qm.profile(function()
    qm.no_grad(function() model:generate(prompts, { max_tokens = 20, temperature = 0, record = false }) end)
  end)))
end
model:free()
