---The blocks of 32 weights that GGUF files and our grids have in common: Q4_0, Q4_1 and Q8_0.
---
---    Q4_0  f16 d; 16 bytes, byte j: weight j in the low nibble, j + 16 in the high one   w = d (q - 8)
---    Q4_1  f16 d, f16 m; the same nibbles                                                w = d q + m
---    Q8_0  f16 d; 32 signed bytes                                                        w = d q
---
---Source: ggml's block_q4_0, block_q4_1 and block_q8_0.

local ffi = require("ffi")
local bit = require("bit")
local band, bor, lshift, rshift = bit.band, bit.bor, bit.lshift, bit.rshift

local M = {}

---Every f16 as a number, by its bits; NaNs are Lua's own.
local half = ffi.new("float[65536]")
for bits = 0, 0x7fff do
  local exponent, fraction = rshift(bits, 10), band(bits, 0x3ff)
  local value = exponent == 0 and fraction * 2 ^ -24 or (1024 + fraction) * 2 ^ (exponent - 25)
  if exponent == 31 then value = fraction == 0 and 1 / 0 or 0 / 0 end
  half[bits], half[bits + 0x8000] = value, exponent == 31 and fraction ~= 0 and 0 / 0 or -value
end
M.half = half

local single = ffi.new("union { float value; uint32_t bits; }")

---The bits of the f16 that a number is; nil where it is none, and of what is not finite.
function M.half_bits(x)
  single.value = x
  if single.value ~= x then return nil end
  local bits = single.bits
  local sign, exponent = band(rshift(bits, 16), 0x8000), band(rshift(bits, 23), 255) - 112
  if exponent > 0 then
    if exponent > 30 or band(bits, 0x1fff) ~= 0 then return nil end
    return bor(sign, lshift(exponent, 10), band(rshift(bits, 13), 0x3ff))
  end
  local steps = math.abs(x) * 2 ^ 24 -- of subnormals
  return steps % 1 == 0 and bor(sign, steps) or nil
end

local DECODE = {
  Q4_0 = function(block, out, at)
    local d = half[bor(block[0], lshift(block[1], 8))]
    for j = 0, 15 do
      local byte = block[2 + j]
      out[at + j], out[at + j + 16] = d * (band(byte, 15) - 8), d * (rshift(byte, 4) - 8)
    end
  end,
  Q4_1 = function(block, out, at)
    local d, m = half[bor(block[0], lshift(block[1], 8))], half[bor(block[2], lshift(block[3], 8))]
    for j = 0, 15 do
      local byte = block[4 + j]
      out[at + j], out[at + j + 16] = d * band(byte, 15) + m, d * rshift(byte, 4) + m
    end
  end,
  Q8_0 = function(block, out, at)
    local d = half[bor(block[0], lshift(block[1], 8))]
    for j = 0, 31 do
      local byte = block[2 + j]
      out[at + j] = d * (byte < 128 and byte or byte - 256)
    end
  end,
}

---Can blocks of this type be decoded here?
function M.has(kind) return DECODE[kind.name] ~= nil end

---Decode blocks, each weight rounded once to f32.
---@param kind table       of types.tensors, one that M.has
---@param from ffi.cdata*  uint8_t *, the blocks
---@param count integer    blocks
---@param out ffi.cdata*   float *, overwritten from `at` on
function M.decode(kind, from, count, out, at)
  local decode = DECODE[kind.name]
  for i = 0, count - 1 do decode(from + i * kind.bytes, out, at + i * kind.block) end
end

---Write one block.
---@param name string      "Q4_0", "Q4_1" or "Q8_0"
---@param block ffi.cdata* uint8_t *, where it goes
---@param codes ffi.cdata* 32 whole numbers: of Q4_0 and Q4_1 from 0 to 15, of Q8_0 from -128 to 127
---@param d integer        the bits of the scale
---@param m integer        the bits of the least value, of Q4_1
function M.encode(name, block, codes, d, m)
  block[0], block[1] = band(d, 255), rshift(d, 8)
  if name == "Q8_0" then
    for j = 0, 31 do block[2 + j] = band(codes[j], 255) end
    return
  end
  local first = 2
  if name == "Q4_1" then
    block[2], block[3] = band(m, 255), rshift(m, 8)
    first = 4
  end
  for j = 0, 15 do block[first + j] = bor(codes[j], lshift(codes[j + 16], 4)) end
end

return M
