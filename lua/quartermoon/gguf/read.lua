---Reading GGUF files: metadata, and tensors by name. Nothing is mapped, so that a file which somebody truncates
---gives an error and no signal.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local blocks = require("quartermoon.gguf.blocks")
local check = require("quartermoon.check")
local headers = require("quartermoon.gguf.header")
local host_buffer = require("quartermoon.host_buffer")
local tensors = require("quartermoon.tensor")
local types = require("quartermoon.gguf.types")

local M = {}

---The types that our tensors have too.
M.DTYPE = { F32 = "f32", F16 = "f16", BF16 = "bf16", I8 = "i8", I16 = "i16", I32 = "i32", I64 = "i64" }

local PIECE_BYTES = 2 ^ 22

---An open file.
---@class qm.GgufFile
---@field path string
---@field version integer
---@field alignment integer
---@field metadata table<string, any>   see qm.GgufHeader
---@field types table<string, string>   of the metadata
---@field keys string[]                 of the metadata, in the file's order
local File = {}
File.__index = File

---Open a file and check all of it but the tensors' values.
---@param path string
---@return qm.GgufFile
---@raise when the file is missing, unreadable or not in order, naming it, the key or tensor, and the reason
function M.open(path)
  local name = "qm.gguf.open"
  check.type(name, "path", path, "string")
  local file, reason = io.open(path, "rb")
  if not file then binding.raise(("%s: %s"):format(name, reason)) end
  local ok, header = pcall(function()
    local size_bytes = file:seek("end")
    if not size_bytes or size_bytes >= 2 ^ 53 or not file:seek("set") then error("not a regular file", 0) end
    return headers.read(file, size_bytes, function(words) error(words, 0) end)
  end)
  if not ok then
    file:close()
    binding.raise(("%s: %s: %s"):format(name, path, header))
  end
  local self = setmetatable({ path = path, header = header, file = file }, File)
  for _, field in ipairs({ "version", "alignment", "metadata", "types", "keys" }) do self[field] = header[field] end
  return self
end

local function entry(self, name, key)
  if not self.file then binding.raise(("%s: %s is closed"):format(name, self.path)) end
  check.type(name, "name", key, "string")
  local found = self.header.by_name[key]
  if found then return found end
  local near = check.nearest(key, self:names())
  binding.raise(("%s: %s holds no tensor '%s'%s"):format(name, self.path, key,
    near and ", did you mean '" .. near .. "'?" or ""))
end

---The tensors' names, in the file's order.
---@return string[]
function File:names()
  local names = {}
  for i, tensor in ipairs(self.header.tensors) do names[i] = tensor.name end
  return names
end

---@return boolean
function File:has(key) return self.header.by_name[key] ~= nil end

---A tensor's type and extents, rows first: [outputs, inputs] of a linear layer.
---@return string type       "F32", "Q4_0" ...
---@return integer[] shape
---@return integer size_bytes
function File:info(key)
  local found, shape = entry(self, "file:info", key), {}
  for i, extent in ipairs(found.shape) do shape[i] = extent end
  return found.type, shape, found.size_bytes
end

---Call visit(bytes, first) with pieces of a tensor, whole blocks each; `first` counts bytes from 0.
local function each_piece(self, found, visit)
  local block = types.by_name[found.type].bytes
  local step = PIECE_BYTES - PIECE_BYTES % block
  self.file:seek("set", found.at)
  for first = 0, found.size_bytes - 1, step do
    local size = math.min(step, found.size_bytes - first)
    local piece, reason = self.file:read(size)
    if not piece or #piece < size then
      binding.raise(("file:tensor: %s: tensor '%s': %s"):format(self.path, found.name,
        reason or "the file is truncated"))
    end
    visit(piece, first)
  end
end

---Blocks as f32.
local function decoded(self, found, device)
  local kind, out = types.by_name[found.type], host_buffer.new("f32", found.count)
  each_piece(self, found, function(piece, first)
    blocks.decode(kind, ffi.cast("const uint8_t *", piece), #piece / kind.bytes, out, first / kind.bytes * kind.block)
  end)
  local flat = tensors.from_host(out, found.count, "f32", { device = device })
  local x = flat:view_as("file:tensor", found.shape)
  flat:free()
  return x
end

---Values that our tensors have too.
local function copied(self, found, dtype, device)
  local x = tensors.empty(found.shape, { dtype = dtype, device = device })
  local bytes = x:reinterpret("u8", { found.size_bytes })
  each_piece(self, found, function(piece, first)
    local from = tensors.from_string(piece, { device = x.device })
    local to = bytes:view_rows("file:tensor", first + 1, #piece)
    to:copy(from)
    from:free()
    to:free()
  end)
  bytes:free()
  return x
end

---A new tensor with the values of the one called `key`: of its own type, or f32 from Q4_0, Q4_1 and Q8_0.
---@param key string
---@param device string|qm.Device|nil  default: the default device
---@return qm.Tensor  rows first, as info says
---@raise when the type is another
function File:tensor(key, device)
  local found = entry(self, "file:tensor", key)
  local place = ("%s: tensor '%s'"):format(self.path, key)
  if blocks.has(types.by_name[found.type]) then
    return binding.naming("file:tensor", place, decoded, self, found, device)
  end
  local dtype = M.DTYPE[found.type]
  if not dtype then
    binding.raise(("file:tensor: %s: tensor '%s': values of type %s are not read here"):format(self.path, key,
      found.type))
  end
  return binding.naming("file:tensor", place, copied, self, found, dtype, device)
end

---Close the file. Closing twice is harmless; tensors that were read stay.
function File:close()
  if self.file then self.file:close() end
  self.file = nil
end

function File:__tostring()
  return ("qm.gguf '%s', %d tensors%s"):format(self.path, #self.header.tensors, self.file and "" or ", closed")
end
File.describe = File.__tostring

---Open `path`, run `body(file)`, close it again whatever happens.
---@return any ...  what body returns
function M.with(path, body)
  local file = M.open(path)
  local function close(ok, ...)
    file:close()
    if not ok then error((...), 0) end
    return ...
  end
  return close(pcall(body, file))
end

check.methods("qm.GgufFile", File)
assert(ffi.abi("le"), "GGUF files are read and written as this machine has its numbers: little-endian")

return M
