---Bytes and characters: UTF-8, GPT-2's printable names for bytes, normal forms.

local ffi = require("ffi")

local M = {}

---The UTF-8 bytes of a code point.
function M.char(code)
  local floor, char = math.floor, string.char
  if code < 0x80 then return char(code) end
  if code < 0x800 then return char(0xC0 + floor(code / 64), 0x80 + code % 64) end
  if code < 0x10000 then
    return char(0xE0 + floor(code / 4096), 0x80 + floor(code / 64) % 64, 0x80 + code % 64)
  end
  return char(0xF0 + floor(code / 262144), 0x80 + floor(code / 4096) % 64, 0x80 + floor(code / 64) % 64,
    0x80 + code % 64)
end

---Length of the character that begins at byte `at`, from 1: 1 to 4, and 1 for a byte that begins none.
function M.char_size(text, at)
  local byte = text:byte(at)
  local size = byte < 0x80 and 1 or byte >= 0xF0 and byte < 0xF8 and 4 or byte >= 0xE0 and 3
    or byte >= 0xC2 and 2 or 1
  if at + size - 1 > #text then return 1 end
  for i = at + 1, at + size - 1 do
    local next_byte = text:byte(i)
    if next_byte < 0x80 or next_byte > 0xBF then return 1 end
  end
  return size
end

---How many bytes at the end of text are the beginning of a character whose rest is still to come.
function M.incomplete_tail(text)
  for back = 1, math.min(3, #text) do
    local byte = text:byte(-back)
    if byte >= 0xC2 and byte < 0xF5 then
      local size = byte >= 0xF0 and 4 or byte >= 0xE0 and 3 or 2
      return size > back and back or 0
    end
    if byte < 0x80 or byte > 0xBF then return 0 end
  end
  return 0
end

-- GPT-2 writes each byte as one printable character: printable Latin-1 as itself, the others from
-- U+0100 on, in order.
local name_of, byte_of = {}, {}
do
  local extra = 0
  for byte = 0, 255 do
    local printable = byte >= 33 and byte <= 126 or byte >= 161 and byte <= 172 or byte >= 174
    local code = byte
    if not printable then code, extra = 256 + extra, extra + 1 end
    name_of[byte] = M.char(code)
    byte_of[name_of[byte]] = string.char(byte)
  end
end
M.byte_name = name_of -- [0 .. 255]

---The bytes that such a word stands for, or nil where it holds another character.
function M.bytes_of_names(word)
  local parts, at = {}, 1
  while at <= #word do
    local size = M.char_size(word, at)
    local byte = byte_of[word:sub(at, at + size - 1)]
    if not byte then return nil end
    parts[#parts + 1], at = byte, at + size
  end
  return table.concat(parts)
end

if not pcall(ffi.typeof, "struct qm_utf8proc") then
  ffi.cdef([[
  struct qm_utf8proc { int unused; };
  ssize_t utf8proc_map(const uint8_t *text, ssize_t length, uint8_t **out, int options);
  void free(void *memory);
  ]])
end
local STABLE, COMPAT, COMPOSE, DECOMPOSE = 2, 4, 8, 16
local FORMS = { NFC = STABLE + COMPOSE, NFD = STABLE + DECOMPOSE, NFKC = STABLE + COMPOSE + COMPAT,
  NFKD = STABLE + DECOMPOSE + COMPAT }

---A text in a Unicode normal form, through libutf8proc; text that is not UTF-8 stays as it is.
---@param form string  "NFC", "NFD", "NFKC", "NFKD"
function M.normalize(text, form)
  if not text:find("[\128-\255]") then return text end
  local ok, library = pcall(ffi.load, "libutf8proc.so.2")
  if not ok then error("libutf8proc is not here; Debian has it as libutf8proc2", 0) end
  local out = ffi.new("uint8_t *[1]")
  local size = tonumber(library.utf8proc_map(text, #text, out, FORMS[form]))
  if size < 0 then return text end
  local normal = ffi.string(out[0], size)
  ffi.C.free(out[0])
  return normal
end

return M
