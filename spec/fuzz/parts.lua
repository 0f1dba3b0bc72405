-- Inputs of several files, and files with tensors, as texts: a mutation of the text is a folder with other
-- files or a tensor of another shape, not a broken container (the targets safetensors and gguf do those).
--
--   == config.json
--   {"model_type": "llama", ...}
--   == model.safetensors
--   model.norm.weight F32 8
--   model.layers.0.mlp.up_proj.qweight I32 4 8 = 1 -2 77
--
-- A file's tensors stand one a line: name, type, extents, and values that are repeated until it is full
-- (without: 1 2 3 ...). Metadata stand in lines that begin with '#'.
local ffi = require("ffi")
local cjson = require("cjson")

local M = {}

local FILES_MAX, FILE_BYTES_MAX = 8, 2 ^ 18
local TYPES = { F32 = "float", F16 = "uint16_t", BF16 = "uint16_t", I8 = "int8_t", U8 = "uint8_t", I16 = "int16_t",
  I32 = "int32_t", I64 = "int64_t", F64 = "double", BOOL = "uint8_t", U16 = "uint16_t" }

---A tensor's bytes: the values again and again.
local function fill(type_name, values, size_bytes)
  local element = ffi.typeof(TYPES[type_name])
  local count = math.max(#values, 1)
  local block = ffi.new(ffi.typeof("$[?]", element), count)
  for i, value in ipairs(values) do block[i - 1] = value end
  local bytes = ffi.string(block, count * ffi.sizeof(element))
  return bytes:rep(math.ceil(size_bytes / #bytes)):sub(1, size_bytes)
end

---One line: nil where it is none.
local function tensor_of(line)
  local name, type_name, rest = line:match("^(%S+) (%u+%d*)(.*)$")
  if not name or not TYPES[type_name] then return nil end
  local extents, filling = rest:match("^([^=]*)=?(.*)$")
  local shape, values, count = {}, {}, 1
  for word in extents:gmatch("%S+") do
    local extent = tonumber(word)
    if not extent or extent % 1 ~= 0 or #shape > 6 then return nil end
    shape[#shape + 1], count = extent, count * extent
  end
  for word in filling:gmatch("%S+") do values[#values + 1] = tonumber(word) end
  if #values == 0 then values = { 1, 2, 3, 4, 5, 6, 7 } end
  local size = count * ffi.sizeof(TYPES[type_name])
  return { name = name, type = type_name, shape = shape, values = values,
    size_bytes = size >= 0 and size <= FILE_BYTES_MAX and size or 0 }
end

---The tensors that a text lists, in its order.
function M.tensors(text)
  local list, metadata = {}, {}
  for line in text:gmatch("[^\n]+") do
    local tensor = tensor_of(line)
    if tensor then
      list[#list + 1] = tensor
    else
      local key, value = line:match("^#%s*(%S+) (.*)$")
      if key then metadata[key] = value end
    end
  end
  return list, metadata
end

---A safetensors file with these tensors.
function M.safetensors(text)
  local entries, data, at = {}, {}, 0
  local list, metadata = M.tensors(text)
  if next(metadata) then entries[1] = '"__metadata__":' .. cjson.encode(metadata) end
  for _, tensor in ipairs(list) do
    if at + tensor.size_bytes > FILE_BYTES_MAX then break end
    entries[#entries + 1] = ('%s:{"dtype":"%s","shape":[%s],"data_offsets":[%.0f,%.0f]}'):format(
      cjson.encode(tensor.name), tensor.type, table.concat(tensor.shape, ","), at, at + tensor.size_bytes)
    data[#data + 1] = fill(tensor.type, tensor.values, tensor.size_bytes)
    at = at + tensor.size_bytes
  end
  local header = "{" .. table.concat(entries, ",") .. "}"
  return ffi.string(ffi.new("uint64_t[1]", #header), 8) .. header .. table.concat(data)
end

---Files by name, no more than a few, in this folder.
---@param default string  the first file, where the text names none
function M.split(text, default)
  local found, count = {}, 0
  local function add(name, content)
    if count >= FILES_MAX or name == "" or name == "." or name == ".." or name:find("[/%z]") or #name > 100 then
      return
    end
    count = count + 1
    found[name] = name:find("%.safetensors$") and M.safetensors(content) or content
  end
  local name, at = default, 1
  for begin, next_name, stop in text:gmatch("()== ([^\n]*)\n()") do
    if begin > at or at > 1 then add(name, text:sub(at, begin - 1)) end
    name, at = next_name, stop
  end
  add(name, text:sub(at))
  return found
end

return M
