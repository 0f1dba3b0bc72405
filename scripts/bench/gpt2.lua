-- gpt2.lua - tokens per second of GPT-2's whole training step: forward, backward, AdamW on f32 weights.
--
--   bin/quartermoon --device cuda scripts/bench/gpt2.lua [--batch 64] [--context 1024] [--layers 12] ...
--
-- Target, one H200, the defaults (124M): 600k tokens/s.

local qm = require("quartermoon")
local training = dofile("scripts/bench/training.lua")

local o = qm.options.parse(arg, training.declare("scripts/bench/gpt2.lua", "Time GPT-2's training step.", {
  { "batch", 64, "sequences in a step", min = 1 },
  { "context", 1024, "tokens of a sequence", min = 1 },
  { "layers", 12, "blocks", min = 1 },
  { "width", 768, "channels, in heads of 64", min = 64 },
  { "vocab", 50257, "tokens there are; rounded up to a multiple of 128", min = 1 },
}))

qm.seed(1)
local model = qm.models.gpt2.new({ vocab_size = o.vocab, n_embd = o.width, n_layer = o.layers, n_head = o.width / 64,
  n_positions = o.context }, { dtype = o.dtype, linear = { kind = "dense" }, checkpoint = training.checkpoint(o),
  vocab_multiple = 128 })
local head = model.tied_weight:count()
print(("%d weights"):format(model:parameter_count()))
training.run(model, { name = "gpt2", batch = o.batch, context = o.context, vocab_size = o.vocab, layers = o.layers,
  width = o.width, product_weights = 12 * o.layers * o.width ^ 2 + head, options = o })
