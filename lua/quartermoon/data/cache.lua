---Text to tokens once: a file of token ids beside the text (or in a cache folder), mapped ever after.
---
---"<text>.<tokenizer>.tokens" holds the ids, u8 or i32, and the same with ".json" what they were made
---from. A changed text is noticed by its checksum, and the file is made anew; each tokenizer has its
---own file.

local binding = require("quartermoon.ffi")
local files = require("quartermoon.files")
local tensors = require("quartermoon.tensor")

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
    local count = tokenizer:encode_into(text:sub(at, from - 1), self.buffer, 0, self.goes_on)
    self.buffer[count], self.goes_on = self.end_id, false
    self.put(self.buffer, count + 1)
    at = to + 1
  end
  local rest = text:sub(at)
  -- Half a delimiter may stand at the end, and a piece ends for certain only before white space.
  local cut = last and #rest or tokenizer:safe_end(rest:sub(1, #rest - (delimiter and #delimiter - 1 or 0)))
  if cut > 0 then
    self.put(self.buffer, tokenizer:encode_into(rest:sub(1, cut), self.buffer, 0, self.goes_on))
    self.goes_on = true
  end
  return rest:sub(cut + 1)
end

---How many characters begin in these bytes.
local function count_characters(text)
  local count = 0
  for i = 1, #text do
    local byte = text:byte(i)
    if byte < 128 or byte >= 192 then count = count + 1 end
  end
  return count
end

---@return integer tokens, integer characters
local function encode_file(name, path, self, writer)
  local size, element, total, characters = 0, tensors.dtype_size[self.dtype], 0, 0
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
    characters = characters + count_characters(text or "")
    rest = rest .. (text or "")
    if #rest + 1 > size then
      size = 2 * #rest + 1
      self.buffer = tensors.host_buffer(self.dtype, size)
    end
    rest = encode_part(self, rest, text == nil)
  until not text
  file:close()
  return total, characters
end

local function matches(saved, wanted, tokens_path)
  if type(saved) ~= "table" then return false end
  for key, value in pairs(wanted) do if saved[key] ~= value then return false end end
  local element = tensors.dtype_size[wanted.dtype]
  return type(saved.tokens) == "number" and type(saved.characters) == "number"
    and files.size(tokens_path) == saved.tokens * element
end

---The tokens of a text as a mapped tensor, from the cache where it still holds.
---@param name string       the public function, for messages
---@param path string       the text
---@param tokenizer qm.Tokenizer
---@param options table     { cache_dir, delimiter, end_id }
---@return qm.Tensor tokens      u8 or i32 [tokens], read-only, on the CPU
---@return integer characters    of the text, as UTF-8
---@return boolean made          false where the cache served
function M.tokens(name, path, tokenizer, options)
  local folder, base = files.split(path)
  if options.cache_dir then
    files.make_folder(options.cache_dir)
    folder = options.cache_dir:gsub("/*$", "/")
  end
  local fingerprint = tokenizer:fingerprint()
  local tokens_path = ("%s%s.%s-%s.tokens"):format(folder, base, tokenizer.kind, fingerprint:sub(1, 8))
  local dtype = tokenizer.vocab_size <= 256 and "u8" or "i32"
  local text_checksum, text_bytes = checksum_file(name, path)
  local wanted = { format = "quartermoon-tokens", version = VERSION, text_bytes = text_bytes,
    text_checksum = text_checksum, tokenizer = fingerprint, dtype = dtype,
    delimiter = options.delimiter or "" }
  local saved = files.read_json(tokens_path .. ".json")
  if matches(saved, wanted, tokens_path) then
    return tensors.map_file(tokens_path, dtype), saved.characters, false
  end
  -- The description goes first and comes last: tokens are never described by another text's.
  os.remove(tokens_path .. ".json")
  local writer = files.create(tokens_path)
  local ok, message = pcall(function()
    local self = { tokenizer = tokenizer, dtype = dtype, delimiter = options.delimiter, end_id = options.end_id }
    wanted.tokens, wanted.characters = encode_file(name, path, self, writer)
    writer:commit()
    files.write_json(tokens_path .. ".json", wanted)
  end)
  writer:close()
  if not ok then error(message, 0) end
  return tensors.map_file(tokens_path, dtype), wanted.characters, true
end

return M
