-- export_gguf.lua - write the model in a folder as a GGUF file for llama.cpp.
--
--   bin/quartermoon scripts/export_gguf.lua tuned tuned.gguf
--   bin/quartermoon scripts/export_gguf.lua tuned tuned.gguf --otherwise f16 --dtype f16
--   llama-cli -m tuned.gguf -p "In the beginning"
--
-- Quantized weights become Q4_0, Q4_1 or Q8_0 where that holds them exactly; the rest is refused, or rounded to
-- F16 and listed.

local qm = require("quartermoon")

local o = qm.options.parse(arg, {
  name = "scripts/export_gguf.lua",
  about = "Write the model in a folder as a GGUF file for llama.cpp.",
  arguments = { { "dir", nil, "a folder with config.json, weights and a tokenizer" },
    { "file", nil, "where the file goes" } },
  { "otherwise", "refuse", "what to do with weights that no block type holds exactly", choices = { "refuse", "f16" } },
  { "dtype", "auto", "of dense matrices; auto: as config.json has it", choices = { "auto", "f32", "f16", "bf16" } },
  { "tokenizer", "", "a folder or file to take the tokenizer from; default: the model's folder" },
  { "no_tokenizer", false, "leave the tokenizer out: llama.cpp then takes and gives numbers of tokens" },
  { "pre", "", "llama.cpp's name for how the tokenizer splits a text; default: by what tokenizer.json says" },
  { "name", "", "the model's name; default: the folder's" },
})
local function given(word) return word ~= "" and word or nil end

local model = qm.models.load(o.dir, { device = "cpu", positions = 1, weights = "auto" })
local tokenizer = given(o.tokenizer)
if o.no_tokenizer then tokenizer = false end
local report = qm.gguf.export(model, o.file, { otherwise = o.otherwise,
  dtype = o.dtype ~= "auto" and o.dtype or model.stored_dtype or "f32", tokenizer = tokenizer,
  pre = given(o.pre), name = given(o.name) })

local counts, names = {}, {}
for _, tensor in ipairs(report.tensors) do
  if not counts[tensor.type] then names[#names + 1] = tensor.type end
  counts[tensor.type] = (counts[tensor.type] or 0) + 1
  if tensor.reason then print(("%s is rounded to F16: %s"):format(tensor.name, tensor.reason)) end
end
table.sort(names)
for i, name in ipairs(names) do names[i] = counts[name] .. " " .. name end
for _, note in ipairs(report.notes) do print(note) end
print(("%s: %d tensors, %s"):format(o.file, #report.tensors, table.concat(names, ", ")))
