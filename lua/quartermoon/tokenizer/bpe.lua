---Byte-pair tokens: 256 bytes, then one id per merge of two earlier ids (arXiv 1508.07909), applied
---inside the pieces of split.lua, earliest merge first.

local check = require("quartermoon.check")
local Base = require("quartermoon.tokenizer.base")
local split = require("quartermoon.tokenizer.split")

local CACHE_MAX = 2 ^ 18 -- pieces; then we begin anew, so that memory stays bounded

local Bpe = setmetatable({}, { __index = Base })
Bpe.__index, Bpe.__tostring = Bpe, Base.describe

local M = { PAIR = 2 ^ 21 } -- a pair of ids is the number left * PAIR + right
local PAIR = M.PAIR

---@param merges integer[][]  merge i makes id 255 + i of two smaller ids
function M.new(name, merges, specials)
  check.type(name, "merges", merges, "table")
  local self = setmetatable({ kind = "bpe", merges = {}, strings = {}, made = {}, cache = {}, cached = 0 }, Bpe)
  for byte = 0, 255 do self.strings[byte] = string.char(byte) end
  for i, merge in ipairs(merges) do
    check.type(name, "merges", merge, "table")
    local left = check.integer(name, "merges", merge[1], 0, 254 + i)
    local right = check.integer(name, "merges", merge[2], 0, 254 + i)
    local key, joined = left * PAIR + right, self.strings[left] .. self.strings[right]
    if self.made[key] then check.fail(name, "merges", "different pairs", ("%d, %d again"):format(left, right)) end
    -- Doubling merges could ask for 2^n bytes; no piece is ever so long.
    if #joined > 1024 then check.fail(name, "merges", "tokens of at most 1024 bytes", #joined) end
    self.made[key], self.strings[255 + i], self.merges[i] = 255 + i, joined, { left, right }
  end
  Base.setup(self, name, 256 + #merges, specials)
  for word, id in pairs(self.special_ids) do self.strings[id] = word end
  return self
end

---Put `id` in place of every neighbouring left and right, in place. @return integer count  of ids left
function M.merge_pair(ids, left, right, id)
  local to, from, count = 1, 1, #ids
  while from <= count do
    if from < count and ids[from] == left and ids[from + 1] == right then
      ids[to], from = id, from + 2
    else
      ids[to], from = ids[from], from + 1
    end
    to = to + 1
  end
  for i = to, count do ids[i] = nil end
  return to - 1
end

---The ids of one piece: again and again, the pair that was merged first in training.
local function merge_piece(made, piece)
  local ids, count = { piece:byte(1, -1) }, #piece
  while count > 1 do
    local best, left, right
    for i = 1, count - 1 do
      local id = made[ids[i] * PAIR + ids[i + 1]]
      if id and (not best or id < best) then best, left, right = id, ids[i], ids[i + 1] end
    end
    if not best then break end
    count = M.merge_pair(ids, left, right, best)
  end
  return ids
end

---Write ids to buffer[at] and on; it has room for #text more. @return integer  the index behind them
function Bpe:encode_into(text, buffer, at)
  Base.check_into(text, buffer, at)
  local cache, first = self.cache, 1
  while first <= #text do
    local last = split.piece_end(text, first)
    local piece = text:sub(first, last)
    local ids = cache[piece]
    if not ids then
      if self.cached >= CACHE_MAX then self.cache, self.cached = {}, 0 end
      cache, ids = self.cache, merge_piece(self.made, piece)
      cache[piece], self.cached = ids, self.cached + 1
    end
    for i = 1, #ids do buffer[at + i - 1] = ids[i] end
    at = at + #ids
    first = last + 1
  end
  return at
end

check.methods("qm.Tokenizer", Bpe)

return M
