---Learning byte-pair merges: count the different pieces of the text, then merge the commonest pair
---of neighbouring ids until the vocabulary is full.
---
---The counts of pairs are kept, not recounted: a merge touches only the pieces that hold its pair.
---Ties go to the pair of smaller ids, so that one text gives one vocabulary everywhere.

local split = require("quartermoon.tokenizer.split")
local bpe = require("quartermoon.tokenizer.bpe")
local PAIR = bpe.PAIR

local M = {}

---The different pieces as lists of bytes, in order of appearance, and how often each occurs.
local function count_pieces(text)
  local numbers, words, counts = {}, {}, {}
  local first = 1
  while first <= #text do
    local last = split.piece_end(text, first)
    local piece = text:sub(first, last)
    local number = numbers[piece]
    if number then
      counts[number] = counts[number] + 1
    else
      number = #words + 1
      numbers[piece], words[number], counts[number] = number, { piece:byte(1, -1) }, 1
    end
    first = last + 1
  end
  return words, counts
end

---A heap of pairs, commonest first. Counts in it may be out of date: they only ever fall, so the
---reader checks the top against the truth and puts it back.
local Heap = {}
Heap.__index = Heap

local function before(heap, i, j)
  local a, b = heap.counts[i], heap.counts[j]
  if a ~= b then return a > b end
  return heap.keys[i] < heap.keys[j]
end

local function swap(heap, i, j)
  heap.counts[i], heap.counts[j] = heap.counts[j], heap.counts[i]
  heap.keys[i], heap.keys[j] = heap.keys[j], heap.keys[i]
end

function Heap:push(key, count)
  local i = #self.keys + 1
  self.keys[i], self.counts[i] = key, count
  while i > 1 do
    local parent = math.floor(i / 2)
    if not before(self, i, parent) then break end
    swap(self, i, parent)
    i = parent
  end
end

function Heap:pop()
  local size = #self.keys
  if size == 0 then return nil end
  swap(self, 1, size)
  local key, count = table.remove(self.keys), table.remove(self.counts)
  local i = 1
  while true do
    local child = 2 * i
    if child >= size then break end
    if child + 1 < size and before(self, child + 1, child) then child = child + 1 end
    if not before(self, child, i) then break end
    swap(self, i, child)
    i = child
  end
  return key, count
end

---Add `weight` to the count of every pair in a piece.
local function add_pairs(word, weight, totals)
  for i = 1, #word - 1 do
    local key = word[i] * PAIR + word[i + 1]
    totals[key] = (totals[key] or 0) + weight
  end
end

---Note under each pair of a piece that has `id` (or any, without) that the piece holds it.
local function note_holders(word, number, holders, id, fresh)
  for i = 1, #word - 1 do
    if not id or word[i] == id or word[i + 1] == id then
      local key = word[i] * PAIR + word[i + 1]
      local list = holders[key]
      if not list then
        list = {}
        holders[key] = list
        fresh[#fresh + 1] = key
      end
      if list[#list] ~= number then list[#list + 1] = number end
    end
  end
end

---@param text string
---@param merge_count integer  how many merges to learn at most
---@param count_min integer    a pair that occurs less often is left alone
---@return integer[][] merges
function M.learn(text, merge_count, count_min)
  local words, counts = count_pieces(text)
  local totals, holders, fresh = {}, {}, {}
  local heap = setmetatable({ keys = {}, counts = {} }, Heap)
  for number, word in ipairs(words) do
    add_pairs(word, counts[number], totals)
    note_holders(word, number, holders, nil, fresh)
  end
  for _, key in ipairs(fresh) do heap:push(key, totals[key]) end
  local merges = {}
  while #merges < merge_count do
    local key, count = heap:pop()
    if not key or count < count_min then break end
    if count ~= totals[key] then
      if totals[key] > 0 then heap:push(key, totals[key]) end
    else
      local left, right, id = math.floor(key / PAIR), key % PAIR, 256 + #merges
      merges[#merges + 1], fresh = { left, right }, {}
      for _, number in ipairs(holders[key]) do
        local word = words[number]
        add_pairs(word, -counts[number], totals)
        local length = #word
        local merged = bpe.merge_pair(word, left, right, id) < length
        add_pairs(word, counts[number], totals)
        if merged then note_holders(word, number, holders, id, fresh) end
      end
      holders[key] = nil
      for _, new in ipairs(fresh) do heap:push(new, totals[new]) end
    end
  end
  return merges
end

return M
