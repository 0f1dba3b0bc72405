---Tokenizers of the tokenizer.json files that lie in model folders: byte-pair models, byte-level
---(GPT-2, Llama 3, Qwen) or over characters with bytes as a last resort (Llama 2, Mistral).
---
---Source: the file format of Hugging Face's tokenizers library, read, never executed.

local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local Base = require("quartermoon.tokenizer.base")
local merges = require("quartermoon.tokenizer.merges")
local description_of = require("quartermoon.tokenizer.hf_description")
local unicode = require("quartermoon.tokenizer.unicode")

local CACHE_MAX = 2 ^ 18 -- pieces; then we begin anew, so that memory stays bounded
local PIECE_CACHED_MAX = 256 -- bytes
local MARK = "\226\150\129" -- U+2581, which stands for a space

---@class qm.HfTokenizer : qm.Tokenizer
---@field added table<string, table>  words that are one token: { id, special, ... }
local Hf = setmetatable({}, { __index = Base })
Hf.__index, Hf.__tostring = Hf, Base.describe

local M = {}

---@param text string        the file
---@param description table  the same, decoded
---@return qm.HfTokenizer
---@raise a sentence without a place: the caller knows the file
function M.new(text, description)
  local self = setmetatable({ kind = "hf", text = text, cache = {}, cached = 0 }, Hf)
  return description_of.read(self, description)
end

---------------------------------------------------------------------------------------------------
-- Encoding
---------------------------------------------------------------------------------------------------

---The ids of a character's bytes, or nil where one of them has none.
local function byte_ids(self, char)
  local ids = {}
  for i = 1, #char do
    ids[i] = self.by_byte[char:byte(i)]
    if not ids[i] then return nil end
  end
  return ids
end

---The symbols that merging begins with.
local function symbols(self, piece)
  local ids, count = {}, 0
  if self.byte_level then
    for i = 1, #piece do
      local id = self.by_byte[piece:byte(i)] or self.unk
      if id then
        count = count + 1
        ids[count] = id
      end
    end
    return ids, count
  end
  local at, unknown_before = 1, false
  while at <= #piece do
    local size = unicode.char_size(piece, at)
    local char = piece:sub(at, at + size - 1)
    local id, unknown = self.ids_of[char], false
    local bytes = not id and byte_ids(self, char)
    if id then
      count = count + 1
      ids[count] = id
    elseif bytes then
      for i = 1, size do ids[count + i] = bytes[i] end
      count = count + size
    elseif self.unk then
      unknown = true
      if not (unknown_before and self.fuse_unk) then
        count = count + 1
        ids[count] = self.unk
      end
    end
    at, unknown_before = at + size, unknown
  end
  return ids, count
end

local function merge(self, piece)
  if self.ignore_merges then
    local word = piece
    if self.byte_level then
      word = piece:gsub(".", function(char) return unicode.byte_name[char:byte()] end)
    end
    if self.ids_of[word] then return { self.ids_of[word] } end
  end
  local ids, count = symbols(self, piece)
  merges.apply(ids, count, self.ranks, self.made)
  return ids
end

local function append(self, list, piece)
  local ids = self.cache[piece]
  if not ids then
    ids = merge(self, piece)
    if #piece <= PIECE_CACHED_MAX then
      if self.cached >= CACHE_MAX then self.cache, self.cached = {}, 0 end
      self.cache[piece], self.cached = ids, self.cached + 1
    end
  end
  local count, more = list.count, #ids
  for i = 1, more do list[count + i] = ids[i] end
  list.count = count + more
end

---A piece of marked text, word by word where that is the same.
local function append_words(self, list, piece)
  local from, at = 1, 1
  while true do
    at = piece:find(MARK, at, true)
    if not at then break end
    if at > from and piece:sub(at - 3, at - 1) ~= MARK then
      append(self, list, piece:sub(from, at - 1))
      from = at
    end
    at = at + 3
  end
  if from <= #piece then append(self, list, piece:sub(from)) end
end

---Text without added words onto the list.
local function encode_plain(self, list, text, steps, at_start)
  if text == "" then return end
  if steps.normalize then text = steps.normalize(text) end
  local add = self.whole_words and append_words or append
  steps.split(text, function(piece) add(self, list, piece) end, at_start)
end

---@return table ids  1 .. ids.count, without what the template puts around a text
local function collect(self, text, options)
  local list, at, size = { count = 0 }, 0, #text
  local steps = options.continued and self.later or self.first
  local finder = options.parse_special == false and self.find_plain or self.find_added
  local at_start = not options.continued and not options.after_special
  while finder and at < size do
    local first, stop = finder:find(text, at)
    if not first then break end
    local token = self.added[text:sub(first + 1, stop)]
    local before = text:sub(at + 1, first)
    if token.lstrip then before = before:gsub("%s+$", "") end
    encode_plain(self, list, before, steps, at_start)
    list.count = list.count + 1
    list[list.count] = token.id
    at, at_start = stop, false
    if token.rstrip then at = (text:find("%S", at + 1) or size + 1) - 1 end
  end
  encode_plain(self, list, text:sub(at + 1), steps, at_start)
  return list
end

---Text as a Lua list of token ids.
---@param text string
---@param options table|nil  add_special = true: with the ids that the file puts around a text (a
---  beginning-of-text token, say); parse_special = true: special tokens in the text become their ids,
---  otherwise they are words like any other; continued = false: the text goes on from an earlier part;
---  after_special = false: it stands behind a special token
---@return integer[]
function Hf:ids(text, options)
  check.type("tokenizer:ids", "text", text, "string")
  options = check.options("tokenizer:ids", options, { add_special = true, parse_special = true, continued = false,
    after_special = false })
  local list = collect(self, text, options)
  list.count = nil
  if not options.add_special then return list end
  local all = {}
  for _, part in ipairs({ self.before, list, self.after }) do
    for i = 1, #part do all[#all + 1] = part[i] end
  end
  return all
end

---Text as token ids. Options as of :ids, and device.
---@return qm.Tensor  i32 [tokens]
function Hf:encode(text, options)
  local own = {}
  for key, option in pairs(check.type("tokenizer:encode", "options", options or {}, "table")) do own[key] = option end
  own.device = nil
  return tensors.tensor(self:ids(text, own), { dtype = "i32", device = options and options.device })
end

---Write a part of a longer text's ids to buffer[at] and on, without what the template puts around it
---and with special tokens as ordinary words. @return integer  the index behind them
function Hf:encode_into(text, buffer, at, goes_on)
  check.type("tokenizer:encode_into", "text", text, "string")
  local list = collect(self, text, { parse_special = false, continued = goes_on })
  check.integer("tokenizer:encode_into", "at", at, 0)
  tensors.check_buffer("tokenizer:encode_into", buffer, at + list.count)
  for i = 1, list.count do buffer[at + i - 1] = list[i] end
  return at + list.count
end

---The last place up to which text may be encoded on its own: before a blank between two letters.
function Hf.safe_end(_, text)
  for i = #text - 1, 2, -1 do
    if text:byte(i) == 32 and text:find("^%a", i + 1) and text:find("^%a", i - 1) then return i - 1 end
  end
  return 0
end

---------------------------------------------------------------------------------------------------
-- Decoding, and the file
---------------------------------------------------------------------------------------------------

---The text of token ids.
---@param ids qm.Tensor|integer[]
---@param options table|nil  skip_special = false: leave special tokens out
---@return string
function Hf:decode(ids, options)
  options = check.options("tokenizer:decode", options, { skip_special = false })
  if check.is_tensor(ids) then
    local host, count = ids:host()
    ids = {}
    for i = 1, count do ids[i] = tonumber(host[i - 1]) end
  end
  if options.skip_special then
    local kept = {}
    for _, id in ipairs(ids) do
      local word = self.words[id]
      if not (word and self.special_ids[word] == id) then kept[#kept + 1] = id end
    end
    ids = kept
  end
  local text = Base.decode(self, ids)
  return self.strips_space and text:gsub("^ ", "") or text
end

function Hf:json() return self.text end

check.methods("qm.HfTokenizer", Hf)

return M
