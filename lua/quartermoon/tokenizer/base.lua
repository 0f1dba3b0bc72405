---What all tokenizers share: special tokens, encoding to tensors, decoding, files.

local cjson = require("cjson")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local files = require("quartermoon.files")
local stream = require("quartermoon.tokenizer.stream")
local tensors = require("quartermoon.tensor")
local split = require("quartermoon.tokenizer.split")

---@class qm.Tokenizer
---@field kind string         "byte" or "bpe"
---@field vocab_size integer  ids are 0 .. vocab_size - 1
---@field specials string[]   names of the special tokens, whose ids come last
local Base = {}
Base.__index = Base

---Finish a tokenizer of `plain` ordinary ids: give the special tokens the ids behind them.
function Base.setup(self, name, plain, specials)
  check.integer(name, "plain", plain, 0)
  self.specials, self.special_ids = {}, {}
  for i, word in ipairs(check.type(name, "specials", specials, "table")) do
    check.type(name, "specials", word, "string")
    if word == "" or self.special_ids[word] then check.fail(name, "specials", "different words", word) end
    self.specials[i], self.special_ids[word] = word, plain + i - 1
  end
  self.vocab_size = plain + #self.specials
end

---The id of a special token. Text never encodes to it, whatever it says.
---@param word string
---@return integer|nil
function Base:special(word) return self.special_ids[word] end

---What encode_into may be given: a text and a host buffer with room for its bytes from `at` on.
function Base.check_into(text, buffer, at)
  local name = "tokenizer:encode_into"
  check.type(name, "text", text, "string")
  tensors.check_buffer(name, buffer, check.integer(name, "at", at, 0) + #text)
end

---The last place up to which text may be encoded on its own, the rest with `goes_on`. 0: none.
---@param text string
function Base.safe_end(_, text)
  check.type("tokenizer:safe_end", "text", text, "string")
  return split.safe_end(text)
end

---Text as token ids.
---@param text string  any bytes
---@param options table|nil  { device = default }
---@return qm.Tensor  i32 [tokens]
function Base:encode(text, options)
  check.type("tokenizer:encode", "text", text, "string")
  local buffer = tensors.host_buffer("i32", #text)
  return tensors.from_host(buffer, self:encode_into(text, buffer, 0), "i32", options)
end

---Text as a Lua list of token ids.
---@return integer[]
function Base:ids(text)
  check.type("tokenizer:ids", "text", text, "string")
  local buffer, list = tensors.host_buffer("i32", #text), {}
  for i = 1, self:encode_into(text, buffer, 0) do list[i] = buffer[i - 1] end
  return list
end

---The text of token ids; encode's exact inverse.
---@param ids qm.Tensor|integer[]  of any shape
---@return string
---@raise when an id is none of this tokenizer's
function Base:decode(ids)
  local name, strings, parts = "tokenizer:decode", self.strings, {}
  local values, shift, count = ids, 0
  if check.is_tensor(ids) then
    values, count = ids:host()
    shift = -1
  else
    count = #check.type(name, "ids", ids, "table")
  end
  for i = 1, count do
    local id = tonumber(values[i + shift])
    parts[i] = strings[id]
      or check.fail(name, "ids", ("ids from 0 to %d"):format(self.vocab_size - 1), values[i + shift])
  end
  return table.concat(parts)
end

---Decode tokens as they come, in whole characters: `stream:push(id)` gives text, `stream:finish()` the rest.
---@param options table|nil  { skip_special = true: special tokens give no text }
---@return qm.TokenStream
function Base:stream(options) return stream.new(self, options) end

---The one JSON text of this tokenizer: equal tokenizers, equal text.
function Base:json()
  local words = {}
  for i, word in ipairs(self.specials) do words[i] = cjson.encode(word) end
  local merges = {}
  for i, merge in ipairs(self.merges or {}) do merges[i] = ("[%d,%d]"):format(merge[1], merge[2]) end
  return ('{"format":"quartermoon-tokenizer","version":1,"kind":"%s",\n"specials":[%s],\n"merges":[%s]}\n'):format(
    self.kind, table.concat(words, ","), table.concat(merges, ","))
end

---Sixteen hexadecimal digits that differ where tokenizers do.
function Base:fingerprint() return (files.checksum(self:json())) end

---Write the tokenizer to a JSON file, atomically; qm.tokenizer.load reads it.
function Base:save(path)
  check.type("tokenizer:save", "path", path, "string")
  local ok, message = pcall(files.write, path, self:json())
  if not ok then binding.raise("tokenizer:save: " .. message) end
end

function Base:describe() return ("qm.tokenizer %s, %d tokens"):format(self.kind, self.vocab_size) end
Base.__tostring = Base.describe

check.methods("qm.Tokenizer", Base, { check_into = true, setup = true })

return Base
