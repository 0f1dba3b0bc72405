-- generate.lua - continue a text, or talk, with the model in a folder.
--
--   bin/quartermoon scripts/generate.lua Llama-3.2-1B --prompt "In the beginning"
--   bin/quartermoon scripts/generate.lua Qwen3-4B-GPTQ --chat --device cuda
--   bin/quartermoon scripts/generate.lua Llama-3.2-1B --prompt "One moon" --count 4 --temperature 0.9
--
-- The text goes to standard output as it is made, speeds to standard error. Sampling follows the folder's
-- generation_config.json where the command line says nothing.

local qm = require("quartermoon")

local o = qm.options.parse(arg, {
  name = "scripts/generate.lua",
  about = "Continue a text, or talk, with the model in a folder.",
  arguments = { { "dir", nil, "a folder with config.json, weights and a tokenizer" } },
  { "prompt", "", "text to continue; with --chat the first message" },
  { "chat", false, "a conversation: the prompt, then what is typed, a message a line" },
  { "system", "", "with --chat: what the model is told first" },
  { "count", 1, "texts from the one prompt, made together and printed one after the other", type = "integer", min = 1 },
  { "max_tokens", 256, "longest text", min = 1 },
  { "temperature", nil, "0: always the likeliest token", type = "number", min = 0 },
  { "top_k", nil, "draw from so many", type = "integer", min = 1 },
  { "top_p", nil, "draw from the likeliest that make up this probability", type = "number", min = 0, max = 1 },
  { "min_p", nil, "draw from what is this likely, measured by the likeliest", type = "number", min = 0, max = 1 },
  { "repetition_penalty", nil, "above 1: what was said becomes less likely", type = "number", min = 0.01 },
  { "stop", "", "end before this text" },
  { "seed", 0, "the same seed, the same text", min = 0 },
  { "context", nil, "positions to make room for; default: all of the model's", type = "integer", min = 1 },
  { "dtype", "auto", "type of the activations", choices = { "auto", "f32", "bf16" } },
  { "device", "", "cpu, cuda ...; the default is $QM_DEVICE or cpu" },
})
if o.device ~= "" then qm.set_default_device(o.device) end

local began = qm.clock.now()
local model = qm.models.load(o.dir, { dtype = o.dtype, positions = o.context })
local tokenizer = qm.tokenizer.load(o.dir)
local weights_bytes = model:weight_bytes()
io.stderr:write(("%s: %.0f million weights, %.2f bits each, read in %.1f s\n"):format(o.dir,
  model:parameter_count() / 1e6, 8 * weights_bytes / model:parameter_count(), qm.clock.now() - began))

-- Where a text ends: at the model's own end tokens, at a turn's end in a conversation.
local published = model.generation_config or {}
local stop = { unpack(published.eos_token_id or {}) }
for _, word in ipairs({ "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>" }) do
  stop[#stop + 1] = tokenizer:special(word)
end
if o.stop ~= "" then stop[#stop + 1] = o.stop end

local asked = o.temperature or o.top_k or o.top_p or o.min_p
local sampling = { temperature = not asked and published.do_sample == false and 0 or nil }
for _, name in ipairs({ "temperature", "top_k", "top_p", "min_p", "repetition_penalty" }) do
  sampling[name] = sampling[name] or o[name] or published[name]
end
if sampling.top_k == 0 then sampling.top_k = nil end -- published ones say so for "all"

local turn = 0

---Generate, print, and say how fast it was. @return string text  of the first
local function continue(ids)
  local prompts, made, first = {}, 0, nil
  for i = 1, o.count do prompts[i] = ids end
  local options = { tokenizer = tokenizer, max_tokens = o.max_tokens, stop = stop, seed = o.seed + turn,
    batch = o.count,
    on_token = function()
      made, first = made + 1, first or qm.clock.now()
    end,
    on_text = function(words, i)
      if i > 1 then return end -- the others follow when it is done
      io.stdout:write(words)
      io.stdout:flush()
    end }
  for name, value in pairs(sampling) do options[name] = value end
  local start = qm.clock.now()
  local _, infos = model:generate(prompts, options)
  local done = qm.clock.now()
  io.stdout:write("\n")
  for i = 2, o.count do io.stdout:write("\n", infos[i].text, "\n") end
  first = first or done
  local rate = done > first and (made - o.count) / (done - first) or 0
  io.stderr:write(("prompt: %d tokens, %.0f tokens/s; text: %d tokens, %.1f tokens/s, %.1f GB/s of weights\n"):format(
    #ids * o.count, #ids * o.count / math.max(first - start, 1e-9), made, rate, rate / o.count * weights_bytes / 1e9))
  turn = turn + 1
  return infos[1].text
end

if not o.chat then
  io.stdout:write(o.prompt)
  continue(tokenizer:ids(o.prompt))
  os.exit(0)
end

local messages = o.system ~= "" and { { role = "system", content = o.system } } or {}
local message = o.prompt ~= "" and o.prompt or io.stdin:read("*l")
while message do
  messages[#messages + 1] = { role = "user", content = message }
  messages[#messages + 1] = { role = "assistant",
    content = continue((qm.chat.encode(tokenizer, messages, { prompt = true }))) }
  io.stderr:write("> ")
  message = io.stdin:read("*l")
end
