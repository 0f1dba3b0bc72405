local qm = require("quartermoon")
local testing = require("spec.support.testing")

---Forward and backward: out, dgate, dup.
local function run(gate, up, dout)
  gate:requires_gradient()
  up:requires_gradient()
  local out = qm.swiglu(gate, up)
  out:backward(dout)
  return out, gate.grad, up.grad
end

describe("qm.swiglu", function()
  it("is silu(gate) * up", function()
    local out = qm.swiglu(qm.tensor({ 0, 1, -2 }), qm.tensor({ 5, 2, 3 })):totable()
    assert.equal(0, out[1])
    assert.near(2 / (1 + math.exp(-1)), out[2], 1e-6)
    assert.near(-6 / (1 + math.exp(2)), out[3], 1e-6)
  end)

  for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
    it("and its gradients equal the reference in " .. dtype .. ", on odd sizes", function()
      for _, shape in ipairs({ { 1 }, { 3, 5 }, { 7, 515 }, { 0, 3 }, { 300, 1031 } }) do
        local gate = qm.randn(shape, { device = "reference" }, 0, 4):to(dtype)
        local up = qm.randn(shape, { device = "reference" }):to(dtype)
        local dout = qm.randn(shape, { device = "reference" }):to(dtype)
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both({ gate, up, dout }, run, move)
          for i, name in ipairs({ "out", "dgate", "dup" }) do
            testing.assert_close(expected[i], actual[i], dtype == "f32" and 1e-6 or 2 ^ -8, name)
          end
          for _, tensor in ipairs({ gate, up }) do tensor:zero_grad() end
        end
      end
    end)
  end

  it("has the gradient that central differences show", function()
    local options = { device = "reference", requires_grad = true }
    testing.check_gradients(qm.swiglu, { qm.randn({ 3, 5 }, options), qm.randn({ 3, 5 }, options) })
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    assert.error_matches(function() qm.swiglu(qm.ones({ 2, 3 }), qm.ones({ 3, 2 })) end,
      "qm.swiglu: argument 'up': expected f32 [2, 3], got f32 [3, 2]", 1, true)
    assert.error_matches(function() qm.swiglu(qm.ones({ 2 }), 3) end,
      "argument 'up': expected a tensor, got number 3", 1, true)
  end)
end)
