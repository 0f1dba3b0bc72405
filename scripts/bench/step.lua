-- step.lua - tokens per second of the whole training step of the quickstart's model, dense and
-- 4-bit, and where the time goes.
--
--   bin/quartermoon scripts/bench/step.lua [steps]
--
-- Targets: 4-bit at least 0.8 of dense; outside GEMM and attention less than 25 % of the time.

local qm = require("quartermoon")

local steps = tonumber(arg[1]) or 12
local BATCH, CONTEXT = 16, 256
local CONFIG = { vocab_size = 1024, hidden_size = 512, intermediate_size = 1408, num_hidden_layers = 4,
  num_attention_heads = 8, num_key_value_heads = 2, max_position_embeddings = CONTEXT, tie_word_embeddings = true }
local COMPUTE = { "gemm", "attention", "attention_backward" }

local function measure(linear)
  qm.seed(1)
  local model = qm.models.llama.new(CONFIG, { linear = linear })
  local optim = qm.optim.new(model, { lr = 1e-3, weight_decay = 0.1 })
  local ids, cu = {}, {}
  for i = 1, BATCH * CONTEXT do ids[i] = (i * 7919) % CONFIG.vocab_size end
  for i = 0, BATCH do cu[i + 1] = i * CONTEXT end
  local tokens = qm.tensor(ids, { dtype = "i32" })
  local function step()
    qm.scope(function()
      model:loss(tokens, tokens, cu):backward()
      optim:clip_grad_norm(1)
      optim:step()
      optim:zero_grad()
    end)
  end
  for _ = 1, 3 do step() end
  qm.default_device():reset_peak()
  local times = {}
  for i = 1, steps do
    local started = qm.clock.now()
    step()
    times[i] = qm.clock.now() - started
  end
  table.sort(times)
  local profile = qm.profile(function() for _ = 1, steps do step() end end)
  local peak_bytes = qm.default_device():memory().peak_bytes
  optim:free()
  model:free()
  return { rate = BATCH * CONTEXT / times[math.ceil(#times / 2)], profile = profile,
    peak_bytes = peak_bytes }
end

print(("%s; %d tokens a step, median of %d steps"):format(qm.default_device():info().description,
  BATCH * CONTEXT, steps))
local dense = measure({ kind = "dense" })
local mpq = measure({ kind = "mpq", w_bit = 4, group_size = 64 })
local rows = { { "dense", dense }, { "4-bit", mpq } }
for _, row in ipairs(rows) do print(("\n%s\n%s"):format(row[1], tostring(row[2].profile))) end
print(("\n%-6s %10s %28s %12s"):format("", "tokens/s", "outside GEMM and attention", "peak MiB"))
for _, row in ipairs(rows) do
  print(("%-6s %10.0f %27.1f%% %12.1f"):format(row[1], row[2].rate, 100 * (1 - row[2].profile:share(COMPUTE)),
    row[2].peak_bytes / 2 ^ 20))
end
print(("4-bit / dense: %.2f"):format(mpq.rate / dense.rate))
