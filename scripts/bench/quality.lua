-- quality.lua - what do weights kept only in low bits cost? Same seed, data order, betas and learning
-- rates for every row; one table and one picture for each of two questions.
--
--   bin/quartermoon scripts/bench/quality.lua [--steps 1500] [--seeds 3] [--out runs/quality]
--
-- (a) From scratch on the King James Bible: how far is the loss from full precision's?
-- (b) Fine-tuning a model of it on the Jargon File: how much of full precision's gain remains, against
--     the same run with the blocks' weights frozen? (Embedding and norms train in every row.)
--
-- A small Llama: 3 blocks of width 128, 639 thousand weights in the blocks, byte tokens.

local qm = require("quartermoon")

local o = qm.options.parse(arg, {
  name = "scripts/bench/quality.lua",
  about = "What do weights kept only in low bits cost, from scratch and in fine-tuning?",
  { "steps", 1500, "steps from scratch" },
  { "pretrain_steps", 2400, "steps of full precision before fine-tuning" },
  { "tune_steps", 500, "steps of fine-tuning" },
  { "seeds", 3, "runs of each row, averaged" },
  { "lr", 3e-3, "peak learning rate from scratch" },
  { "tune_lr", 7e-4, "peak learning rate of the blocks in fine-tuning" },
  { "out", "runs/quality", "folder for the pictures" },
})

local BATCH, CONTEXT, SLICE = 16, 64, 65536
local CONFIG = { vocab_size = 256, hidden_size = 128, intermediate_size = 384, num_hidden_layers = 3,
  num_attention_heads = 4, max_position_embeddings = CONTEXT, tie_word_embeddings = false }

local DENSE = { name = "dense f32", linear = { kind = "dense" } }
local function low_bit(name, w_bit, options)
  return { name = name, linear = { kind = "mpq", w_bit = w_bit, group_size = 64 }, update = options }
end
local SCRATCH = {
  DENSE,
  low_bit("8-bit stochastic", 8, { feedback = "none" }),
  low_bit("4-bit momentum feedback", 4, { feedback = "momentum" }),
  low_bit("4-bit residual, 8 bits", 4, { feedback = "residual" }),
  low_bit("4-bit stochastic", 4, { feedback = "none" }),
  low_bit("4-bit nearest", 4, { feedback = "none", rounding = "nearest" }),
}
-- A given weight has no reason to lie evenly around zero: the symmetric form's zeros are not integers
-- and fit it better.
local function tuned_from(row) row.linear.asym = false return row end
local TUNE = {
  tuned_from({ name = "frozen", linear = { kind = "mpq", w_bit = 4, group_size = 64 }, frozen = true }),
  DENSE,
  tuned_from(low_bit("4-bit stochastic", 4, { feedback = "none" })),
  tuned_from(low_bit("4-bit momentum feedback", 4, { feedback = "momentum" })),
  tuned_from(low_bit("4-bit residual, 8 bits", 4, { feedback = "residual" })),
  tuned_from(low_bit("4-bit nearest", 4, { feedback = "none", rounding = "nearest" })),
}

---Is this one of the weights inside the blocks, which rows treat differently?
local function in_block(name) return name:match("%.layers%.") and name:match("_proj%.weight$") end

---Parameter groups: the blocks' weights by the row's rule, the rest alike in every row.
local function groups_of(model, row, lr, rest_lr)
  local blocks, rest = {}, {}
  for _, entry in ipairs(model:named_parameters()) do
    local list = in_block(entry.name) and blocks or rest
    list[#list + 1] = entry
  end
  local group = { params = blocks, lr = lr }
  for key, value in pairs(row.update or {}) do group[key] = value end
  return row.frozen and { { params = rest, lr = rest_lr } } or { group, { params = rest, lr = rest_lr } }
end

local function evaluate(model, data)
  return qm.no_grad(function()
    local sum, count = 0, 0
    for tokens, targets, cu in data:held_out({ length = CONTEXT, batch = 64, limit = SLICE }) do
      qm.scope(function() sum = sum + model:loss(tokens, targets, cu):item() * targets.shape[1] end)
      count = count + targets.shape[1]
    end
    return sum / count
  end)
end

---Share of the quantized codes that one step moves, over the run.
local function moved_share(optim)
  local sum, count = 0, 0
  for _, entry in ipairs(optim:health()) do sum, count = sum + entry.moved, count + 1 end
  return count > 0 and sum / count or nil
end

---Train a model and return its result: loss, curve, share of codes that moved, seconds.
local function train(row, model, data, steps, lr, rest_lr, seed)
  local started = qm.clock.now()
  local warmup = math.max(1, math.floor(steps / 20))
  local function schedule(peak) return qm.schedule.warmup(warmup, qm.schedule.cosine(peak, steps, 0.02)) end
  local optim = qm.optim.new(groups_of(model, row, schedule(lr), schedule(rest_lr)),
    { betas = { 0.9, 0.99 }, weight_decay = 0.1, seed = seed })
  local batches = data:batches({ batch = BATCH, length = CONTEXT, seed = seed })
  local curve = {}
  for step = 1, steps do
    qm.scope(function()
      local loss = model:loss(batches:next())
      loss:backward()
      optim:step()
      optim:zero_grad()
      curve[step] = loss:item()
    end)
  end
  local result = { loss = evaluate(model, data), curve = curve, moved = moved_share(optim),
    seconds = qm.clock.now() - started }
  optim:free()
  batches:free()
  return result
end

---A fresh model of the row's kind, holding the weights of `source` where one is given.
local function build(row, seed, source)
  qm.seed(seed)
  local linear = {}
  for key, value in pairs(row.linear) do linear[key] = value end
  if source and linear.kind == "mpq" then linear.method = "mse" end
  local model = qm.models.llama.new(CONFIG, { linear = linear })
  if not source then return model end
  local given = {}
  for _, entry in ipairs(source:named_parameters()) do given[entry.name] = entry.param end
  for _, entry in ipairs(model:named_parameters()) do
    if entry.param.w_bit then
      if row.update and row.update.feedback == "residual" then entry.param:add_residual(8) end
      entry.param:fit(given[entry.name], "mse")
      entry.param:pack(given[entry.name])
      entry.param.requires_grad = not row.frozen
    else
      entry.param:copy(given[entry.name])
    end
  end
  return model
end

local function say(...) io.stderr:write(string.format(...), "\n") end

local function series_of(results)
  local series = {}
  for i, result in ipairs(results) do series[i] = { name = result.row.name, y = result.curve, smooth = 51 } end
  return series
end

local started = qm.clock.now()
qm.files.make_folder(o.out)
local bible = qm.data.open("data/kjv.txt", { tokenizer = qm.tokenizer.byte(), cache_dir = o.out })
local jargon = qm.data.open("data/jargon.txt", { tokenizer = qm.tokenizer.byte(), cache_dir = o.out })

-- (a)
local scratch = {}
for i, row in ipairs(SCRATCH) do
  local sum, last = 0, nil
  for seed = 1, o.seeds do
    local model = build(row, seed)
    last = train(row, model, bible, o.steps, o.lr, o.lr, seed)
    model:free()
    sum = sum + last.loss
    say("(a) %-26s seed %d: %.4f in %.0f s", row.name, seed, last.loss, last.seconds)
  end
  scratch[i] = { row = row, loss = sum / o.seeds, curve = last.curve, moved = last.moved }
end
print(("(a) from scratch, %d steps of %d tokens, nats per character on held-out text"):format(o.steps, BATCH * CONTEXT))
print(("%-28s %9s %9s %9s"):format("", "loss", "gap", "moved"))
for _, result in ipairs(scratch) do
  print(("%-28s %9.4f %+9.4f %8s"):format(result.row.name, result.loss, result.loss - scratch[1].loss,
    result.moved and ("%.2f%%"):format(100 * result.moved) or "-"))
end
qm.plot.curves(o.out .. "/scratch.png", series_of(scratch), { title = "From scratch: King James Bible",
  x = "step", y = "training loss, nats per character" })

-- (b)
local pretrained = build(DENSE, 1)
local base = train(DENSE, pretrained, bible, o.pretrain_steps, o.lr, o.lr, 1)
say("(b) pretrained: %.4f, on the Jargon File %.4f, in %.0f s", base.loss, evaluate(pretrained, jargon), base.seconds)
local tuned = {}
for i, row in ipairs(TUNE) do
  local sum, last = 0, nil
  for seed = 1, o.seeds do
    local model = build(row, seed, pretrained)
    last = train(row, model, jargon, o.tune_steps, o.tune_lr, 1e-3, seed)
    model:free()
    sum = sum + last.loss
    say("(b) %-26s seed %d: %.4f in %.0f s", row.name, seed, last.loss, last.seconds)
  end
  tuned[i] = { row = row, loss = sum / o.seeds, curve = last.curve, moved = last.moved }
end
local frozen, full = tuned[1].loss, tuned[2].loss
print(("\n(b) fine-tuning, %d steps at learning rate %g, nats per character on held-out Jargon File"):format(
  o.tune_steps, o.tune_lr))
print(("%-28s %9s %16s %9s"):format("", "loss", "of dense's gain", "moved"))
for _, result in ipairs(tuned) do
  print(("%-28s %9.4f %15.1f%% %9s"):format(result.row.name, result.loss,
    100 * (frozen - result.loss) / (frozen - full), result.moved and ("%.3f%%"):format(100 * result.moved) or "-"))
end
qm.plot.curves(o.out .. "/finetune.png", series_of(tuned), { title = "Fine-tuning: Jargon File",
  x = "step", y = "training loss, nats per character" })
print(("\n%.0f s in all; pictures in %s"):format(qm.clock.now() - started, o.out))
