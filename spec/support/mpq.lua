-- What the specs of quantized parameters share: random parameters, and the update step in plain Lua.
local bit = require("bit")
local ffi = require("ffi")
local qm = require("quartermoon")

local M = {}

local REFERENCE = { device = "reference" }

---A random permutation of 0 .. count - 1, i32.
function M.permutation(count)
  local values = {}
  for i = 1, count do values[i] = i - 1 end
  for i = count, 2, -1 do
    local j = math.random(i)
    values[i], values[j] = values[j], values[i]
  end
  return qm.tensor(values, { dtype = "i32", device = "reference" })
end

---Groups drawn for each of k rows, i32.
function M.random_groups(k, groups)
  local values = {}
  for i = 1, k do values[i] = math.random(groups) - 1 end
  return qm.tensor(values, { dtype = "i32", device = "reference" })
end

---A parameter quantized from normal weights, on the reference device.
function M.random(k, n, options)
  local w = qm.randn({ k, n }, REFERENCE)
  local q = qm.QParam.quantize(w, options)
  w:free()
  return q
end

---Round to f32. Sums, products, quotients and roots of f32 numbers in double, rounded so, are f32
---arithmetic's own results.
local scratch = ffi.new("float[1]")
local function f32(x)
  scratch[0] = x
  return tonumber(scratch[0])
end
M.f32 = f32

---A tensor's bytes; of NaNs, which every machine words in its own way, only that they are NaN.
function M.canonical(tensor)
  local near = tensor:to("reference")
  local values, count = (near.dtype == "f32" and near or near:to("f32")):host()
  for i = 0, count - 1 do
    if values[i] ~= values[i] then values[i] = 0 / 0 end
  end
  return ffi.string(values, count * 4)
end

local function multiply(a, b)
  local product = ffi.cast("uint64_t", a) * ffi.cast("uint64_t", b)
  return tonumber(product / 4294967296ULL), tonumber(product % 4294967296ULL)
end

local function xor(a, b, c) return bit.bxor(bit.bxor(a, b), c) % 2 ^ 32 end

---Philox4x32-10's word for one element, from the paper.
function M.random_bits(seed, parameter, step, stream, element)
  local c = { math.floor(element / 4), 0, step, stream }
  local key0, key1 = seed, parameter
  for _ = 1, 10 do
    local high0, low0 = multiply(0xD2511F53, c[1])
    local high1, low1 = multiply(0xCD9E8D57, c[3])
    c = { xor(high1, c[2], key0), low1, xor(high0, c[4], key1), low0 }
    key0, key1 = (key0 + 0x9E3779B9) % 2 ^ 32, (key1 + 0xBB67AE85) % 2 ^ 32
  end
  return c[element % 4 + 1]
end
function M.uniform(...) return math.floor(M.random_bits(...) / 256) / 2 ^ 24 end

---An f32 number as bf16, away from 0 where `random`, 16 bits, exceeds what its low half leaves of 2^16.
local both = ffi.new("union { float number; uint32_t bits; }")
function M.to_bf16(x, random)
  both.number = x
  both.bits = bit.band(both.bits + random, 0xFFFF0000) % 2 ^ 32
  return tonumber(both.number)
end

---Both moments of one element as bf16: one word, its low half for the first, the sum of its halves for
---the second.
function M.moments_to_bf16(m, v, ...)
  local word = M.random_bits(...)
  local low, high = word % 65536, math.floor(word / 65536)
  return M.to_bf16(m, low), M.to_bf16(v, (low + high) % 65536)
end

---Nearest integer, halves to even.
function M.round(x)
  local low = math.floor(x)
  local fraction = x - low
  if fraction > 0.5 or (fraction == 0.5 and low % 2 == 1) then return low + 1 end
  return low
end

---Field i (from 0) of a stream of bits, whose words (from 1) are numbers of either sign.
function M.stream_field(words, bits, i)
  local field = 0
  for b = 0, bits - 1 do
    local at = i * bits + b
    local word = words[math.floor(at / 32) + 1] % 2 ^ 32
    field = field + math.floor(word / 2 ^ (at % 32)) % 2 * 2 ^ b
  end
  return field
end

---Each packed row's width, from 1.
function M.widths(q)
  local widths = {}
  for _, section in ipairs(q.sections or { { w_bit = q.w_bit, rows = q.shape[1] } }) do
    for _ = 1, section.rows do widths[#widths + 1] = section.w_bit end
  end
  return widths
end

---Zero points of an asymmetric parameter as numbers, [g][n] from 1.
function M.zero_points(q)
  if not q.asym then return q.zeros:totable() end
  local words, points = q.zeros:totable(), {}
  for g = 1, #words do
    points[g] = {}
    for n = 0, q.shape[2] - 1 do points[g][n + 1] = M.stream_field(words[g], q.w_bit, n) + q.zero_offset end
  end
  return points
end

---Residuals as signed numbers, [p][n] from 1.
function M.residuals(q)
  local words, values = q.residual:totable(), {}
  local bits = q.residual_bits
  local per_word = 32 / bits
  for p = 0, q.shape[1] - 1 do
    values[p + 1] = {}
    for n = 1, q.shape[2] do
      local word = words[math.floor(p / per_word) + 1][n] % 2 ^ 32
      values[p + 1][n] = math.floor(word / 2 ^ (bits * (p % per_word))) % 2 ^ bits - 2 ^ (bits - 1)
    end
  end
  return values
end

---Group (from 1) and feature (from 1) of packed row p (from 1).
function M.place(q, p)
  local feature = q.q_perm and q.q_perm:at(p) or p - 1
  if q.group_map then return q.group_map:at(p) + 1, feature + 1 end
  return (q.g_idx and q.g_idx:at(feature + 1) or math.floor((p - 1) / q.group_size)) + 1, feature + 1
end

---One step in plain Lua, moments of o.dtype. o: the options of QParam.update, all given.
---@return table codes, table m, table v, table|nil residuals, table health
function M.update(q, grad, m, v, o)
  local scales, zeros, codes = q.scales:totable(), M.zero_points(q), q:unpack():totable()
  local residuals = q.residual and M.residuals(q)
  local rb, t = q.residual and q.residual_bits or 0, o.step + 1
  local unit, half, widths = 2 ^ rb, rb > 0 and 2 ^ (rb - 1) or 0, M.widths(q)
  local correct = o.correct_bias
  local c1, c2 = correct and 1 - o.beta1 ^ t or 1, correct and math.sqrt(1 - o.beta2 ^ t) or 1
  local a, decay = f32(o.lr * c2 / c1), f32(o.lr * o.weight_decay)
  local inject = o.feedback == "momentum" and o.lr_next > 0
    and f32((1 - o.beta1) / o.beta1 * (correct and 1 - o.beta1 ^ (t + 1) or 1) / o.lr_next / c2) or 0
  local b1, r1, b2, r2 = f32(o.beta1), f32(1 - o.beta1), f32(o.beta2), f32(1 - o.beta2)
  local eps, health = f32(o.eps), { 0, 0, 0, 0 }
  for p = 1, q.shape[1] do
    local g, k = M.place(q, p)
    local lowest, highest = -half, (2 ^ widths[p] - 1) * unit + math.max(half - 1, 0)
    for n = 1, q.shape[2] do
      local scale, zero, code, gradient = scales[g][n], zeros[g][n], codes[p][n], grad[k][n]
      local rate = f32(a / scale)
      if not q.asym then zero = f32(zero / scale) end
      local first = f32(f32(b1 * m[k][n]) + f32(r1 * gradient))
      local second = f32(f32(b2 * v[k][n]) + f32(f32(r2 * gradient) * gradient))
      local denominator = f32(f32(math.sqrt(second)) + eps)
      local d = -f32(f32(f32(rate * first) / denominator) + f32(decay * f32(code - zero)))
      health[1] = health[1] + 1
      if d - d ~= 0 or second - second ~= 0 then
        health[4] = health[4] + 1
      else
        local start, move = code * unit + (residuals and residuals[p][n] or 0), d * unit
        local wanted = M.round(f32(start + move))
        if o.rounding == "stochastic" then
          local element = (p - 1) * q.shape[2] + n - 1
          wanted = start + math.ceil(move - M.uniform(o.seed, q.id, t, 0, element)) -- in doubles
        end
        local got = math.min(math.max(wanted, lowest), highest)
        local new = math.floor((got + half) / unit)
        if new ~= code then health[2] = health[2] + 1 end
        if got ~= wanted then health[3] = health[3] + 1 end
        codes[p][n] = new
        if residuals then residuals[p][n] = got - new * unit end
        if o.feedback == "momentum" then
          local target = f32(start + move)
          local inside = target >= lowest and target <= highest
          local lost = inside and f32(scale * f32(move - (got - start))) or 0
          first = f32(first - f32(f32(inject * denominator) * lost))
        end
        if o.dtype == "bf16" then
          local element = (p - 1) * q.shape[2] + n - 1
          first, second = M.moments_to_bf16(first, second, o.seed, q.id, t, 0, element)
        end
        m[k][n], v[k][n] = first, second
      end
    end
  end
  return codes, m, v, residuals, health
end

return M
