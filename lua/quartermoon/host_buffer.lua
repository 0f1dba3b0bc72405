---Buffers in host memory that Lua fills element by element, and a check that memory that is not such
---a buffer is never written to or read from.

local ffi = require("ffi")
local check = require("quartermoon.check")
local dtypes = require("quartermoon.dtypes")

local M = {}

local ELEMENT = { f32 = "float", i8 = "int8_t", u8 = "uint8_t", i16 = "int16_t", i32 = "int32_t", i64 = "int64_t" }
local rooms = setmetatable({}, { __mode = "k" }) -- { type, elements } of every buffer made here

---Zeroed memory for `count` elements, and no protection. LuaJIT makes objects of less than 2 GiB.
function M.memory(name, dtype, count)
  if count * dtypes.size[dtype] >= 2 ^ 31 then
    check.fail(name, "count", "less than 2 GiB of " .. dtype .. " in host memory", count)
  end
  return ffi.new(ELEMENT[dtype] .. "[?]", math.max(count, 1))
end

---Host memory for `count` elements, to index from 0. Indices are not checked. Without f16 and bf16,
---which Lua cannot read.
function M.new(dtype, count)
  check.one_of("host_buffer", "dtype", dtype, { "f32", "i8", "u8", "i16", "i32", "i64" })
  check.integer("host_buffer", "count", count, 0)
  local buffer = M.memory("host_buffer", dtype, count)
  rooms[buffer] = { dtype, count }
  return buffer
end

---Raise unless `buffer` was made here, of this type (nil: any), with room for `count` elements.
function M.check(name, buffer, count, dtype)
  local room = type(buffer) == "cdata" and rooms[buffer]
  if not room or room[2] < count or (dtype and room[1] ~= dtype) then
    check.fail(name, "buffer", ("a host buffer of %d %s"):format(count, dtype or "elements"), buffer)
  end
end

---The same for a buffer of any type with `size_bytes` bytes.
function M.check_bytes(name, buffer, size_bytes)
  local room = type(buffer) == "cdata" and rooms[buffer]
  if not room or room[2] * ffi.sizeof(ELEMENT[room[1]]) < size_bytes then
    check.fail(name, "bytes", ("a string, or a host buffer of %d bytes"):format(size_bytes), buffer)
  end
end

return M
