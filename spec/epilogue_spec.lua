-- What products take along: GELU and its gradient.
local ffi = require("ffi")
local qm = require("quartermoon")
local binding = require("quartermoon.ffi")
local testing = require("spec.support.testing")
local lib, C = binding.lib, ffi.C

---Rows, inner and columns; the last are sizes that cuBLASLt joins, the first ones that it refuses.
local SIZES = { { 1, 1, 1 }, { 3, 5, 7 }, { 33, 17, 12 }, { 5, 0, 8 }, { 0, 4, 8 }, { 16, 24, 8 }, { 65, 72, 40 } }

local function randn(shape, dtype, std) return qm.randn(shape, { device = "reference" }, 0, std or 1):to(dtype) end
local function like(x, shape) return qm.empty(shape, { dtype = x.dtype, device = x.device }) end

---gelu(x w + bias) and its argument.
local function gelu(x, w, bias)
  local out, aux = like(x, { x.shape[1], w.shape[2] }), like(x, { x.shape[1], w.shape[2] })
  binding.check(lib.qm_linear(x.desc, w.desc, bias and bias.desc, out.desc, 0, C.QM_EPILOGUE_GELU, aux.desc), "gelu")
  return out, aux
end

---(dout w^T) gelu'(aux).
local function gelu_grad(dout, w, aux)
  local out = like(dout, aux.shape)
  binding.check(lib.qm_linear(dout.desc, w.desc, nil, out.desc, 1, C.QM_EPILOGUE_GELU_GRAD, aux.desc), "gelu_grad")
  return out
end

describe("qm_linear with an epilogue", function()
  it("is GELU's tanh form by hand, and its slope", function()
    local x, one = qm.tensor({ { 1, -2, 0 } }), qm.tensor({ { 1 } })
    local out, aux = gelu(qm.tensor({ { 1 } }), x, qm.tensor({ 0.5, 0, 0 }))
    assert.same({ { 1.5, -2, 0 } }, aux:totable())
    local function by_hand(v)
      return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ^ 3)))
    end
    for i, v in ipairs({ 1.5, -2, 0 }) do
      assert.near(by_hand(v), out:totable()[1][i], 1e-6)
      local slope = gelu_grad(one, qm.ones({ 3, 1 }), aux):totable()[1][i]
      assert.near((by_hand(v + 1e-3) - by_hand(v - 1e-3)) / 2e-3, slope, 1e-5)
    end
  end)

  -- A 16-bit result is rounded once or, apart from the product, after its argument was: an ulp, 2^-8, each.
  for dtype, tolerance in pairs({ f32 = 1e-5, bf16 = 2 ^ -7, f16 = 2 ^ -10 }) do
    it("equals the reference in " .. dtype .. ", on odd sizes and unaligned operands", function()
      for _, size in ipairs(SIZES) do
        local m, k, n = unpack(size)
        local x, w, bias = randn({ m, k }, dtype), randn({ k, n }, dtype), randn({ n }, "f32")
        local dout, w2, aux = randn({ m, k }, dtype), randn({ n, k }, dtype), randn({ m, n }, dtype, 2)
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both({ x, w, bias }, gelu, move)
          testing.assert_close(expected[1], actual[1], tolerance, "gelu")
          testing.assert_close(expected[2], actual[2], tolerance, "aux")
          expected, actual = testing.both({ x, w }, gelu, move)
          testing.assert_close(expected[1], actual[1], tolerance, "gelu without a bias")
          expected, actual = testing.both({ dout, w2, aux }, gelu_grad, move)
          testing.assert_close(expected[1], actual[1], tolerance, "gelu_grad")
        end
      end
    end)
  end

  it("takes out and x of different types, and leaves what lies behind its results", function()
    local x, w, bias = randn({ 9, 16 }, "bf16"), randn({ 16, 24 }, "bf16"), randn({ 24 }, "bf16")
    local expected, actual = testing.both({ x, w, bias }, function(a, b, c)
      local room = qm.full({ 2 * 9 * 24 + 1 }, 7, { device = a.device })
      local out = room:narrow(1, 9 * 24):reshape(9, 24)
      local aux = room:narrow(9 * 24 + 1, 9 * 24):reshape(9, 24)
      binding.check(lib.qm_linear(a.desc, b.desc, c.desc, out.desc, 0, C.QM_EPILOGUE_GELU, aux.desc), "gelu")
      return room
    end)
    testing.assert_close(expected[1], actual[1], 1e-5)
    assert.equal(7, actual[1]:totable()[2 * 9 * 24 + 1])
  end)

  it("refuses what does not fit", function()
    local x, w, out = qm.ones({ 2, 3 }), qm.ones({ 3, 4 }), qm.ones({ 2, 4 })
    local function linear(epilogue, aux)
      return function()
        binding.check(lib.qm_linear(x.desc, w.desc, nil, out.desc, 0, epilogue, aux and aux.desc), "linear")
      end
    end
    assert.error_matches(linear(3), "argument 'epilogue': there is no epilogue 3", 1, true)
    assert.error_matches(linear(-1), "argument 'epilogue': there is no epilogue -1", 1, true)
    assert.error_matches(linear(1), "argument 'aux': expected f32 [M=2, N=4], got nothing", 1, true)
    assert.error_matches(linear(0, qm.ones({ 2, 4 })), "argument 'aux': expected nothing without an epilogue", 1, true)
    assert.error_matches(linear(2, qm.ones({ 2, 3 })), "argument 'aux': expected f32 [M=2, N=4], got f32 [2, 3]", 1,
      true)
    assert.error_matches(linear(1, qm.ones({ 2, 4 }, { dtype = "bf16" })),
      "argument 'aux': expected f32 [M=2, N=4], got bf16 [2, 4]", 1, true)
    assert.error_matches(linear(1, out), "overlaps", 1, true)
  end)
end)
