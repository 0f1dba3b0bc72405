local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }

describe("qm.cast", function()
  it("converts, and passes the gradient back in the input's type", function()
    local x = qm.tensor({ 1.5, -2.25 }, { requires_grad = true })
    local half = qm.cast(x, "bf16")
    assert.equal("bf16", half.dtype)
    half:backward(qm.tensor({ 3, 4 }, { dtype = "bf16" }))
    assert.same({ 3, 4 }, x.grad:totable())
    assert.equal("f32", x.grad.dtype)
  end)

  it("truncates toward zero, saturates, and turns NaN to 0", function()
    local x = qm.tensor({ -1.9, 1.9, 300, -300, 0 / 0, math.huge })
    assert.same({ -1, 1, 127, -128, 0, 127 }, x:cast("i8"):totable())
    assert.same({ 0, 1, 255, 0, 0, 255 }, x:cast("u8"):totable())
    assert.same({ -1, 1, 300, -300, 0, 2147483647 }, x:cast("i32"):totable())
  end)

  it("rounds halves to even in bf16 and f16", function()
    -- bf16 keeps 8 bits: 257 and 259 lie halfway between multiples of 2. f16 keeps 11.
    assert.same({ 256, 260, 258 }, qm.tensor({ 257, 259, 258 }):cast("bf16"):totable())
    assert.same({ 2048, 2052 }, qm.tensor({ 2049, 2051 }):cast("f16"):totable())
    assert.same({ math.huge, 65504 }, qm.tensor({ 65520, 65519 }):cast("f16"):totable())
    assert.same({ 2 ^ -24, 0, 2 ^ -14 }, qm.tensor({ 2 ^ -24, 2 ^ -25, 2 ^ -14 }):cast("f16"):totable())
  end)

  it("equals the reference between all types", function()
    local names = { "f32", "f16", "bf16", "i8", "u8", "i16", "i32", "i64" }
    for _, from in ipairs(names) do
      for _, to in ipairs(names) do
        local x = qm.randn({ 3, 517 }, reference, 0, 60):to(from)
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both({ x }, function(y) return y:cast(to) end, move)
          testing.assert_equal(expected[1], actual[1], from .. " to " .. to)
        end
      end
    end
  end)

  it("keeps NaN and every 16-bit pattern through f32 and back", function()
    local ffi = require("ffi")
    local bits = ffi.new("uint16_t[65536]")
    for i = 0, 65535 do bits[i] = i end
    for _, dtype in ipairs({ "f16", "bf16" }) do
      local x = qm.empty({ 65536 }, { dtype = dtype })
      assert.equal(0, require("quartermoon.ffi").lib.qm_write(x.desc, bits, 131072))
      local back = x:cast("f32"):cast(dtype):bytes()
      local a, b = ffi.cast("const uint16_t *", back), bits
      local special = dtype == "f16" and 0x7C00 or 0x7F80
      for i = 0, 65535 do
        local is_nan = bit.band(i, 0x7FFF) > special
        if is_nan then
          assert(bit.band(a[i], 0x7FFF) > special, "NaN lost")
        else
          assert(a[i] == b[i], "a value changed")
        end
      end
    end
  end)

  it("refuses unknown types", function()
    assert.error_matches(function() qm.cast(qm.ones(1), "f64") end, "f64", 1, true)
  end)
end)

describe("accumulate, the kernel under gradients", function()
  local ffi = require("ffi")
  local lib = require("quartermoon.ffi").lib
  it("equals the reference in every pair of types; beta 0 forgets what was there", function()
    local pairs_of_types = { { "f32", "f32" }, { "bf16", "f32" }, { "bf16", "bf16" }, { "f16", "f32" },
      { "f32", "bf16" } }
    for _, types in ipairs(pairs_of_types) do
      for _, scale in ipairs({ { 1, 1 }, { 0.5, 1 }, { -2, 0.25 }, { 3, 0 } }) do
        local x = qm.randn({ 3, 519 }, reference):to(types[1])
        local out = qm.randn({ 3, 519 }, reference):to(types[2])
        local expected, actual = testing.both({ x, out }, function(a, b)
          assert.equal(0, lib.qm_accumulate(a.desc, b.desc, scale[1], scale[2]))
          return b
        end)
        testing.assert_close(expected[1], actual[1], types[2] == "f32" and 1e-6 or 1e-2)
      end
    end
    local out = qm.full({ 3 }, 0 / 0)
    assert.equal(0, lib.qm_accumulate(qm.ones(3).desc, out.desc, 2, 0))
    assert.same({ 2, 2, 2 }, out:totable())
  end)

  it("refuses other shapes and parts of each other", function()
    local x = qm.ones({ 4, 2 })
    assert.equal(-1, lib.qm_accumulate(x.desc, qm.ones({ 8 }).desc, 1, 1))
    assert.equal("argument 'out': expected f32 [4, 2], got f32 [8]", ffi.string(lib.qm_last_error()))
    assert.equal(-1, lib.qm_accumulate(x:narrow(1, 3).desc, x:narrow(2, 3).desc, 1, 1))
    assert.equal("argument 'out': overlaps argument 'x'", ffi.string(lib.qm_last_error()))
  end)
end)
