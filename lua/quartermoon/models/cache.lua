---Keys and values of growing texts: what a decoder remembers, so that a step computes only its new rows.
---
---Every layer holds [sequences * rows_max, heads, head_size]; sequence s has the rows from (s - 1) rows_max on.
---Attention wants keys without gaps: what a sequence has not filled yet counts as a sequence of its own,
---one without queries, which costs nothing. So shapes stay the same from step to step, and all that
---changes lies in one small integer tensor, the step's plan.

local check = require("quartermoon.check")
local transformer = require("quartermoon.nn.transformer")
local tensors = require("quartermoon.tensor")

local M = {}

---@class qm.models.Cache
---@field [integer] qm.nn.KeyValues  one for each layer
---@field sequences integer
---@field rows_max integer   of each sequence
---@field lengths integer[]  the rows that each has
local Cache = {}
Cache.__index = Cache
M.Cache = Cache

---@param of { layers: integer, heads: integer, head_size: integer }
---@param rows_max integer
---@param sequences integer
function M.new(of, rows_max, sequences, dtype, device)
  local self = setmetatable({ sequences = sequences, rows_max = rows_max, lengths = {}, device = device, room = 0 },
    Cache)
  check.integer("model:cache", "rows_max", rows_max * sequences, 1, 2 ^ 31 - 1)
  for s = 1, sequences do self.lengths[s] = 0 end
  local ok, problem = pcall(function()
    for i = 1, of.layers do
      self[i] = transformer.key_values(rows_max * sequences, of.heads, of.head_size, dtype, device)
    end
  end)
  if not ok then
    self:free()
    error(problem, 0)
  end
  return self
end

---Raise unless `value` is a cache of so many layers.
function M.check(name, value, layers)
  check.instance(name, "cache", value, Cache, "qm.models.Cache")
  if #value ~= layers then check.fail(name, "cache", ("a cache of %d layers"):format(layers), #value) end
  return value
end

---Where the next rows lie: one write to the device.
---@param name string      the caller, for messages
---@param counts integer[] new rows of each sequence, 0 for one that waits
---@param tokens integer[]|nil  of all rows; then the plan begins with them
---@return qm.Tensor plan  i32
---@return table sizes     { rows, wanted (sequences with new rows), tokens }, for M.parts
function Cache:plan(name, counts, tokens)
  local rows, wanted = 0, 0
  for s = 1, self.sequences do
    local left = self.rows_max - self.lengths[s]
    rows = rows + check.integer(name, "counts", counts[s], 0)
    if counts[s] > left then
      check.fail(name, "tokens", ("at most %d more of sequence %d, for which the cache has room"):format(left, s),
        counts[s])
    end
    wanted = wanted + (counts[s] > 0 and 1 or 0)
  end
  local sizes = { rows = rows, wanted = wanted, tokens = tokens and rows or 0, offsets = 2 * self.sequences + 1 }
  local count = sizes.tokens + 2 * rows + wanted + 2 * sizes.offsets
  if self.room < count then self.buffer, self.room = tensors.host_buffer("i32", 2 * count), 2 * count end
  local out, at = self.buffer, sizes.tokens
  for i = 1, sizes.tokens do out[i - 1] = tokens[i] end
  local positions, places, last = at, at + rows, at + 2 * rows
  local cu_q = last + wanted
  local cu_k, row = cu_q + sizes.offsets, 0
  out[cu_q], out[cu_k] = 0, 0
  for s = 1, self.sequences do
    local first, length = (s - 1) * self.rows_max, self.lengths[s]
    for i = 0, counts[s] - 1 do
      out[positions + row + i], out[places + row + i] = length + i, first + length + i
    end
    row = row + counts[s]
    if counts[s] > 0 then
      out[last] = row - 1
      last = last + 1
    end
    out[cu_q + 2 * s - 1], out[cu_q + 2 * s] = row, row
    out[cu_k + 2 * s - 1], out[cu_k + 2 * s] = first + length + counts[s], first + self.rows_max
  end
  return tensors.from_host(out, count, "i32", { device = self.device }), sizes
end

---A plan taken apart, as views.
---@return table context  { positions, places, last, cu_q, cu_k }, last nil where it names every row in order
---@return qm.Tensor|nil tokens
function M.parts(plan, sizes)
  local at = 1
  local function take(length)
    at = at + length
    return plan:view_rows("plan", at - length, length)
  end
  local tokens = sizes.tokens > 0 and take(sizes.tokens) or nil
  local context = { positions = take(sizes.rows), places = take(sizes.rows), last = take(sizes.wanted) }
  context.cu_q, context.cu_k = take(sizes.offsets), take(sizes.offsets)
  if sizes.rows == sizes.wanted then context.last = nil end
  return context, tokens
end

---The planned rows are there.
function Cache:advance(counts)
  check.type("cache:advance", "counts", counts, "table")
  for s = 1, self.sequences do
    self.lengths[s] = self.lengths[s] + check.integer("cache:advance", "counts", counts[s], 0,
      self.rows_max - self.lengths[s])
  end
end

---Forget what a sequence holds behind its first `length` rows.
---@param sequence integer     from 1
---@param length integer|nil   default 0
function Cache:cut(sequence, length)
  check.integer("cache:cut", "sequence", sequence, 1, self.sequences)
  self.lengths[sequence] = check.integer("cache:cut", "length", length or 0, 0, self.lengths[sequence])
end

---Memory of keys and values.
function Cache:size_bytes()
  local sum = 0
  for _, kept in ipairs(self) do sum = sum + kept.k:size_bytes() + kept.v:size_bytes() end
  return sum
end

---Release keys and values.
function Cache:free()
  for _, kept in ipairs(self) do kept:free() end
end

function Cache:describe()
  return ("qm.models.Cache, %d layers, %d sequences of %d rows"):format(#self, self.sequences, self.rows_max)
end
Cache.__tostring = Cache.describe

check.methods("qm.models.Cache", Cache, { describe = true })

return M
