---A model folder, as the Hugging Face hub has them, or a checkpoint of ours: which files belong to it, what
---its descriptions say, and whether they agree.

local checkpoints = require("quartermoon.checkpoints")
local container = require("quartermoon.inspection.container")
local expected = require("quartermoon.inspection.expected")
local files = require("quartermoon.files")
local matrices = require("quartermoon.inspection.matrices")

local M = {}

local INDEX = "model.safetensors.index.json"

---------------------------------------------------------------------------------------------------
-- Which files
---------------------------------------------------------------------------------------------------

---A shard's name as an index may have it: a file of this folder.
local function is_plain(name)
  return type(name) == "string" and name ~= "" and name ~= "." and name ~= ".." and not name:find("[/\\%z]")
end

---The shards of an index, and which tensor it says is where.
local function read_index(report, folder, present)
  local index = report:read_object(folder .. "/" .. INDEX, INDEX)
  if not index then return nil end
  if type(index.weight_map) ~= "table" then return report:problem(INDEX, "weight_map is not an object") end
  local shards, seen = {}, {}
  for tensor, shard in pairs(index.weight_map) do
    if not is_plain(shard) then
      report:problem(INDEX, "tensor '%s' is said to be in '%s', which is no file of this folder", tostring(tensor),
        tostring(shard))
    elseif not seen[shard] then
      seen[shard], shards[#shards + 1] = true, shard
    end
  end
  table.sort(shards)
  for _, shard in ipairs(shards) do
    if not present[shard] then report:problem(INDEX, "the file '%s' is missing", shard) end
  end
  return shards, index
end

---Without an index: model.safetensors, or all that there are.
local function find_shards(report, present, names)
  if present["model.safetensors"] then return { "model.safetensors" } end
  local shards, total, numbers = {}, nil, {}
  for _, name in ipairs(names) do
    if name:find("%.safetensors$") and name ~= "optim.safetensors" then shards[#shards + 1] = name end
    local number, of = name:match("%-(%d+)%-of%-(%d+)%.safetensors$")
    if number then total, numbers[tonumber(number)] = tonumber(of), true end
  end
  if not total then return shards end
  report:problem(INDEX, "missing beside %d of %d shards", #shards, total)
  for i = 1, math.min(total, 9999) do
    if not numbers[i] then report:problem(INDEX, "shard %d of %d is missing", i, total) end
  end
  return shards
end

---What the index says against what the shards hold.
local function check_index(report, index)
  local total = 0
  for tensor, shard in pairs(index.weight_map) do
    local found = report.by_name[tensor]
    if not found then
      report:problem(INDEX, "tensor '%s' is not in '%s'", tostring(tensor), tostring(shard))
    elseif found.file ~= shard then
      report:problem(INDEX, "tensor '%s' is said to be in '%s', but is in '%s'", tensor, tostring(shard), found.file)
    end
  end
  for _, tensor in ipairs(report.tensors) do
    total = total + tensor.size_bytes
    if index.weight_map[tensor.name] == nil then
      report:problem(tensor.file, "tensor '%s' is not in the index", tensor.name)
    end
  end
  local said = type(index.metadata) == "table" and index.metadata.total_size
  if type(said) == "number" and said ~= total then
    report:problem(INDEX, "it says that the tensors have %.0f bytes; they have %.0f", said, total)
  end
end

---------------------------------------------------------------------------------------------------
-- Descriptions
---------------------------------------------------------------------------------------------------

local function describe_config(report, config)
  local name = type(config.architectures) == "table" and tostring(config.architectures[1]) or "no architecture named"
  report:fact("model", "%s (%s)", tostring(config.model_type), name)
  local layers, hidden = config.num_hidden_layers or config.n_layer, config.hidden_size or config.n_embd
  local heads = config.num_attention_heads or config.n_head
  report:fact("size", "%s layers, %s wide, %s heads%s, vocabulary of %s", tostring(layers), tostring(hidden),
    tostring(heads), config.num_key_value_heads and " (" .. tostring(config.num_key_value_heads) .. " of keys)" or "",
    tostring(config.vocab_size))
  local rope = type(config.rope_parameters) == "table" and config.rope_parameters
  local scaling = type(config.rope_scaling) == "table" and config.rope_scaling
  if rope then
    report:fact("positions", "rope_parameters: %s, theta %s", tostring(rope.rope_type), tostring(rope.rope_theta))
  elseif config.rope_theta then
    report:fact("positions", "rope_theta %s%s", tostring(config.rope_theta), scaling and ", scaling "
      .. tostring(scaling.rope_type or scaling.type) or "")
  end
  report:fact("type", config.dtype or config.torch_dtype or "not said")
  if config.tie_word_embeddings then report:fact("head", "tied to the embedding") end
end

---What the folder says of its quantization. @return table|nil
local function quantization(report, folder, config)
  local q, from = config.quantization_config, "config.json, quantization_config"
  if q == nil and files.exists(folder .. "/quantize_config.json") then
    q, from = report:read_object(folder .. "/quantize_config.json", "quantize_config.json"), "quantize_config.json"
  end
  if q == nil then return nil end
  if type(q) ~= "table" then return report:problem("config.json", "quantization_config is not an object") end
  local method = q.quant_method or q.method or (from:find("^quantize") and "gptq")
  local words = { tostring(method) }
  if q.bits then words[#words + 1] = tostring(q.bits) .. " bits" end
  if q.group_size then words[#words + 1] = "group " .. tostring(q.group_size) end
  if q.desc_act then words[#words + 1] = "act-order" end
  if q.sym ~= nil then words[#words + 1] = q.sym and "symmetric" or "asymmetric" end
  local format = q.checkpoint_format or q.format
  if format then words[#words + 1] = "checkpoint_format " .. tostring(format) end
  report:fact("quantization", "%s (%s)", table.concat(words, ", "), from)
  for _, key in ipairs({ "bits", "group_size" }) do
    if q[key] ~= nil and type(q[key]) ~= "number" then
      report:problem(from, "%s is %s, not a number", key, tostring(q[key]))
    end
  end
  return { method = method, bits = tonumber(q.bits), group_size = tonumber(q.group_size), sym = q.sym,
    format = format or "gptq", dynamic = q.dynamic ~= nil }
end

---The convention of zero points, by the data where all weights are symmetric.
local function check_zero_points(report, q)
  local stored
  for _, w in ipairs(report.weights) do
    if w.format == "gptq" and (w.bits == 4 or w.bits == 8) then
      local field = w.zero_word and w.zero_word % 2 ^ w.bits
      local middle = 2 ^ (w.bits - 1)
      local now = field == middle and "v2" or field == middle - 1 and "v1" or "mixed"
      if stored and stored ~= now then return end
      stored = now
    end
  end
  if not stored or stored == "mixed" then return end
  local said = q.format == "gptq_v2" and "v2" or "v1"
  report:fact("zero points", "symmetric, stored %s", stored == "v1" and "minus one (v1)" or "as they are (v2)")
  if said ~= stored then
    report:problem("config.json", "it says %s (zero points %s), but all of them are stored %s", tostring(q.format),
      said, stored)
  end
end

local function check_quantization(report, q)
  if not q or q.dynamic or (q.method ~= "gptq" and q.method ~= "awq") then return end
  for _, w in ipairs(report.weights) do
    if w.parts and w.bits and q.bits and w.bits ~= q.bits then
      report:problem("config.json", "it says %s bits; '%s' has %s", tostring(q.bits), w.name, tostring(w.bits))
      break
    end
  end
  if q.method == "gptq" then check_zero_points(report, q) end
end

---------------------------------------------------------------------------------------------------
-- Tokenizers and the rest
---------------------------------------------------------------------------------------------------

---A tokenizer's file, or a folder with one.
function M.tokenizer(report, path, name, vocab_size)
  local ok, tokenizer = pcall(require("quartermoon.tokenizer").load, path)
  if not ok then return report:problem(name, (tostring(tokenizer):gsub("^.-qm.tokenizer.load: ", ""))) end
  local size = tonumber(tokenizer.vocab_size) or 0
  report:fact("tokenizer", "%s: %s, %d tokens", name, tostring(tokenizer.kind), size)
  if type(vocab_size) == "number" and size > vocab_size then
    report:problem(name, "it has %d tokens, but config.json's vocab_size is %d", size, vocab_size)
  end
end

local OTHERS = { "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
  "quant_strategy.json", "added_tokens.json" }

local function read_others(report, folder, present, names, config)
  for _, name in ipairs({ "tokenizer.json", "tokenizer.model" }) do
    if present[name] then
      M.tokenizer(report, folder .. "/" .. name, name, config.vocab_size)
      break
    end
  end
  for _, name in ipairs(OTHERS) do
    if present[name] then report:read_object(folder .. "/" .. name, name) end
  end
  local pickles = {}
  for _, name in ipairs(names) do
    if name:find("%.bin$") or name:find("%.pth?$") or name:find("%.ckpt$") then pickles[#pickles + 1] = name end
  end
  if #pickles > 0 then
    report:fact("left alone", "%s: pickles run code when they are read", table.concat(pickles, ", "))
  end
end

local function read_model(report, folder, present, names)
  report.kind = "model folder"
  local config = present["config.json"] and report:read_object(folder .. "/config.json", "config.json") or {}
  if not present["config.json"] then report:problem("config.json", "missing: nothing says what model this is") end
  if next(config) then describe_config(report, config) end
  local q = quantization(report, folder, config)
  local shards, index
  if present[INDEX] then shards, index = read_index(report, folder, present) end
  for _, shard in ipairs(shards or find_shards(report, present, names)) do
    if present[shard] then container.read(report, folder .. "/" .. shard, shard) end
  end
  if index then check_index(report, index) end
  local plain = q and not q.dynamic and (q.method == "gptq" or q.method == "awq")
  matrices.find(report, function()
    return plain and q.group_size and q.group_size > 0 and { group_size = q.group_size } or nil
  end)
  if #report.tensors == 0 then report:problem(".", "no safetensors file holds a weight") end
  check_quantization(report, q)
  local list = expected.weights(report, config)
  if list and #report.tensors > 0 then expected.compare(report, list) end
  read_others(report, folder, present, names, config)
end

local function read_checkpoint(report, folder, present)
  report.kind = "checkpoint"
  local state = report:read_object(folder .. "/state.json", "state.json") or {}
  report:fact("step", state.step == nil and "not said" or tostring(state.step))
  local quantized = type(state.quantized) == "table" and state.quantized or {}
  for _, name in ipairs({ "model.safetensors", "optim.safetensors" }) do
    if present[name] then container.read(report, folder .. "/" .. name, name) end
  end
  matrices.find(report, function(path)
    local q = quantized[path]
    if type(q) ~= "table" then return nil end
    local group_size = tonumber(q.group_size)
    return { bits = tonumber(q.w_bit), group_size = group_size and group_size > 0 and group_size or nil }
  end)
end

---Inspect a folder.
---@param report qm.InspectionReport
function M.read(report, folder)
  local names, present = files.list(folder) or {}, {}
  table.sort(names)
  for _, name in ipairs(names) do present[name] = true end
  if present["state.json"] then return read_checkpoint(report, folder, present) end
  local newest = checkpoints.latest(folder)
  if newest and not present["config.json"] then
    report:fact("checkpoints", "%d, the newest is looked at", #checkpoints.list(folder))
    report.path = newest
    return M.read(report, newest)
  end
  read_model(report, folder, present, names)
end

return M
