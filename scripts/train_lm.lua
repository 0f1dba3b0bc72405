-- train_lm.lua - train a Llama-style language model on a text, on whatever device there is.
--
--   bin/quartermoon scripts/train_lm.lua --text data/kjv.txt --out runs/kjv
--   bin/quartermoon scripts/train_lm.lua --linear dense       the same model in full precision
--   bin/quartermoon scripts/train_lm.lua --resume runs/kjv    continue where a run stopped
--
-- The weights of every linear layer inside the blocks are 4-bit, and only 4-bit: there is no
-- full-precision copy. What follows is ordinary Lua: copy it, change the loop, write your own schedule.

local qm = require("quartermoon")

local OPTIONS = {
  name = "scripts/train_lm.lua",
  about = "Train a Llama-style language model on a text.",
  { "text", "data/kjv.txt", "the text to learn; scripts/corpus makes one" },
  { "out", "runs/kjv", "folder of the run: checkpoints, metrics, the loss curve" },
  { "resume", "", "continue the run in this folder; its options hold but for those given", value = "DIR" },
  { "linear", "mpq", "the blocks' linear layers: quantized or full precision", choices = { "mpq", "dense" } },
  { "bits", 4, "bits of a quantized weight", choices = { 2, 4, 8 } },
  { "group_size", 64, "weights that share a scale and a zero point" },
  { "feedback", "auto", "the rounding error's way back into the step",
    choices = { "auto", "none", "momentum", "residual" } },
  { "tokenizer", "bpe", "bytes, or byte pairs learnt from the text", choices = { "byte", "bpe" } },
  { "vocab_size", 1024, "tokens of the byte-pair tokenizer", min = 257 },
  { "hidden", 512, "width of the model" },
  { "ffn", 1408, "width of its feed-forward layers" },
  { "layers", 4, "blocks", min = 1 },
  { "heads", 8, "attention heads" },
  { "kv_heads", 2, "heads of keys and values" },
  { "context", 256, "tokens in a sequence", min = 2 },
  { "batch", 16, "sequences in a step", min = 1 },
  { "steps", 400, "optimizer steps", min = 1 },
  { "lr", 3e-3, "peak learning rate", min = 0 },
  { "warmup", 40, "steps until the peak" },
  { "weight_decay", 0.1, "decoupled weight decay", min = 0 },
  { "clip", 1.0, "largest norm of all gradients together", min = 0 },
  { "show_every", 10, "steps between readings of the loss, for each of which the device is waited for", min = 1 },
  { "eval_every", 100, "steps between evaluations", min = 1 },
  { "save_every", 200, "steps between checkpoints", min = 1 },
  { "dtype", "auto", "type of the activations", choices = { "auto", "f32", "bf16" } },
  { "device", "", "cpu, cuda ...; the default is $QM_DEVICE or cpu" },
  { "seed", 1, "of initial weights, data order and rounding", min = 0 },
  { "prompt", "In the beginning", "text to continue at the end" },
}
local o = qm.options.parse(arg, OPTIONS)
local resumed = o.resume ~= "" and qm.checkpoints.load(o.resume) or nil
if resumed then -- the run's own options become the defaults
  for _, option in ipairs(OPTIONS) do option[2] = resumed.config[option[1]] end
  o = qm.options.parse(arg, OPTIONS)
  o.out, o.resume = o.resume, ""
end
if o.device ~= "" then qm.set_default_device(o.device) end
qm.seed(o.seed)

-- The data: the text's tokens in a mapped file, every 20th block of them held out.
local tokenizer = o.tokenizer == "byte" and qm.tokenizer.byte()
  or qm.tokenizer.train_bpe(assert(qm.files.read(o.text)), { vocab_size = o.vocab_size })
qm.files.make_folder(o.out)
local data = qm.data.open(o.text, { tokenizer = tokenizer, cache_dir = o.out })
local batches = data:batches({ batch = o.batch, length = o.context, seed = o.seed })

local model = qm.models.llama.new({
  vocab_size = tokenizer.vocab_size, hidden_size = o.hidden, intermediate_size = o.ffn,
  num_hidden_layers = o.layers, num_attention_heads = o.heads, num_key_value_heads = o.kv_heads,
  max_position_embeddings = 2 * o.context, tie_word_embeddings = true,
}, {
  dtype = o.dtype,
  linear = o.linear == "dense" and { kind = "dense" } or { kind = "mpq", w_bit = o.bits, group_size = o.group_size },
})

-- One optimizer: AdamW for the dense tensors, the in-place update step for the quantized ones.
local schedule = qm.schedule.warmup(o.warmup, qm.schedule.cosine(o.lr, o.steps, 0.02))
local optim = qm.optim.new(model, { lr = schedule, betas = { 0.9, 0.99 }, weight_decay = o.weight_decay,
  feedback = o.feedback, seed = o.seed })

local run = { model = model, optim = optim, data = batches }
if resumed then qm.checkpoints.load(resumed.path, run) end
local first = (resumed and resumed.step or 0) + 1

---Nats per character on the held-out text.
local function evaluate()
  local sum, count = 0, 0
  qm.no_grad(function()
    for tokens, targets, cu_seqlens in data:held_out({ length = o.context, batch = o.batch, limit = 65536 }) do
      qm.scope(function() sum = sum + model:loss(tokens, targets, cu_seqlens):item() * targets.shape[1] end)
      count = count + targets.shape[1]
    end
  end)
  return sum / count / data.chars_per_token
end

-- One step; every batch has its sequences at the same places. A GPU replays a recording of it, which
-- saves the launches; on the CPU that would only hold memory.
local sequences = {}
for i = 0, o.batch do sequences[i + 1] = i * o.context end
local train = qm.graph(function(tokens, targets)
  local loss = model:loss(tokens, targets, sequences)
  loss:backward()
  optim:clip_grad_norm(o.clip)
  optim:step()
  optim:zero_grad()
  return loss
end, { eager = qm.default_device().name ~= "cuda" })

-- The training loop.
local progress = qm.progress.new({ steps = o.steps, tokens_per_step = o.batch * o.context, out = o.out,
  smoothing = 0.98 ^ o.show_every })
qm.default_device():reset_peak()
local started, training_seconds, validation = qm.clock.now(), 0, nil

for step = first, o.steps do
  local began = qm.clock.now()
  local tokens, targets = batches:next()
  local loss = train(tokens, targets)
  if step % o.show_every == 0 or step == first or step == o.steps then -- reading a number waits for the device
    local report = optim:report()
    progress:update(step, { loss = loss:item() / data.chars_per_token, lr = report.lr, grad_norm = report.grad_norm })
    if report.warning then progress:note(report.warning) end
  end
  loss:free()
  training_seconds = training_seconds + qm.clock.now() - began
  if step % o.eval_every == 0 or step == o.steps then
    validation = evaluate()
    progress:evaluated(step, validation)
  end
  if step % o.save_every == 0 or step == o.steps then
    run.step, run.config = step, o
    qm.checkpoints.save(o.out, run)
  end
end

-- The result.
progress:finish()
local curve, reason = qm.plot.curves(o.out .. "/loss.png", progress:curves(),
  { title = "Training on " .. o.text, x = "step", y = "nats per character" })
local function row(name, format, ...) print(("%-34s " .. format):format(name, ...)) end
row("validation loss, nats/character", "%.4f", validation or evaluate())
row("parameters", "%d", model:parameter_count())
local quantized, all = model.model.layers:bits_per_weight()
row("bits per weight in the blocks", "%.2f", quantized or all)
row("weights, MiB", "%.2f", model:weight_bytes() / 2 ^ 20)
row("optimizer state, MiB", "%.2f", optim:state_bytes() / 2 ^ 20)
row("peak memory of tensors, MiB", "%.1f", qm.default_device():memory().peak_bytes / 2 ^ 20)
if training_seconds > 0 then
  row("tokens/s", "%.0f", (o.steps - first + 1) * o.batch * o.context / training_seconds)
end
row("seconds, evaluation included", "%.0f", qm.clock.now() - started)
row("loss curve", "%s", curve or "none: " .. reason)

local ids = model:generate(tokenizer:encode(o.prompt), { max_tokens = o.context, temperature = 0.8, seed = o.seed })
print("\n" .. o.prompt .. tokenizer:decode(ids))
