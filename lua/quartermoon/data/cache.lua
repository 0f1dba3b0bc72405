---Text to tokens once: a file of token ids beside the text (or in a cache folder), mapped ever after.
---
---"<text>.tokens" holds the ids, u8 or i32, and "<text>.tokens.json" what they were made from. A
---changed text or tokenizer is noticed by its checksum, and the file is made anew.

local binding = require("quartermoon.ffi")
local files = require("quartermoon.files")
local tensors = require("quartermoon.tensor")
local split = require("quartermoon.tokenizer.split")

local M = {}

local CHUNK_BYTES = 2 ^ 20
local VERSION = 1

---Checksum of a file's bytes, and their number.
local function checksum_file(name, path)
  local file, reason = io.open(path, "rb")
  if not file then binding.raise(name .. ": " .. reason) end
  local hex, state = files.checksum("")
  local size = 0
  while true do
    local text, why = file:read(CHUNK_BYTES)
    if why then
      file:close()
      binding.raise(("%s: %s: %s"):format(name, path, why))
    end
    if not text then break end
    hex, state = files.checksum(text, state)
    size = size + #text
  end
  file:close()
  return hex, size
end

---Encode `text`, whose documents `delimiter` separates, and call put(buffer, count) with the ids.
---@return string rest  what must wait for more text
local function encode_part(self, text, last)
  local tokenizer, delimiter = self.tokenizer, self.delimiter
  local at = 1
  while delimiter do
    local from, to = text:find(delimiter, at, true)
    if not from then break end
    local count = tokenizer:encode_into(text:sub(at, from - 1), self.buffer, 0)
    self.buffer[count] = self.end_id
    self.put(self.buffer, count + 1)
    at = to + 1
  end
  local rest = text:sub(at)
  -- Half a delimiter may stand at the end, and a piece ends for certain only before white space.
  local cut = last and #rest or split.safe_end(rest:sub(1, #rest - (delimiter and #delimiter - 1 or 0)))
  if cut > 0 then self.put(self.buffer, tokenizer:encode_into(rest:sub(1, cut), self.buffer, 0)) end
  return rest:sub(cut + 1)
end

local function encode_file(name, path, self, writer)
  local size, element, total = 0, tensors.dtype_size[self.dtype], 0
  self.buffer = tensors.host_buffer(self.dtype, 1)
  self.put = function(buffer, count)
    if count > 0 then writer:write(buffer, count * element) end
    total = total + count
  end
  local file = assert(io.open(path, "rb"))
  local rest = ""
  repeat
    local text, why = file:read(CHUNK_BYTES)
    if why then
      file:close()
      binding.raise(("%s: %s: %s"):format(name, path, why))
    end
    rest = rest .. (text or "")
    if #rest + 1 > size then
      size = 2 * #rest + 1
      self.buffer = tensors.host_buffer(self.dtype, size)
    end
    rest = encode_part(self, rest, text == nil)
  until not text
  file:close()
  return total
end

local function matches(saved, wanted, tokens_path)
  if type(saved) ~= "table" then return false end
  for key, value in pairs(wanted) do if saved[key] ~= value then return false end end
  local element = tensors.dtype_size[wanted.dtype]
  return type(saved.tokens) == "number" and files.size(tokens_path) == saved.tokens * element
end

---The tokens of a text as a mapped tensor, from the cache where it still holds.
---@param name string       the public function, for messages
---@param path string       the text
---@param tokenizer qm.Tokenizer
---@param options table     { cache_dir, delimiter, end_id }
---@return qm.Tensor tokens  u8 or i32 [tokens], read-only, on the CPU
---@return boolean made      false where the cache served
function M.tokens(name, path, tokenizer, options)
  local folder, base = files.split(path)
  if options.cache_dir then folder = (options.cache_dir:gsub("/*$", "/")) end
  local tokens_path = folder .. base .. ".tokens"
  local dtype = tokenizer.vocab_size <= 256 and "u8" or "i32"
  local text_checksum, text_bytes = checksum_file(name, path)
  local wanted = { format = "quartermoon-tokens", version = VERSION, text_bytes = text_bytes,
    text_checksum = text_checksum, tokenizer = tokenizer:fingerprint(), dtype = dtype,
    delimiter = options.delimiter or "" }
  if matches(files.read_json(tokens_path .. ".json"), wanted, tokens_path) then
    return tensors.map_file(tokens_path, dtype), false
  end
  -- The description goes first and comes last: tokens are never described by another text's.
  os.remove(tokens_path .. ".json")
  local writer = files.create(tokens_path)
  local ok, message = pcall(function()
    wanted.tokens = encode_file(name, path, { tokenizer = tokenizer, dtype = dtype, delimiter = options.delimiter,
      end_id = options.end_id }, writer)
    writer:commit()
    files.write_json(tokens_path .. ".json", wanted)
  end)
  writer:close()
  if not ok then error(message, 0) end
  return tensors.map_file(tokens_path, dtype), true
end

return M
