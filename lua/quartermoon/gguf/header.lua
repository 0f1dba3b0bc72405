---What a GGUF file says before its data begins: metadata and the list of tensors. No number in the file is
---trusted: every length and count is held against the bytes that are there before anything is made of it.
---
---Source: https://github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.

local ffi = require("ffi")
local bit = require("bit")
local types = require("quartermoon.gguf.types")

local band = bit.band

local M = {}

local PIECE_BYTES = 2 ^ 18
local KEY_BYTES_MAX, STRING_BYTES_MAX, NESTED_MAX = 65535, 2 ^ 26, 8
local ELEMENTS_MAX = 2 ^ 25 -- of all arrays together; each becomes a Lua value
local KEY_BYTES_MIN, TENSOR_BYTES_MIN = 8 + 4 + 1, 8 + 4 + 4 + 8

---A file read from its beginning on.
local Cursor = {}
Cursor.__index = Cursor

local STOP = {}

---What makes the rest unreadable.
function Cursor:stop(format, ...)
  self.problem(format:format(...))
  error(STOP, 0)
end

function Cursor:left() return self.size_bytes - self.at end

---The next bytes, as a string.
function Cursor:take(count, what)
  if count > self:left() then
    self:stop("%s takes %.0f bytes, but only %.0f are left: the file is truncated", what, count, self:left())
  end
  while #self.buffer - self.used < count do
    local piece = self.file:read(math.max(PIECE_BYTES, count))
    if not piece then self:stop("%s: the file ended while it was read", what) end
    self.buffer, self.used = self.buffer:sub(self.used + 1) .. piece, 0
  end
  self.used, self.at = self.used + count, self.at + count
  return self.buffer:sub(self.used - count + 1, self.used)
end

---A name in a message: controls must not reach a terminal, nor a megabyte.
local function shown(text)
  if #text > 80 then text = text:sub(1, 77) .. "..." end
  return (text:gsub("[%z\1-\31\127]", "?"))
end

---Is it a NaN, by its bits? LuaJIT may take one out of memory for another type.
local function is_nan(c_type, bytes, i)
  local words = ffi.cast("const uint32_t *", bytes)
  if c_type == "float" then return band(words[i], 0x7fffffff) > 0x7f800000 end
  if c_type ~= "double" then return false end
  local high = band(words[2 * i + 1], 0x7fffffff)
  return high > 0x7ff00000 or high == 0x7ff00000 and words[2 * i] ~= 0
end

---Number i of those that lie in a string. A whole number is Lua's where that is exact, else an int64_t or
---uint64_t.
local function number_of(bytes, c_type, i)
  if is_nan(c_type, bytes, i) then return 0 / 0 end
  local value = ffi.cast("const " .. c_type .. " *", bytes)[i]
  if type(value) == "number" then return value end
  local number = tonumber(value)
  return math.abs(number) <= 2 ^ 53 and number or value
end

---A count or a length. One beyond 2^53 is more than any file holds.
function Cursor:count(what)
  return tonumber(ffi.cast("const uint64_t *", self:take(8, what))[0])
end

function Cursor:u32(what) return number_of(self:take(4, what), "uint32_t", 0) end

function Cursor:string(what, limit)
  local size = self:count("the length of " .. what)
  if size > self:left() then
    self:stop("%s has %.0f bytes, but only %.0f are left: the file is truncated", what, size, self:left())
  end
  if size > limit then self:stop("%s has %.0f bytes; at most %.0f are read", what, size, limit) end
  return self:take(size, what)
end

---------------------------------------------------------------------------------------------------
-- Metadata
---------------------------------------------------------------------------------------------------

local read_array

---Value i of those that lie in a string.
function Cursor:scalar(kind, label, bytes, i)
  local value = number_of(bytes, kind[2], i)
  if kind[1] ~= "bool" then return value end
  if value > 1 then self:stop("%s: a boolean of %d, neither 0 nor 1", label, value) end
  return value == 1
end

local function read_value(self, id, label, depth)
  local kind = types.values[id]
  if not kind then self:stop("%s: its type is %.0f, which is none", label, id) end
  if kind[1] == "string" then return self:string(label, STRING_BYTES_MAX), "string" end
  if kind[1] == "array" then return read_array(self, label, depth) end
  return self:scalar(kind, label, self:take(kind[3], label), 0), kind[1]
end

function read_array(self, label, depth)
  if depth >= NESTED_MAX then self:stop("%s: arrays in each other, %d deep", label, depth) end
  local id = self:u32(label)
  local kind = types.values[id]
  if not kind then self:stop("%s: the type of its elements is %.0f, which is none", label, id) end
  local count = self:count(label)
  if count * kind[3] > self:left() then
    self:stop("%s: %.0f elements of at least %d bytes, but only %.0f bytes are left: the file is truncated", label,
      count, kind[3], self:left())
  end
  self.elements = self.elements + count
  if self.elements > ELEMENTS_MAX then
    self:stop("%s: with its %.0f elements the arrays have more than %.0f", label, count, ELEMENTS_MAX)
  end
  local list, bytes = {}, kind[2] and self:take(count * kind[3], label)
  for i = 1, count do
    if bytes then
      list[i] = self:scalar(kind, label, bytes, i - 1)
    else
      list[i] = read_value(self, id, label, depth + 1)
    end
  end
  return list, kind[1] .. "[]"
end

local function read_metadata(self, header, count)
  for i = 1, count do
    local key = self:string(("key %d of the metadata"):format(i), KEY_BYTES_MAX)
    local label = "key '" .. shown(key) .. "'"
    if key == "" then self:stop("key %d of the metadata is empty", i) end
    local value, kind = read_value(self, self:u32(label), label, 0)
    if header.types[key] then
      self.problem(label .. " stands there twice")
    else
      header.keys[#header.keys + 1] = key
      header.metadata[key], header.types[key] = value, kind
    end
  end
  local alignment, kind = header.metadata["general.alignment"], header.types["general.alignment"]
  if alignment == nil then return end
  -- A power of two, as ggml wants it.
  if kind ~= "u32" or alignment < 1 or 2 ^ math.floor(math.log(alignment) / math.log(2) + 0.5) ~= alignment then
    self:stop("key 'general.alignment': expected a u32 that is a power of 2, got %s %s", kind, tostring(alignment))
  end
  header.alignment = alignment
end

---------------------------------------------------------------------------------------------------
-- Tensors
---------------------------------------------------------------------------------------------------

---The extents, the contiguous one first as the file has them. @return integer[]|nil  nil: a problem was noted
local function read_dimensions(self, label)
  local dimensions = self:u32(label)
  if dimensions > 4 then self:stop("%s: %.0f dimensions are more than 4", label, dimensions) end
  local extents, count = {}, 1
  for i = 1, dimensions do
    extents[i] = self:count(label)
    count = count * extents[i]
  end
  if count < 2 ^ 53 then return extents, count end
  self.problem(("%s: its extents %s make no sense"):format(label, table.concat(extents, " x ")))
end

local function read_tensor(self, header, i)
  local name = self:string(("the name of tensor %d"):format(i), KEY_BYTES_MAX)
  local label = "tensor '" .. shown(name) .. "'"
  local function bad(format, ...) self.problem(label .. ": " .. format:format(...)) end
  if name == "" or #name > types.NAME_BYTES_MAX then
    bad("its name has %d bytes, not 1 to %d", #name, types.NAME_BYTES_MAX)
  end
  local extents, count = read_dimensions(self, label)
  local id, offset = self:u32(label), self:count(label)
  local kind = types.tensors[id]
  if not kind then return bad("type %.0f is not known", id) end
  if not extents then return end
  local row = extents[1] or 1
  if row % kind.block ~= 0 then
    return bad("rows of %.0f elements are no whole blocks of %s, which has %d", row, kind.name, kind.block)
  end
  if offset % header.alignment ~= 0 then
    return bad("it begins at byte %.0f of the data, no multiple of the alignment %d", offset, header.alignment)
  end
  if header.by_name[name] then return bad("it stands there twice") end
  local shape = {}
  for d = #extents, 1, -1 do shape[#shape + 1] = extents[d] end
  local tensor = { name = name, type = kind.name, shape = shape, count = count, offset = offset,
    size_bytes = count / kind.block * kind.bytes }
  header.tensors[#header.tensors + 1], header.by_name[name] = tensor, tensor
end

---Are the tensors within the data, one behind the other, with nothing between or behind them?
local function check_places(self, header)
  local data_bytes = self.size_bytes - header.data_at
  local placed = {}
  for i, tensor in ipairs(header.tensors) do placed[i] = tensor end
  table.sort(placed, function(a, b) return a.offset < b.offset or a.offset == b.offset and a.name < b.name end)
  local covered, before = 0, nil
  for _, tensor in ipairs(placed) do
    local stop = tensor.offset + tensor.size_bytes
    if tensor.offset < covered and tensor.size_bytes > 0 then
      self.problem(("tensor '%s' overlaps tensor '%s' (it begins at byte %.0f of the data, inside)"):format(
        shown(tensor.name), shown(before.name), tensor.offset))
    elseif tensor.offset > types.align(covered, header.alignment) then
      self.problem(("bytes %.0f to %.0f of the data belong to no tensor"):format(covered, tensor.offset))
    end
    if stop > data_bytes then
      self.problem(("tensor '%s': it ends at byte %.0f of the data, but there are %.0f: the file is truncated"):format(
        shown(tensor.name), stop, math.max(data_bytes, 0)))
    else
      tensor.at = header.data_at + tensor.offset
    end
    if stop > covered then covered, before = stop, tensor end
  end
  local behind = data_bytes - types.align(covered, header.alignment)
  if behind > 0 and header.is_complete then self.problem(("%.0f bytes behind the last tensor"):format(behind)) end
end

---------------------------------------------------------------------------------------------------

local function read(self, header)
  if self:take(4, "the beginning") ~= "GGUF" then self:stop("it does not begin with 'GGUF'") end
  header.version = self:u32("the version")
  if header.version % 65536 == 0 and header.version > 0 then
    self:stop("its numbers lie the other way round (big-endian), which is not read")
  end
  if header.version ~= 2 and header.version ~= 3 then
    self:stop("version %.0f is not known, only 2 and 3", header.version)
  end
  local tensors, keys = self:count("the number of tensors"), self:count("the number of keys")
  if tensors * TENSOR_BYTES_MIN + keys * KEY_BYTES_MIN > self:left() then
    self:stop("%.0f tensors and %.0f keys are said to follow in %.0f bytes", tensors, keys, self:left())
  end
  read_metadata(self, header, keys)
  for i = 1, tensors do read_tensor(self, header, i) end
  header.data_at = types.align(self.at, header.alignment)
  header.is_complete = #header.tensors == tensors
  check_places(self, header)
end

---@class qm.GgufHeader
---@field version integer
---@field alignment integer
---@field metadata table<string, any>   numbers, booleans, strings, lists; 64-bit integers beyond 2^53 as cdata
---@field types table<string, string>   of the metadata: "u32", "string[]" ...
---@field keys string[]                 of the metadata, in the file's order
---@field tensors table[]               { name, type, shape (rows first), count, offset, size_bytes, at }; at: where it
---   begins in the file, nil where that is beyond its end
---@field by_name table<string, table>

---Read a file's header.
---@param file file*            open, at its beginning
---@param size_bytes number     of the file
---@param problem fun(words: string)  told all that is wrong; may raise. What follows is read where it can be
---@return qm.GgufHeader
function M.read(file, size_bytes, problem)
  local cursor = setmetatable({ file = file, size_bytes = size_bytes, problem = problem, buffer = "", used = 0, at = 0,
    elements = 0 }, Cursor)
  local header = { alignment = types.ALIGNMENT, metadata = {}, types = {}, keys = {}, tensors = {}, by_name = {} }
  local ok, message = pcall(read, cursor, header)
  if not ok and message ~= STOP then error(message, 0) end
  return header
end

return M
