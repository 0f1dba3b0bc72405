-- finetune.lua - go on training a model folder of the Hugging Face layout on a text, and write a folder.
--
--   bin/quartermoon scripts/finetune.lua --model Llama-3.2-1B --text notes.txt --out runs/notes
--   bin/quartermoon scripts/finetune.lua --model Qwen3-4B-GPTQ --text notes.txt --device cuda
--   bin/quartermoon scripts/finetune.lua --model Llama-3.2-1B --linear mpq --bits 4 --text notes.txt
--
-- A quantized folder's linear layers train as they are, codes and nothing but codes; a dense one's stay
-- dense, or are quantized while they are read. The result, OUT/model, loads wherever the folder did.

local qm = require("quartermoon")

local OPTIONS = {
  name = "scripts/finetune.lua",
  about = "Go on training a model folder on a text.",
  { "model", "", "folder with config.json, model.safetensors and a tokenizer", value = "DIR" },
  { "text", "", "the text to learn" },
  { "out", "runs/finetune", "folder of the run: metrics, the loss curve, the tuned model" },
  { "linear", "folder", "linear layers: as the folder has them, quantized or dense",
    choices = { "folder", "mpq", "dense" } },
  { "bits", 4, "with --linear mpq: bits of a weight", choices = { 2, 3, 4, 8 } },
  { "group_size", 128, "with --linear mpq: weights that share a scale and a zero point" },
  { "trained", "linear", "what trains: quantized linear layers (of a model without any: linear layers), or all",
    choices = { "linear", "all" } },
  { "feedback", "auto", "the rounding error's way back into the step",
    choices = { "auto", "none", "momentum", "residual" } },
  { "format", "auto", "of the tuned folder; auto: as the weights are",
    choices = { "auto", "dense", "gptq", "awq", "mbwq" } },
  { "context", 512, "tokens in a sequence", min = 2 },
  { "batch", 4, "sequences in a step", min = 1 },
  { "steps", 200, "optimizer steps", min = 1 },
  { "lr", 1e-4, "peak learning rate", min = 0 },
  { "warmup", 10, "steps until the peak" },
  { "weight_decay", 0.0, "decoupled weight decay", min = 0 },
  { "clip", 1.0, "largest norm of all gradients together", min = 0 },
  { "checkpoint", false, "recompute blocks in backward, which spares memory" },
  { "show_every", 10, "steps between readings of the loss", min = 1 },
  { "eval_every", 100, "steps between evaluations", min = 1 },
  { "dtype", "auto", "type of the activations", choices = { "auto", "f32", "bf16" } },
  { "device", "", "cpu, cuda ...; the default is $QM_DEVICE or cpu" },
  { "seed", 1, "of data order and rounding", min = 0 },
}
local o = qm.options.parse(arg, OPTIONS)
local function stop(message)
  io.stderr:write("scripts/finetune.lua: ", message, "\n")
  os.exit(2)
end
if o.model == "" or o.text == "" then stop("--model and --text are needed") end
if o.device ~= "" then qm.set_default_device(o.device) end
qm.seed(o.seed)

local began = qm.clock.now()
local model = qm.models.load(o.model, { dtype = o.dtype, checkpoint = o.checkpoint,
  linear = o.linear == "mpq" and { kind = "mpq", w_bit = o.bits, group_size = o.group_size }
    or o.linear == "dense" and { kind = "dense" } or nil })
local tokenizer = qm.tokenizer.load(o.model)
if tokenizer.vocab_size > model.config.vocab_size then
  stop(("%s: the tokenizer has %d tokens, the model %d"):format(o.model, tokenizer.vocab_size, model.config.vocab_size))
end
if o.context > model.positions_max then stop("--context: the model has " .. model.positions_max .. " positions") end
print(("%s, %.1f s to load"):format(tostring(model):match("[^\n]*"), qm.clock.now() - began))

-- What trains. Fixed embeddings and norms cost no gradient and no optimizer state.
local entries, quantized = model:published_parameters(), false
for _, entry in ipairs(entries) do quantized = quantized or qm.nn.is_quantized(entry.param) end
for _, entry in ipairs(entries) do
  local is_linear = getmetatable(entry.layer) == qm.nn.Linear and entry.path ~= "lm_head"
  local chosen = qm.nn.is_quantized(entry.param) or is_linear and not quantized
  entry.param.requires_grad = o.trained == "all" or chosen
end

qm.files.make_folder(o.out)
-- Every 20th block is held out; blocks of a short text are fewer, so that sequences fit into them.
local blocks = math.max(20, math.min(400, math.floor((qm.files.size(o.text) or 0) / (16 * o.context))))
local data = qm.data.open(o.text, { tokenizer = tokenizer, cache_dir = o.out, blocks = blocks })
local batches = data:batches({ batch = o.batch, length = o.context, seed = o.seed })
local schedule = qm.schedule.warmup(o.warmup, qm.schedule.cosine(o.lr, o.steps, 0.1))
local optim = qm.optim.new(model, { lr = schedule, betas = { 0.9, 0.99 }, weight_decay = o.weight_decay,
  feedback = o.feedback, seed = o.seed })

---Nats per token on the held-out text.
local function evaluate()
  local sum, count = 0, 0
  qm.no_grad(function()
    for tokens, targets, cu_seqlens in data:held_out({ length = o.context, batch = o.batch, limit = 32768 }) do
      qm.scope(function() sum = sum + model:loss(tokens, targets, cu_seqlens):item() * targets.shape[1] end)
      count = count + targets.shape[1]
    end
  end)
  return count > 0 and sum / count or 0 / 0
end

local progress = qm.progress.new({ steps = o.steps, tokens_per_step = o.batch * o.context, out = o.out,
  smoothing = 0.98 ^ o.show_every })
local first, last = evaluate(), nil
progress:evaluated(0, first)
for step = 1, o.steps do
  local tokens, targets, cu_seqlens = batches:next()
  qm.scope(function() -- releases what is made inside
    local loss = model:loss(tokens, targets, cu_seqlens)
    loss:backward()
    optim:clip_grad_norm(o.clip)
    optim:step()
    optim:zero_grad()
    if step % o.show_every == 0 or step == 1 or step == o.steps then
      local report = optim:report()
      progress:update(step, { loss = loss:item(), lr = report.lr, grad_norm = report.grad_norm })
      if report.warning then progress:note(report.warning) end
    end
  end)
  if step % o.eval_every == 0 or step == o.steps then
    last = evaluate()
    progress:evaluated(step, last)
  end
end
progress:finish()

model:save(o.out .. "/model", { format = o.format, overwrite = true })
qm.plot.curves(o.out .. "/loss.png", progress:curves(), { title = "Tuning on " .. o.text, x = "step",
  y = "nats per token" })
print(("held-out loss, nats/token: %.4f before, %.4f after"):format(first, last))
print(("peak memory of tensors: %.1f MiB"):format(qm.default_device():memory().peak_bytes / 2 ^ 20))
print(("the tuned model: %s/model"):format(o.out))
