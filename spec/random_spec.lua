local ffi = require("ffi")
local qm = require("quartermoon")
local testing = require("spec.support.testing")
local lib = require("quartermoon.ffi").lib

local function draw(noise, count, kind, device, dtype)
  local out = qm.empty({ count }, { device = device, dtype = dtype })
  assert.equal(0, lib.qm_random(out.desc, kind or ffi.C.QM_UNIFORM, 0, 1, noise))
  return out
end

describe("random numbers", function()
  -- Random123 1.14, tests/kat_vectors: philox4x32-10 counter (4), key (2) -> 4 words. A uniform
  -- number shows a word's upper 24 bits. Elements below 4 are those of block 0, so the counter's
  -- first two words are 0, and the published vectors need blocks beyond; see the next spec.
  for _, device in ipairs({ "reference", testing.device }) do
    it("are Philox4x32-10 on " .. device .. ": the published vector of zeros", function()
      local noise = ffi.new("qm_noise", 0, 0, 0, 0)
      local values = draw(noise, 4, nil, device):totable()
      for i, word in ipairs({ 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 }) do
        assert.equal(math.floor(word / 256), values[i] * 2 ^ 24)
      end
    end)
  end

  -- Philox in Lua, from the paper's text (Salmon et al., SC 2011), so that counters which a tensor
  -- cannot reach are checked here, and the kernels against it.
  local function multiply(a, b) -- 32 x 32 -> high, low
    local product = ffi.cast("uint64_t", a) * ffi.cast("uint64_t", b)
    return tonumber(product / 2 ^ 32), tonumber(product % 2 ^ 32)
  end
  local function xor(...) return bit.bxor(...) % 2 ^ 32 end
  local function philox(counter, key)
    local c, k0, k1 = { unpack(counter) }, key[1], key[2]
    for _ = 1, 10 do
      local high0, low0 = multiply(0xD2511F53, c[1])
      local high1, low1 = multiply(0xCD9E8D57, c[3])
      c = { xor(high1, c[2], k0), low1, xor(high0, c[4], k1), low0 }
      k0, k1 = (k0 + 0x9E3779B9) % 2 ^ 32, (k1 + 0xBB67AE85) % 2 ^ 32
    end
    return c
  end

  it("agree with the published vectors by way of the paper's algorithm", function()
    local ones = 0xffffffff
    assert.same({ 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 }, philox({ 0, 0, 0, 0 }, { 0, 0 }))
    assert.same({ 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd }, philox({ ones, ones, ones, ones }, { ones, ones }))
    assert.same({ 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 },
      philox({ 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 }, { 0xa4093822, 0x299f31d0 }))
    -- seed and parameter are the key; block, its high word, step and stream the counter.
    local noise = ffi.new("qm_noise", 0xa4093822, 0x299f31d0, 0x13198a2e, 0x03707344)
    for _, device in ipairs({ "reference", testing.device }) do
      local values = draw(noise, 1027, nil, device):totable()
      for element = 0, 1026 do
        local word = philox({ math.floor(element / 4), 0, 0x13198a2e, 0x03707344 }, { 0xa4093822, 0x299f31d0 })
        assert.equal(math.floor(word[element % 4 + 1] / 256), values[element + 1] * 2 ^ 24)
      end
    end
  end)

  it("are the reference's on every device: uniform to the bit, normal nearly", function()
    for _, count in ipairs({ 0, 1, 2, 3, 5, 63, 64, 511, 513, 4099, 20001 }) do
      for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
        local noise = ffi.new("qm_noise", 42, count, 7, ffi.C.QM_STREAM_USER)
        local uniform = draw(noise, count, ffi.C.QM_UNIFORM, "reference", dtype)
        testing.assert_equal(uniform, draw(noise, count, ffi.C.QM_UNIFORM, testing.device, dtype))
        local normal = draw(noise, count, ffi.C.QM_NORMAL, "reference", dtype)
        testing.assert_close(normal, draw(noise, count, ffi.C.QM_NORMAL, testing.device, dtype),
          dtype == "f32" and 1e-6 or 8e-3)
      end
    end
  end)

  it("stay inside [low, high)", function()
    local x = qm.rand({ 100000 }, nil, -2, 3)
    assert.is_true(x:min():item() >= -2 and x:max():item() < 3)
    local narrow = qm.rand({ 10000 }, nil, 1, 1.0000001) -- one step of f32: only 1 is left
    assert.equal(1, narrow:max():item())
  end)

  it("have the moments of their distributions", function()
    local n = 200000
    local u, z = qm.rand({ n }), qm.randn({ n }, nil, 1, 2)
    -- 5 standard errors: of a mean, deviation / sqrt(n); of a normal's variance, variance sqrt(2 / n).
    assert.near(0.5, u:mean():item(), 5 * math.sqrt(1 / 12 / n))
    assert.near(1 / 3, u:square():mean():item(), 5 * math.sqrt(4 / 45 / n))
    assert.near(1, z:mean():item(), 5 * 2 / math.sqrt(n))
    assert.near(4, (z - 1):square():mean():item(), 5 * 4 * math.sqrt(2 / n))
    -- Fourth moment of the standard normal: 3, its variance 96.
    assert.near(3, ((z - 1) * 0.5):pow(4):mean():item(), 5 * math.sqrt(96 / n))
  end)

  it("repeat with the seed, and continue with the draws", function()
    local a, b = qm.generator(5), qm.generator(5)
    testing.assert_equal(a:randn({ 9 }), b:randn({ 9 }))
    local expected = a:rand({ 9 })
    testing.assert_equal(expected, qm.generator(5, 1):rand({ 9 }))
    assert.is_true(expected:bytes() ~= a:rand({ 9 }):bytes())
  end)

  it("refuse what they cannot take", function()
    assert.error_matches(function() qm.rand({ 2 }, { dtype = "i32" }) end,
      "rand: argument 'out': expected float [...], got i32 [2]", 1, true)
    assert.error_matches(function() qm.generator(-1) end, "argument 'seed': expected an integer from 0", 1, true)
  end)
end)
