---Byte-pair merging of one piece when every merge has a rank: lowest rank first, leftmost first.
---
---The pairs wait in a heap, so that a piece of n symbols costs n log n whatever it holds.

local ffi = require("ffi")
local floor = math.floor

local M = { PAIR = 2 ^ 22 } -- a pair of ids is the number left * PAIR + right
local PAIR = M.PAIR
local PLACE = 2 ^ 24 -- a heap entry is rank * PLACE + place

local heap, size = {}, 0

local function push(entry)
  size = size + 1
  local at = size
  while at > 1 do
    local parent = floor(at / 2)
    if heap[parent] <= entry then break end
    heap[at], at = heap[parent], parent
  end
  heap[at] = entry
end

local function pop()
  local top, last = heap[1], heap[size]
  size = size - 1
  local at = 1
  while true do
    local child = 2 * at
    if child > size then break end
    if child < size and heap[child + 1] < heap[child] then child = child + 1 end
    if heap[child] >= last then break end
    heap[at], at = heap[child], child
  end
  heap[at] = last
  return top
end

local room = 0
local symbol, before, after -- per place: id (-1: merged away), and its neighbours' places

local function reserve(count)
  if count + 2 <= room then return end
  room = math.max(2 * room, count + 2, 256)
  symbol, before, after = ffi.new("int32_t[?]", room), ffi.new("int32_t[?]", room), ffi.new("int32_t[?]", room)
end

---Merge in place: ids[1 .. count] become fewer.
---@param ids integer[]
---@param ranks table<number, number>  pair -> rank
---@param made table<number, integer>  pair -> id
---@return integer count
function M.apply(ids, count, ranks, made)
  if count < 2 then return count end
  if count >= PLACE then error("a piece of text has too many symbols", 0) end
  reserve(count)
  size = 0
  for i = 1, count do
    symbol[i], before[i], after[i] = ids[i], i - 1, i + 1
    local rank = i < count and ranks[ids[i] * PAIR + ids[i + 1]]
    if rank then push(rank * PLACE + i) end
  end
  after[count] = 0
  while size > 0 do
    local entry = pop()
    local place = entry % PLACE
    local right = after[place]
    if symbol[place] >= 0 and right > 0 then
      local pair = symbol[place] * PAIR + symbol[right]
      -- What was pushed may have been merged away since.
      if ranks[pair] == (entry - place) / PLACE then
        symbol[place], symbol[right] = made[pair], -1
        local next_place = after[right]
        after[place] = next_place
        if next_place > 0 then
          before[next_place] = place
          local rank = ranks[symbol[place] * PAIR + symbol[next_place]]
          if rank then push(rank * PLACE + place) end
        end
        local left = before[place]
        if left > 0 then
          local rank = ranks[symbol[left] * PAIR + symbol[place]]
          if rank then push(rank * PLACE + left) end
        end
      end
    end
  end
  local kept, place = 0, 1
  while place > 0 do
    kept = kept + 1
    ids[kept], place = symbol[place], after[place]
  end
  for i = kept + 1, count do ids[i] = nil end
  return kept
end

return M
