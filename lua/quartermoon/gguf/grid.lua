---Which block type holds a quantized parameter's weights exactly, and those blocks.
---
---A weight of ours is scale (code - zero) with a whole zero, or scale code - zeros, computed in f32 and rounded
---once. A block says the same where 32 features share a scale that is an f16, and the codes have room:
---
---    Q4_0  code - zero from -8 to 7        Q4_1  codes from 0 to 15, and the least value, at code 0, is an f16
---    Q8_0  code - zero from -128 to 127
---
---It is the grid that decides, not the codes: what holds once holds for all that training may reach on it.

local ffi = require("ffi")
local blocks = require("quartermoon.gguf.blocks")
local types = require("quartermoon.gguf.types")
local words = require("quartermoon.qparam_words")

local M = {}

local BLOCK = 32
local ZERO_MAX = 2 ^ 16 -- zero points beyond are as good as none

---Where each feature's codes lie and which group is theirs: packed row and group, by feature, from 0.
local function places_of(q)
  local k = q.shape[1]
  local row_of, group_of = ffi.new("int32_t[?]", k), ffi.new("int32_t[?]", k)
  local order, g_idx, map = q.q_perm and q.q_perm:host(), q.g_idx and q.g_idx:host(), q.group_map and q.group_map:host()
  for p = 0, k - 1 do
    local feature = order and order[p] or p
    row_of[feature] = p
    group_of[feature] = map and map[p] or g_idx and g_idx[feature] or math.floor(p / q.group_size)
  end
  return row_of, group_of
end

---Why blocks cannot say which group a feature is of; nil where they can.
local function misplaced(k, group_of)
  if k % BLOCK ~= 0 then return ("its %d inputs are no whole blocks of %d"):format(k, BLOCK) end
  for feature = 0, k - 1 do
    local first = feature - feature % BLOCK
    if group_of[feature] ~= group_of[first] then
      return ("inputs %d and %d are of groups %d and %d, and a block of %d has one scale"):format(first, feature,
        group_of[first], group_of[feature], BLOCK)
    end
  end
end

---Zero and least value of group and column i.
local function zero_of(grid, i)
  if grid.whole then return grid.whole[i], -grid.scales[i] * grid.whole[i] end
  local scale, zeros = grid.scales[i], grid.floats[i]
  if zeros == 0 then return 0, 0 end
  local zero = math.floor(zeros / scale + 0.5)
  return math.abs(zero) < ZERO_MAX and zero * scale == zeros and zero or nil, -zeros
end

---The grid on the host, and what all its groups have in common.
---@return table|nil grid, string|nil reason
local function measure(q)
  local row_of, group_of = places_of(q)
  local reason = q.channel_scale and "its channel_scale multiplies activations, for which GGUF has no place"
    or misplaced(q.shape[1], group_of)
  if reason then return nil, reason end
  local groups, n = q.scales.shape[1], q.shape[2]
  local grid = { row_of = row_of, group_of = group_of, columns = n, scales = q.scales:host(), width = 0, low = 0,
    high = 0 }
  if q.asym then
    grid.whole = words.fields(q.zeros, q.w_bit, q.zero_offset)
  else
    grid.floats = q.zeros:host()
  end
  for g = 0, groups - 1 do
    local width = q.q_groups and q.q_groups[2 * g + 1] or q.w_bit
    grid.width = math.max(grid.width, width)
    for i = g * n, g * n + n - 1 do
      local scale = grid.scales[i]
      local zero, least = zero_of(grid, i)
      if not blocks.half_bits(scale) then
        return nil, ("the scale of group %d, column %d, %.9g, is no f16"):format(g, i - g * n, scale)
      end
      if not zero and not grid.no_whole then
        grid.no_whole = ("the zero of group %d, column %d, %.9g, is no whole multiple of its scale %.9g"):format(g,
          i - g * n, -least, scale)
      end
      if not grid.no_least and not blocks.half_bits(least) then
        grid.no_least = ("the least value of group %d, column %d, %.9g, is no f16"):format(g, i - g * n, least)
      end
      if zero then grid.low, grid.high = math.min(grid.low, -zero), math.max(grid.high, 2 ^ width - 1 - zero) end
    end
  end
  return grid
end

---The smallest type that is exact. @return string|nil name, string|nil reason
local function choose(grid)
  if not grid.no_whole and grid.low >= -8 and grid.high <= 7 then return "Q4_0" end
  if grid.width <= 4 and not grid.no_least then return "Q4_1" end
  if grid.no_whole then
    return nil, grid.no_whole .. (grid.width <= 4 and ", and " .. grid.no_least or ", and its codes have "
      .. grid.width .. " bits")
  end
  if grid.low >= -128 and grid.high <= 127 then return "Q8_0" end
  return nil, ("codes less zero points reach from %d to %d, and Q8_0 from -128 to 127"):format(grid.low, grid.high)
end

---The block type that holds a parameter exactly.
---@param q qm.QParam
---@return string|nil name    "Q4_0", "Q4_1" or "Q8_0"
---@return string|nil reason  why none does
function M.exact_type(q)
  local grid, reason = measure(q)
  if not grid then return nil, reason end
  return choose(grid)
end

---What writes the blocks of a parameter, which M.exact_type has a type for.
---@param q qm.QParam
---@return fun(column: integer, out: ffi.cdata*)  the weights of one output, from 0, to uint8_t *
---@return string name
function M.encoder(q)
  local grid = assert(measure(q))
  local name, k, n = assert(choose(grid)), q.shape[1], q.shape[2]
  local unpacked = q:unpack()
  local turned = unpacked:transpose() -- an output's codes side by side
  local codes = turned:host()
  unpacked:free()
  turned:free()
  local size, block = types.by_name[name].bytes, ffi.new("int32_t[?]", BLOCK)
  local row_of, group_of = grid.row_of, grid.group_of
  return function(column, out)
    for first = 0, k - 1, BLOCK do
      local i = group_of[first] * n + column
      local zero, least = zero_of(grid, i)
      local shift = name == "Q4_0" and 8 - zero or name == "Q8_0" and -zero or 0
      for j = 0, BLOCK - 1 do block[j] = codes[column * k + row_of[first + j]] + shift end
      blocks.encode(name, out + first / BLOCK * size, block, blocks.half_bits(grid.scales[i]),
        name == "Q4_1" and blocks.half_bits(least))
    end
  end, name
end

return M
