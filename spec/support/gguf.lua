-- GGUF files by hand: bytes put together as the format's description has them, without the writer.
local bit = require("bit")

local M = {}

---A whole number in so many bytes, the least first.
function M.integer(value, bytes)
  local out = {}
  for i = 1, bytes do out[i], value = string.char(value % 256), math.floor(value / 256) end
  return table.concat(out)
end
local function u32(value) return M.integer(value, 4) end
local function u64(value) return M.integer(value, 8) end
function M.text(value) return u64(#value) .. value end

---An entry of the metadata: its type's number, and the value's bytes.
function M.key(key, kind, bytes) return M.text(key) .. u32(kind) .. bytes end

---A tensor's entry; extents as they stand in the file, the contiguous one first.
function M.info(name, extents, kind, offset)
  local out = { M.text(name), u32(#extents) }
  for _, extent in ipairs(extents) do out[#out + 1] = u64(extent) end
  return table.concat(out) .. u32(kind) .. u64(offset)
end

---A file. @param parts table  { version = 3, magic = "GGUF", keys = {}, infos = {}, data = "", align = 32 }
function M.file(parts)
  local keys, infos = parts.keys or {}, parts.infos or {}
  local head = (parts.magic or "GGUF") .. u32(parts.version or 3) .. u64(parts.tensor_count or #infos)
    .. u64(parts.key_count or #keys) .. table.concat(keys) .. table.concat(infos)
  local align = parts.align or 32
  return head .. ("\0"):rep(bit.band(-#head, align - 1)) .. (parts.data or "")
end

---Bytes from hexadecimal digits.
function M.hex(digits)
  return (digits:gsub("%s", ""):gsub("%x%x", function(pair) return string.char(tonumber(pair, 16)) end))
end

return M
