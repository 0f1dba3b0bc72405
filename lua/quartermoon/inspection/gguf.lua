---A GGUF file's tensors and metadata, read so that a broken file can still be listed.

local headers = require("quartermoon.gguf.header")
local types = require("quartermoon.gguf.types")

local M = {}

local DENSE = { F64 = true, F32 = true, F16 = true, BF16 = true, I8 = true, I16 = true, I32 = true, I64 = true }

local function describe(report, header)
  local values = header.metadata
  local function fact(name, key, format)
    if values[key] ~= nil and type(values[key]) ~= "table" then
      report:fact(name, format or "%s", tostring(values[key]))
    end
  end
  report:fact("version", "%s, alignment %d, %d keys of metadata", tostring(header.version), header.alignment,
    #header.keys)
  local arch = tostring(values["general.architecture"])
  fact("name", "general.name")
  report:fact("model", "%s: %s layers, %s wide, %s heads (%s of keys), context of %s", arch,
    tostring(values[arch .. ".block_count"]), tostring(values[arch .. ".embedding_length"]),
    tostring(values[arch .. ".attention.head_count"]), tostring(values[arch .. ".attention.head_count_kv"]),
    tostring(values[arch .. ".context_length"]))
  local words = values["tokenizer.ggml.tokens"]
  if type(words) == "table" then
    report:fact("tokenizer", "%s, split as %s, %d tokens", tostring(values["tokenizer.ggml.model"]),
      tostring(values["tokenizer.ggml.pre"]), #words)
  else
    report:fact("tokenizer", "none")
  end
end

---What the metadata says against the tensors.
local function compare(report, name, header)
  local values, arch = header.metadata, header.metadata["general.architecture"]
  if type(arch) ~= "string" then
    return report:problem(name, "general.architecture is missing: nothing says what model this is")
  end
  local blocks, seen = values[arch .. ".block_count"], {}
  for _, tensor in ipairs(header.tensors) do
    local block = tonumber(tensor.name:match("^blk%.(%d+)%."))
    if block then seen[block] = true end
    if block and type(blocks) == "number" and block >= blocks then
      report:problem(name, "tensor '%s': %s.block_count says %d", tensor.name, arch, blocks)
    end
  end
  for block = 0, math.min(type(blocks) == "number" and blocks or 0, 10000) - 1 do
    if not seen[block] then report:problem(name, "block %d of %d has no tensor", block, blocks) end
  end
  local words, table_of = values["tokenizer.ggml.tokens"], header.by_name["token_embd.weight"]
  if type(words) == "table" and table_of and table_of.shape[1] ~= #words then
    report:problem(name, "tensor 'token_embd.weight' has %.0f rows for %d tokens", table_of.shape[1], #words)
  end
end

---Add a file's tensors and problems to the report.
---@param report qm.InspectionReport
---@param path string
---@param name string  as the report calls the file
function M.read(report, path, name)
  local file, reason = io.open(path, "rb")
  local size_bytes = file and file:seek("end")
  if not (size_bytes and size_bytes < 2 ^ 53 and file:seek("set")) then
    if file then file:close() end
    return report:problem(name, reason or "not a regular file")
  end
  local header = headers.read(file, size_bytes, function(words) report:problem(name, words) end)
  file:close()
  report.files[#report.files + 1] = { name = name, size_bytes = size_bytes, tensors = #header.tensors }
  for _, tensor in ipairs(header.tensors) do
    local kind = types.by_name[tensor.type]
    report:add({ name = tensor.name, dtype = tensor.type, shape = tensor.shape, count = tensor.count, file = name,
      path = path, size_bytes = tensor.size_bytes, at = tensor.at, element = tensor.at and kind.bytes,
      bits = not DENSE[tensor.type] and kind.bytes * 8 / kind.block or nil })
  end
  if header.version then describe(report, header) end
  if header.is_complete then compare(report, name, header) end
end

return M
