---Packed words on the host: what reading and writing files of quantized weights does to them.

local bit = require("bit")
local ffi = require("ffi")
local check = require("quartermoon.check")
local host_buffer = require("quartermoon.host_buffer")
local tensors = require("quartermoon.tensor")
local band, bor, bnot, lshift, rshift = bit.band, bit.bor, bit.bnot, bit.lshift, bit.rshift

local M = {}

---Field i of a stream of bits in 32-bit words, which begins at word `first`.
local function field(words, first, bits, i)
  local at = i * bits
  local word, shift = first + rshift(at, 5), band(at, 31)
  local value = rshift(words[word], shift)
  if shift + bits > 32 then value = bor(value, lshift(words[word + 1], 32 - shift)) end
  return band(value, lshift(1, bits) - 1)
end

local function set_field(words, first, bits, i, value)
  local at, mask = i * bits, lshift(1, bits) - 1
  local word, shift = first + rshift(at, 5), band(at, 31)
  words[word] = bor(band(words[word], bnot(lshift(mask, shift))), lshift(value, shift))
  if shift + bits > 32 then
    words[word + 1] = bor(band(words[word + 1], bnot(rshift(mask, 32 - shift))), rshift(value, 32 - shift))
  end
end

---A tensor of a shape from `write(buffer)`, on a device.
---@param dtype string  "f32", "i16" or "i32"
function M.build(shape, dtype, device, write)
  local count = 1
  for _, extent in ipairs(shape) do count = count * extent end
  local buffer = host_buffer.new(dtype, count)
  write(buffer)
  local flat = tensors.from_host(buffer, count, dtype, { device = device })
  local out = flat:view_as("build", shape)
  flat:free()
  return out
end

---The same of f16 values, which `write` gives as f32.
function M.half(shape, device, write)
  local wide = M.build(shape, "f32", device, write)
  local out = wide:to("f16")
  wide:free()
  return out
end

---The values of packed fields [rows, N / 32 * bits], each raised by `shift`: an i32 host buffer, and how many.
function M.fields(packed, bits, shift)
  local words, row_words = packed:host(), packed.shape[2]
  local columns = row_words * 32 / bits
  local count = packed.shape[1] * columns
  local values = host_buffer.new("i32", count)
  for row = 0, packed.shape[1] - 1 do
    for i = 0, columns - 1 do values[row * columns + i] = field(words, row * row_words, bits, i) + shift end
  end
  return values, count
end

---How often each value stands in such fields.
---@return integer[] counts  by value, from 0
function M.count_fields(packed, bits)
  local values, count = M.fields(packed, bits, 0)
  local counts = {}
  for value = 0, 2 ^ bits - 1 do counts[value] = 0 end
  for i = 0, count - 1 do counts[values[i]] = counts[values[i]] + 1 end
  return counts
end

---Rows of packed fields, each raised by `delta` modulo 2^bits: a new tensor.
function M.shift_fields(packed, bits, delta)
  local words, mask, row_words = packed:host(), lshift(1, bits) - 1, packed.shape[2]
  return M.build(packed.shape, "i32", packed.device, function(out)
    for row = 0, packed.shape[1] - 1 do
      for i = 0, row_words * 32 / bits - 1 do
        set_field(out, row * row_words, bits, i, band(field(words, row * row_words, bits, i) + delta, mask))
      end
    end
  end)
end

---Words, each raised by `delta` as one number, so that fields carry into the next: a new tensor.
function M.add_to_words(packed, delta)
  local words, count = packed:host()
  return M.build(packed.shape, "i32", packed.device, function(out)
    for i = 0, count - 1 do out[i] = bit.tobit(words[i] + delta) end
  end)
end

-- AWQ's order of nibbles in a word: column 8 c + j stands in bits 4 NIBBLE[j].
local NIBBLE = ffi.new("const int32_t[8]", { 0, 4, 1, 5, 2, 6, 3, 7 })

---AWQ's codes [K, N / 8], eight columns of one row to a word, to ours [K / 8, N], eight rows of one
---column.
function M.rows_from_awq(packed)
  local words, k, columns = packed:host(), packed.shape[1], packed.shape[2]
  local n = columns * 8
  return M.build({ k / 8, n }, "i32", packed.device, function(out)
    for row = 0, k - 1 do
      local to, up = rshift(row, 3) * n, band(row, 7) * 4
      for c = 0, columns - 1 do
        local word, at = words[row * columns + c], to + c * 8
        for j = 0, 7 do
          out[at + j] = bor(out[at + j], lshift(band(rshift(word, 4 * NIBBLE[j]), 15), up))
        end
      end
    end
  end)
end

---The way back.
function M.rows_to_awq(packed)
  local words, k, n = packed:host(), packed.shape[1] * 8, packed.shape[2]
  return M.build({ k, n / 8 }, "i32", packed.device, function(out)
    for row = 0, k - 1 do
      local from, up = rshift(row, 3) * n, band(row, 7) * 4
      for c = 0, n / 8 - 1 do
        local word = 0
        for j = 0, 7 do
          word = bor(word, lshift(band(rshift(words[from + c * 8 + j], up), 15), 4 * NIBBLE[j]))
        end
        out[row * (n / 8) + c] = word
      end
    end
  end)
end

---Zero points [G, N / 8] from AWQ's order of nibbles to that of columns; `back`: the other way.
function M.reorder_awq(packed, back)
  local words, count = packed:host(), packed:count()
  return M.build(packed.shape, "i32", packed.device, function(out)
    for i = 0, count - 1 do
      local word, ordered = words[i], 0
      for j = 0, 7 do
        local from, to = 4 * NIBBLE[j], 4 * j
        if back then from, to = to, from end
        ordered = bor(ordered, lshift(band(rshift(word, from), 15), to))
      end
      out[i] = ordered
    end
  end)
end

---The inverse of a permutation, i32. Raises where it is none.
---@param what string  its name in the file
function M.inverse(name, what, permutation)
  local values, count = permutation:host()
  local inverse, seen = host_buffer.new("i32", count), host_buffer.new("u8", count)
  for i = 0, count - 1 do
    local value = tonumber(values[i])
    if permutation.dtype == "i16" then value = value % 65536 end
    if value < 0 or value >= count or seen[value] ~= 0 then
      check.fail(name, what, ("a permutation of 0 .. %d, at %d"):format(count - 1, i), value)
    end
    inverse[value], seen[value] = i, 1
  end
  return tensors.from_host(inverse, count, "i32", { device = permutation.device })
end

---Whole numbers up to 65535 as the 16-bit tensor that files have, read unsigned.
---@param values integer[]|ffi.cdata*  from 1, or from 0 in a buffer
function M.to_i16(name, what, values, count, device)
  local first = type(values) == "table" and 1 or 0
  return M.build({ count }, "i16", device, function(out)
    for i = 0, count - 1 do
      local value = tonumber(values[first + i])
      if value < 0 or value > 65535 then check.fail(name, what, "numbers of 16 bits, as the format has them", value) end
      out[i] = value < 32768 and value or value - 65536
    end
  end)
end

---EXL2's scales [G, N], f16, and the zeros that put code 2^(w_bit - 1) at 0.
---@param q_scale qm.Tensor      i32 [G, N / 8]: nibbles c, in the order of columns
---@param q_scale_max qm.Tensor  f16 [G]: the scale is (c + 1)^2 q_scale_max / 256
---@param widths integer[]       of the groups
function M.exl2_grid(q_scale, q_scale_max, widths)
  local groups, columns, device = q_scale.shape[1], q_scale.shape[2], q_scale.device
  local words = q_scale:host()
  local shape = { groups, columns * 8 }
  local rounded = M.half({ groups }, "cpu", function(out)
    local largest = q_scale_max:host()
    for g = 0, groups - 1 do out[g] = largest[g] / 256 end
  end)
  local unit = rounded:host()
  local scales = M.half(shape, device, function(out)
    for i = 0, groups * columns * 8 - 1 do
      local level = band(rshift(words[rshift(i, 3)], 4 * band(i, 7)), 15) + 1
      out[i] = level * level * unit[math.floor(i / shape[2])]
    end
  end)
  local values = scales:host()
  local zeros = M.half(shape, device, function(out)
    for i = 0, groups * columns * 8 - 1 do out[i] = values[i] * 2 ^ (widths[math.floor(i / shape[2]) + 1] - 1) end
  end)
  rounded:free()
  return scales, zeros
end

return M
