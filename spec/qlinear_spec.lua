local qm = require("quartermoon")
local testing = require("spec.support.testing")

describe("qm.qlinear", function()
  local function parameter(k, n, options)
    local w = qm.randn({ k, n }, { device = "reference" })
    return qm.QParam.quantize(w, options)
  end

  it("multiplies by the dequantized weight and adds the bias", function()
    local q = parameter(32, 64):to(testing.device)
    local x, bias = qm.randn({ 3, 32 }), qm.randn({ 64 })
    local out, w, xs, b = qm.qlinear(x, q, bias):totable(), q:dequantize("f32"):totable(), x:totable(), bias:totable()
    for row = 1, 3 do
      for n = 1, 64 do
        local sum = b[n]
        for k = 1, 32 do sum = sum + xs[row][k] * w[k][n] end
        assert.near(sum, out[row][n], 1e-4)
      end
    end
  end)

  for _, dtype in ipairs({ "f32", "bf16" }) do
    it("equals the reference in " .. dtype .. ", gradients too", function()
      for _, options in ipairs({ { asym = false, w_bit = 2 }, { w_bit = 8, group_size = -1 } }) do
        local q = parameter(96, 32, options)
        local r = q:to(testing.device)
        local x = qm.randn({ 5, 96 }, { device = "reference" }):to(dtype):requires_gradient()
        local y = x:to(testing.device):requires_gradient()
        local a, b = qm.qlinear(x, q), qm.qlinear(y, r)
        local dout = qm.randn({ 5, 32 }, { device = "reference" }):to(dtype)
        local tolerance = dtype == "f32" and 1e-5 or 2e-2
        testing.assert_close(a, b, tolerance, "out")
        a:backward(dout)
        b:backward(dout:to(testing.device))
        testing.assert_close(x.grad, y.grad, tolerance, "dx")
        testing.assert_close(q.privileged_grad, r.privileged_grad, tolerance, "privileged_grad")
        assert.equal("f32", r.privileged_grad.dtype)
      end
    end)
  end

  it("has the gradients that central differences show", function()
    local q = parameter(32, 32)
    local options = { device = "reference", requires_grad = true }
    local function layer(x, bias) return qm.qlinear(x, q, bias) end
    testing.check_gradients(layer, { qm.randn({ 3, 32 }, options), qm.randn({ 32 }, options) })
  end)

  it("adds up privileged_grad = x^T dy over backward passes, also where x needs no gradient", function()
    local q = parameter(32, 32):to(testing.device)
    local x, dout = qm.randn({ 4, 32 }), qm.randn({ 4, 32 })
    for _ = 1, 2 do qm.qlinear(x, q):backward(dout) end
    local expected = qm.matmul(x, dout, { trans_a = true }) * 2
    testing.assert_close(expected, q.privileged_grad, 1e-5)
    q:zero_grad()
    assert.is_nil(q.privileged_grad)
    q.requires_grad = false
    assert.is_nil(qm.qlinear(x, q).node)
  end)

  it("keeps no dense weight between passes", function()
    local q = parameter(64, 64):to(testing.device)
    local x, device = qm.randn({ 2, 64 }), q.data.device
    collectgarbage()
    collectgarbage()
    local before = device:memory().live_bytes
    local out = qm.qlinear(x, q)
    assert.equal(before + 2 * 64 * 4, device:memory().live_bytes)
    out:backward(qm.ones({ 2, 64 }))
    out:free()
    assert.is_true(device:memory().live_bytes <= before + 64 * 64 * 4 + 2 * 64 * 4) -- the gradient (and the ones)
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    local q = parameter(32, 32):to(testing.device)
    assert.error_matches(function() qm.qlinear(qm.ones({ 2, 31 }), q) end, "qm.qlinear: argument 'x': expected a "
      .. "matrix of K=32 columns, for qm.QParam 32 x 32, 4 bit asym, group 64, got qm.Tensor f32 [2, 31]", 1, true)
    assert.error_matches(function() qm.qlinear(qm.ones({ 2, 32 }), qm.ones({ 32, 32 })) end,
      "argument 'q': expected a qm.QParam", 1, true)
  end)
end)
