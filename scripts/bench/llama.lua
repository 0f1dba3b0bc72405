-- llama.lua - tokens per second and peak memory of a Llama-shaped model's whole training step, its linear
-- layers dense (bf16 products, AdamW on f32 weights) or quantized (4 bits, updated in place).
--
--   bin/quartermoon --device cuda scripts/bench/llama.lua [--linear dense|mpq|both] [--batch 8] ...
--
-- Targets, one H200, the defaults (1.1B): dense 85k tokens/s; 4-bit 0.95 of that in half of 26 GiB, for which
-- moments and gradients must be small and the batch be taken in parts:
--   ... llama.lua --linear mpq --moments bf16 --grad bf16 --parts 4 --recompute selective

local qm = require("quartermoon")
local training = dofile("scripts/bench/training.lua")

local o = qm.options.parse(arg, training.declare("scripts/bench/llama.lua", "Time a Llama's training step.", {
  { "linear", "both", "the linear layers", choices = { "dense", "mpq", "both" } },
  { "batch", 8, "sequences in a step", min = 1 },
  { "context", 2048, "tokens of a sequence", min = 1 },
  { "layers", 16, "blocks", min = 1 },
  { "width", 2048, "channels, in heads of 64", min = 64 },
  { "kv-heads", 8, "heads of keys and values", min = 1 },
  { "inner", 8192, "channels of the feed-forward layers", min = 32 },
  { "vocab", 32000, "tokens there are", min = 1 },
  { "w-bit", 4, "bits of a quantized weight", choices = { 1, 2, 4, 8 } },
  { "group-size", 128, "weights that share a scale", min = 32 },
  { "grad", "f32", "type of a quantized weight's gradient", choices = { "f32", "bf16" } },
}))

local function run(kind)
  qm.seed(1)
  local linear = kind == "dense" and { kind = kind }
    or { kind = kind, w_bit = o.w_bit, group_size = o.group_size, grad_dtype = o.grad }
  local model = qm.models.llama.new({ vocab_size = o.vocab, hidden_size = o.width, intermediate_size = o.inner,
    num_hidden_layers = o.layers, num_attention_heads = o.width / 64, num_key_value_heads = o.kv_heads,
    max_position_embeddings = o.context }, { dtype = o.dtype, linear = linear, checkpoint = training.checkpoint(o) })
  local head = o.vocab * o.width
  print(("%s: %d weights"):format(kind, model:parameter_count()))
  local result = training.run(model, { name = kind, batch = o.batch, context = o.context, vocab_size = o.vocab,
    layers = o.layers, width = o.width, product_weights = model:parameter_count() - head, options = o })
  model:free()
  qm.default_device():empty_cache()
  return result
end

local dense = o.linear ~= "mpq" and run("dense")
local mpq = o.linear ~= "dense" and run("mpq")
if dense and mpq then print(("4-bit / dense: %.3f"):format(mpq.rate / dense.rate)) end
