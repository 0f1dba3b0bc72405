local qm = require("quartermoon")
local testing = require("spec.support.testing")

---Heads first .. first + count - 1 of x [R, all, D], as a tensor of their own.
local function heads_of(x, first, count)
  local turned = x:transpose(1, 2):narrow(first, count)
  return turned:transpose(1, 2)
end

describe("qm.attention_packed", function()
  for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
    it("is qm.attention of the projection's parts, gradients too, in " .. dtype, function()
      for _, case in ipairs({ { 2, 2, 6 }, { 4, 2, 64 }, { 6, 2, 80 }, { 3, 3, 33 } }) do
        local heads, kv_heads, size = unpack(case)
        local packed = qm.randn({ 70, heads + 2 * kv_heads, size }):to(dtype):requires_gradient()
        local cu = qm.tensor({ 0, 3, 3, 70 }, { dtype = "i32" })
        local dout = qm.randn({ 70, heads, size }):to(dtype)
        local q, k = heads_of(packed, 1, heads), heads_of(packed, heads + 1, kv_heads)
        local v = heads_of(packed, heads + kv_heads + 1, kv_heads)
        local expected = qm.attention(q, k, v, cu, cu, { window = 20 }):keep()
        expected:backward(dout)
        local gradient = packed.grad
        packed.grad = nil
        local out = qm.attention_packed(packed, cu, heads, { window = 20 }):keep()
        out:backward(dout)
        testing.assert_equal(expected, out, "out")
        testing.assert_close(gradient, packed.grad, 0, "dqkv") -- but for the sign of zeros
      end
    end)
  end

  it("has the gradient that central differences show", function()
    local cu = qm.tensor({ 0, 2, 5 }, { dtype = "i32", device = "reference" })
    testing.check_gradients(function(qkv) return qm.attention_packed(qkv, cu, 2) end,
      { qm.randn({ 5, 4, 3 }, { device = "reference", requires_grad = true }) })
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    local cu = qm.tensor({ 0, 3 }, { dtype = "i32" })
    assert.error_matches(function() qm.attention_packed(qm.ones({ 3, 5, 4 }), cu, 2) end,
      "qm.attention_packed: argument 'qkv': expected H + 2 HK heads with H=2, got 5", 1, true)
    assert.error_matches(function() qm.attention_packed(qm.ones({ 3, 8, 4 }), cu, 4, { scale = 0 / 0 }) end,
      "argument 'scale'", 1, true)
  end)
end)
