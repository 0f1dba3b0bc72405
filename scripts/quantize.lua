-- quantize.lua - round a trained model's weights to few bits, and write a folder that others read, too.
--
--   bin/quartermoon scripts/quantize.lua Llama-3.2-1B Llama-3.2-1B-4bit --calibration wiki.txt
--   bin/quartermoon scripts/quantize.lua Qwen3-4B Qwen3-4B-3bit --calibration wiki.txt --bits 3 --act-order
--   bin/quartermoon scripts/quantize.lua Llama-3.2-1B Llama-3.2-1B-8bit --bits 8 --method rtn
--
-- GPTQ rounds each layer's weights so that the layer's output changes least on the calibration text; a part of
-- that text is held out, and on it perplexity is measured before and after. Only the blocks' linear layers are
-- quantized: embedding, head and norms stay as they are. The folder can be tuned further: scripts/finetune.lua.

local qm = require("quartermoon")

local OPTIONS = {
  name = "scripts/quantize.lua",
  about = "Round a trained model's weights to few bits, and write a folder.",
  arguments = { { "model", nil, "folder with config.json, model.safetensors and a tokenizer" },
    { "out", nil, "folder to write" } },
  { "format", "gptq", "of the folder", choices = { "gptq", "awq", "mpq", "mbwq" } },
  { "bits", 4, "bits of a weight", choices = { 1, 2, 3, 4, 8 } },
  { "group_size", 128, "weights that share a scale and a zero point; -1: a whole column", value = "N" },
  { "sym", false, "zero points in the middle of the codes: vLLM reads no other gptq; awq may have any" },
  { "method", "gptq", "how weights are rounded: with errors compensated, or to nearest", choices = { "gptq", "rtn" } },
  { "calibration", "", "a text like those that the model is for, 16 MiB of it at most; gptq needs one" },
  { "act_order", false, "features with the largest inputs first, groups of features in that order" },
  { "static_groups", false, "with --act-order: groups as they lie, which vLLM needs, and every kernel reads fast" },
  { "fit", "minmax", "how a grid is laid: over all weights, or for the least squared error",
    choices = { "minmax", "mse" } },
  { "damping", 0.01, "of the inputs' mean square, added to each", min = 0, max = 1 },
  { "samples", 128, "sequences that calibrate", min = 1 },
  { "length", 512, "tokens in a sequence", min = 2 },
  { "eval_tokens", 32768, "held-out tokens that perplexity is measured on", min = 2 },
  { "dtype", "auto", "type of the activations", choices = { "auto", "f32", "bf16" } },
  { "device", "", "cpu, cuda ...; the default is $QM_DEVICE or cpu" },
  { "seed", 1, "of the choice of sequences", min = 0 },
  { "overwrite", false, "replace the folder that is there" },
}
local o = qm.options.parse(arg, OPTIONS)
local function stop(message, ...)
  io.stderr:write("scripts/quantize.lua: ", message:format(...), "\n")
  os.exit(2)
end

-- What each format can hold, and how we make it: integer zero points (from 0 or 1 on), or float zeros.
local FORMATS = {
  gptq = { bits = { [2] = true, [3] = true, [4] = true, [8] = true }, grid = "asym", order = true },
  awq = { bits = { [4] = true }, grid = "asym" },
  mpq = { bits = { [1] = true, [2] = true, [4] = true, [8] = true }, grid = "float", order = true },
  mbwq = { bits = { [2] = true, [4] = true }, grid = "float" },
}
local format = FORMATS[o.format]
if not format.bits[o.bits] then stop("--bits: the format %s has no weights of %d bits", o.format, o.bits) end
if o.group_size ~= -1 and (o.group_size < 32 or o.group_size % 32 ~= 0) then
  stop("--group-size: expected a multiple of 32, or -1, got %d", o.group_size)
end
if o.sym and format.grid == "float" then stop("--sym: the format %s has float zeros, not zero points", o.format) end
if o.sym and o.fit == "mse" then stop("--fit mse: a symmetric grid is always laid over all weights") end
if o.act_order and not format.order and not o.static_groups then
  stop("--act-order: the format %s has groups only as they lie: add --static-groups", o.format)
end
if o.method == "gptq" and o.calibration == "" then
  stop("--calibration: the method gptq needs a text; --method rtn does without")
end
if o.method == "rtn" and (o.act_order or o.static_groups) then
  stop("--%s: to nearest, no feature comes before another", o.act_order and "act-order" or "static-groups")
end
if o.static_groups and not o.act_order then stop("--static-groups: what it changes is --act-order") end
local there = qm.files.list(o.out) or qm.files.exists(o.out) and { o.out }
if there and #there > 0 and not o.overwrite then stop("%s is there already; --overwrite replaces it", o.out) end

local began = qm.clock.now()
if o.device ~= "" then qm.set_default_device(o.device) end
local model = qm.models.load(o.model, { dtype = o.dtype, weights = "auto", linear = { kind = "dense" } })
local bytes_before = model:weight_bytes()
print(("%s, %.1f s to load"):format(tostring(model):match("[^\n]*"), qm.clock.now() - began))

---The calibration text as tokens, every 20th block held out.
local function open_text()
  local file, reason = io.open(o.calibration, "rb")
  local text = file and file:read(2 ^ 24)
  if file then file:close() end
  if not text then stop("--calibration: %s", reason or o.calibration .. " is empty, or no text") end
  local tokenizer = qm.tokenizer.load(o.model)
  if tokenizer.vocab_size > model.config.vocab_size then
    stop("%s: the tokenizer has %d tokens, the model %d", o.model, tokenizer.vocab_size, model.config.vocab_size)
  end
  if o.length > model.positions_max then stop("--length: the model has %d positions", model.positions_max) end
  local tokens = tokenizer:encode(text, { device = "cpu" })
  local count = tokens.shape[1]
  if count < 20 * (o.length + 1) then
    stop("--calibration: %s has %d tokens; for sequences of %d (--length) it takes %d", o.calibration, count, o.length,
      20 * (o.length + 1))
  end
  local blocks = math.max(20, math.min(400, math.floor(count / (16 * o.length))))
  return qm.data.open(tokens, { blocks = blocks })
end

local data = o.calibration ~= "" and open_text()
local BATCH = 4 -- sequences that go through the model together

-- That OUT cannot be written is better known now than at the end.
local ok, reason = pcall(qm.files.make_folder, o.out .. ".partial")
if not ok then stop("%s", reason) end
qm.files.remove_folder(o.out .. ".partial")

local function perplexity()
  return qm.models.perplexity(model, data:held_out({ length = o.length, batch = BATCH,
    limit = math.max(o.eval_tokens, o.length) }))
end

local calibration = {}
if data then
  local batches = data:batches({ batch = BATCH, length = o.length, seed = o.seed })
  for i = 1, math.ceil(o.samples / BATCH) do
    local tokens, _, sequences = batches:next()
    calibration[i] = { tokens:keep(), sequences:keep() }
  end
end
local before = data and perplexity()

-- Errors are squared ones, as shares: of the weight, and of the layer's output on the calibration text.
print(("%-38s %15s %12s %12s %8s"):format("layer", "shape", "weight", "output", "seconds"))
local last = qm.clock.now()
local function show(line)
  local now = qm.clock.now()
  print(("%-38s %15s %12.2e %12s %8.1f"):format(line.name, table.concat(line.shape, " x "), line.weight,
    line.output and ("%.2e"):format(line.output) or "-", now - last))
  io.stdout:flush()
  last = now
end
qm.models.quantize(model, { method = o.method, w_bit = o.bits, group_size = o.group_size,
  grid = o.sym and "sym" or format.grid, act_order = o.act_order, static_groups = o.static_groups,
  damping = o.damping, fit = o.fit, zero_offset = o.sym and o.format == "gptq" and 1 or 0, on_layer = show },
  calibration)
for _, batch in ipairs(calibration) do
  for _, tensor in ipairs(batch) do tensor:free() end
end
local after = data and perplexity()

model:save(o.out, { format = o.format, dtype = model.stored_dtype, overwrite = o.overwrite })
print(("bits per weight: %.2f of the blocks, %.2f of all"):format(model:bits_per_weight()))
print(("weights: %.1f MiB before, %.1f after"):format(bytes_before / 2 ^ 20, model:weight_bytes() / 2 ^ 20))
if data then print(("perplexity of the held-out text: %.4f before, %.4f after"):format(before, after)) end
print(("peak memory of tensors: %.1f MiB, %.1f s"):format(qm.default_device():memory().peak_bytes / 2 ^ 20,
  qm.clock.now() - began))
print(("the quantized model: %s"):format(o.out))
