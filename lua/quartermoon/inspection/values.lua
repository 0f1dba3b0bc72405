---Looking at a tensor's values on the disk, piece by piece: NaN, infinity, zeros, indices out of range.

local ffi = require("ffi")
local bit = require("bit")

local M = {}

local PIECE_BYTES = 2 ^ 20
local band = bit.band

---The bits of a float's exponent and of the rest but its sign, by type: how to tell without arithmetic. Blocks
---of GGUF files begin with such floats: how many, and after how many of their size the next block begins.
local FLOATS = {
  F32 = { "const uint32_t *", 0x7f800000, 0x7fffffff }, F16 = { "const uint16_t *", 0x7c00, 0x7fff },
  BF16 = { "const uint16_t *", 0x7f80, 0x7fff }, Q4_0 = { "const uint16_t *", 0x7c00, 0x7fff, 1, 9 },
  Q4_1 = { "const uint16_t *", 0x7c00, 0x7fff, 2, 10 }, Q8_0 = { "const uint16_t *", 0x7c00, 0x7fff, 1, 17 },
}
local INTEGERS = { I32 = "const int32_t *", I16 = "const int16_t *", I64 = "const int64_t *", U8 = "const uint8_t *",
  I8 = "const int8_t *" }

---Call visit(bytes, count) with pieces of a tensor. @return boolean  false where the file cannot be read
local function each_piece(tensor, visit)
  local file = tensor.element and io.open(tensor.path, "rb")
  if not file then return false end
  file:seek("set", tensor.at)
  local left, size = tensor.size_bytes, PIECE_BYTES - PIECE_BYTES % tensor.element
  while left > 0 do
    local piece = file:read(math.min(left, size))
    if not piece then break end
    visit(piece, math.floor(#piece / tensor.element))
    left = left - #piece
  end
  file:close()
  return left == 0
end

---What a float tensor holds, or the scales of blocks.
---@return table|nil  { count, bad, zero }: NaN or infinite, and zero; nil for others
function M.floats(tensor)
  local float = FLOATS[tensor.dtype]
  if not float then return nil end
  local pointer, exponent, magnitude = ffi.typeof(float[1]), float[2], float[3]
  local fields, step = float[4] or 1, float[5] or 1
  local bad, zero = 0, 0
  local whole = each_piece(tensor, function(piece, count)
    local values = ffi.cast(pointer, piece)
    for i = 0, count - 1 do
      for j = i * step, i * step + fields - 1 do
        local bits = band(values[j], magnitude)
        if bits == 0 then zero = zero + 1 elseif band(bits, exponent) == exponent then bad = bad + 1 end
      end
    end
  end)
  return whole and { count = tensor.count, bad = bad, zero = zero } or nil
end

---The least and the largest of an integer tensor, and whether all are 0; nil for others.
function M.range(tensor)
  local kind = INTEGERS[tensor.dtype]
  if not kind or tensor.count == 0 then return nil end
  local pointer, low, high = ffi.typeof(kind), math.huge, -math.huge
  local whole = each_piece(tensor, function(piece, count)
    local values = ffi.cast(pointer, piece)
    for i = 0, count - 1 do
      local value = tonumber(values[i])
      if value < low then low = value end
      if value > high then high = value end
    end
  end)
  if whole then return low, high end
end

---A small integer tensor as a list, I16 as the unsigned numbers that permutations are; nil for others.
function M.list(tensor, limit)
  local kind = tensor.dtype == "I16" and "const uint16_t *" or INTEGERS[tensor.dtype]
  if not kind or tensor.count > limit then return nil end
  local pointer, values = ffi.typeof(kind), {}
  local whole = each_piece(tensor, function(piece, count)
    local from = ffi.cast(pointer, piece)
    for i = 0, count - 1 do values[#values + 1] = tonumber(from[i]) end
  end)
  return whole and values or nil
end

return M
