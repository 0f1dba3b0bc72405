---Writing GGUF files of version 3, atomically: until everything is on the disk the old file stays as it is.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local files = require("quartermoon.files")
local read = require("quartermoon.gguf.read")
local types = require("quartermoon.gguf.types")

local M = {}

local PIECE_BYTES = 2 ^ 24

local GGUF_TYPE = {}
for kind, dtype in pairs(read.DTYPE) do GGUF_TYPE[dtype] = kind end

---------------------------------------------------------------------------------------------------
-- Metadata
---------------------------------------------------------------------------------------------------

local function packed(c_type, value) return ffi.string(ffi.new(c_type .. "[1]", value), ffi.sizeof(c_type)) end
local function u32(value) return packed("uint32_t", value) end
local function u64(value) return packed("uint64_t", value) end
local function text(value) return u64(#value) .. value end

local RANGE = { u8 = { 0, 2 ^ 8 - 1 }, i8 = { -2 ^ 7, 2 ^ 7 - 1 }, u16 = { 0, 2 ^ 16 - 1 },
  i16 = { -2 ^ 15, 2 ^ 15 - 1 }, u32 = { 0, 2 ^ 32 - 1 }, i32 = { -2 ^ 31, 2 ^ 31 - 1 }, u64 = { 0, 2 ^ 53 },
  i64 = { -2 ^ 53, 2 ^ 53 } }

local function encode(name, what, kind, value)
  if kind == "string" then return text(check.type(name, what, value, "string")) end
  if kind == "bool" then return check.type(name, what, value, "boolean") and "\1" or "\0" end
  local id = types.value_id[kind]
  local range, c_type = RANGE[kind], types.values[id][2]
  if ffi.istype("uint64_t", value) and kind == "u64" or ffi.istype("int64_t", value) and kind == "i64" then
    return packed(c_type, value)
  end
  if range then check.integer(name, what, value, range[1], range[2]) else check.type(name, what, value, "number") end
  return packed(c_type, value)
end

---One entry: { key, type, value }, the type as qm.GgufFile has them.
local function encode_entry(name, entry)
  local key, kind, value = entry[1], entry[2], entry[3]
  local what = "metadata." .. key
  local element = check.type(name, what .. ", type", kind, "string"):match("^(.*)%[%]$")
  local id = types.value_id[element or kind]
  if not id or id == types.value_id.array then check.fail(name, what, "a type of GGUF's scalars or string", kind) end
  if not element then return text(key) .. u32(id) .. encode(name, what, kind, value) end
  local parts = { text(key), u32(types.value_id.array), u32(id), u64(#check.type(name, what, value, "table")) }
  for i, inner in ipairs(value) do parts[#parts + 1] = encode(name, what .. "[" .. i .. "]", element, inner) end
  return table.concat(parts)
end

---------------------------------------------------------------------------------------------------
-- Tensors
---------------------------------------------------------------------------------------------------

---Hand a dense tensor's bytes to `put`, in pieces of its rows.
function M.put_tensor(x, put)
  local rows = x.shape[1]
  if not rows or x:size_bytes() <= PIECE_BYTES then return put(x:bytes()) end
  local step = math.max(1, math.floor(PIECE_BYTES / (x:size_bytes() / rows)))
  for first = 1, rows, step do
    local piece = x:view_rows("qm.gguf.save", first, math.min(step, rows - first + 1))
    put(piece:bytes())
    piece:free()
  end
end

---What a part is: its type, extents and how its bytes come.
local function describe(name, part, seen)
  local key, value = part[1], part[2]
  if type(key) ~= "string" or key == "" or #key > types.NAME_BYTES_MAX or seen[key] then
    check.fail(name, "tensors", ("different names of 1 to %d bytes"):format(types.NAME_BYTES_MAX), key)
  end
  seen[key] = true
  local kind, shape, write
  if check.is_tensor(value) then
    value:alive(name .. ": tensor '" .. key .. "'")
    kind, shape, write = GGUF_TYPE[value.dtype], value.shape, function(put) M.put_tensor(value, put) end
  else
    check.type(name, "tensors." .. key, value, "table")
    kind, shape = value.type, value.shape
    write = check.type(name, "tensors." .. key .. ".write", value.write, "function")
  end
  local known = types.by_name[kind] or check.fail(name, "tensors." .. key, "a type that GGUF has", value.dtype or kind)
  local count = 1
  for i, extent in ipairs(check.type(name, "tensors." .. key .. ".shape", shape, "table")) do
    count = count * check.integer(name, ("tensors.%s.shape[%d]"):format(key, i), extent, 0, 2 ^ 53)
  end
  if #shape > 4 then check.fail(name, "tensors." .. key .. ".shape", "at most 4 dimensions", #shape) end
  if (shape[#shape] or 1) % known.block ~= 0 then
    check.fail(name, "tensors." .. key, ("rows of whole blocks of %d"):format(known.block), shape[#shape])
  end
  return { name = key, kind = known, shape = shape, size_bytes = count / known.block * known.bytes, write = write }
end

local function header_of(name, list, metadata)
  check.type(name, "metadata", metadata, "table")
  local parts, seen = { "GGUF", u32(3), u64(#list), u64(#metadata) }, {}
  for i, entry in ipairs(metadata) do
    check.type(name, ("metadata[%d]"):format(i), entry, "table")
    local key = entry[1]
    if type(key) ~= "string" or key == "" or #key > 65535 or seen[key] then
      check.fail(name, ("metadata[%d]"):format(i), "different keys of 1 to 65535 bytes", key)
    end
    if key == "general.alignment" then check.fail(name, "metadata", "no general.alignment: it is 32", entry[3]) end
    seen[key] = true
    parts[#parts + 1] = encode_entry(name, entry)
  end
  local offset = 0
  for _, part in ipairs(list) do
    parts[#parts + 1] = text(part.name) .. u32(#part.shape)
    for i = #part.shape, 1, -1 do parts[#parts + 1] = u64(part.shape[i]) end
    parts[#parts + 1] = u32(part.kind.id) .. u64(offset)
    offset = types.align(offset + part.size_bytes, types.ALIGNMENT)
  end
  return table.concat(parts)
end

local function write_all(name, writer, path, header, list)
  local function pad(size) writer:write(("\0"):rep(types.align(size, types.ALIGNMENT) - size)) end
  writer:write(header)
  pad(#header)
  for _, part in ipairs(list) do
    local size = 0
    part.write(function(bytes, size_bytes)
      writer:write(bytes, size_bytes)
      size = size + (size_bytes or #bytes)
    end)
    if size ~= part.size_bytes then
      binding.raise(("%s: %s: tensor '%s': %.0f bytes were written, its extents take %.0f"):format(name, path,
        part.name, size, part.size_bytes))
    end
    pad(size)
  end
end

---Write tensors and metadata to a file, atomically, by way of "<path>.partial".
---@param path string
---@param parts table     { { name, tensor }, ... }; in the place of a tensor may stand { type = "Q4_0" ...,
---   shape = rows first, write = function(put) }, which gives its bytes in order: put(string), or put(host buffer,
---   bytes)
---@param metadata table  { { key, type, value }, ... }, the types as in qm.GgufFile: "u32", "f32", "bool",
---   "string", "string[]" ...
---@raise when anything does not fit or cannot be written; nothing is left behind then
function M.save(path, parts, metadata)
  local name = "qm.gguf.save"
  check.type(name, "path", path, "string")
  local list, seen = {}, {}
  for i, part in ipairs(check.type(name, "tensors", parts, "table")) do
    list[i] = describe(name, check.type(name, ("tensors[%d]"):format(i), part, "table"), seen)
  end
  local header = header_of(name, list, metadata or {})
  local writer = files.create(path)
  local ok, message = pcall(write_all, name, writer, path, header, list)
  if ok then return writer:commit() end
  writer:close()
  error(message, 0)
end

return M
