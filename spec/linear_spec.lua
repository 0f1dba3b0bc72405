-- qm.linear: its result, and its gradients to x, weight and bias.
local qm = require("quartermoon")
local binding = require("quartermoon.ffi")
local testing = require("spec.support.testing")

local function randn(shape, dtype) return qm.randn(shape, { device = "reference" }):to(dtype) end

describe("qm.linear", function()
  it("has the gradient that central differences show", function()
    local options = { device = "reference", requires_grad = true }
    testing.check_gradients(qm.linear, { qm.randn({ 3, 5 }, options), qm.randn({ 5, 4 }, options) })
    testing.check_gradients(qm.linear, { qm.randn({ 3, 5 }, options), qm.randn({ 5, 4 }, options),
      qm.randn({ 4 }, options) })
  end)

  it("adds the bias to every row", function()
    local x, weight = qm.tensor({ { 1, 2 }, { 3, 4 } }), qm.tensor({ { 1, 0, 2 }, { 0, 1, -1 } })
    assert.same({ { 11, 22, 30 }, { 13, 24, 32 } }, qm.linear(x, weight, qm.tensor({ 10, 20, 30 })):totable())
  end)

  for dtype, tolerance in pairs({ f32 = 1e-5, bf16 = 2 ^ -7, f16 = 2 ^ -9 }) do
    it("equals the reference in " .. dtype .. ", with biases of either type and unaligned", function()
      for _, size in ipairs({ { 1, 1, 1 }, { 3, 5, 7 }, { 70, 33, 130 }, { 260, 129, 65 } }) do
        local x, weight = randn({ size[1], size[2] }, dtype), randn({ size[2], size[3] }, dtype)
        for _, bias_dtype in ipairs({ "f32", dtype }) do
          local bias = randn({ size[3] + 1 }, bias_dtype)
          local expected, actual = testing.both({ x, weight, bias }, function(a, b, c)
            return qm.linear(a, b, c:narrow(2, size[3])), qm.linear(a, b, c:narrow(1, size[3]))
          end)
          testing.assert_close(expected[1], actual[1], tolerance, "out", 1)
          testing.assert_close(expected[2], actual[2], tolerance, "out", 1)
        end
      end
    end)
  end

  ---The gradients of two calls: those of x and of the leaves, and of a weight and a bias that are none.
  local function gradients(x, weight, bias, dout)
    x = x:clone():requires_gradient()
    local leaves = { weight:clone():requires_gradient(), bias:clone():requires_gradient() }
    local sources = { weight:clone():requires_gradient(), bias:clone():requires_gradient() }
    qm.linear(x, unpack(leaves)):backward(dout)
    qm.linear(x, unpack(leaves)):backward(dout)
    qm.linear(x, sources[1] * 1, sources[2] * 1):backward(dout)
    return leaves[1].grad, leaves[2].grad, x.grad, sources[1].grad, sources[2].grad
  end

  -- A leaf's are f32, with sums in another order. Others are rounded to the operand's type on their way.
  for _, types in ipairs({ { "f32", "f32", "f32" }, { "bf16", "f32", "f32" }, { "f16", "f32", "f32" },
    { "bf16", "bf16", "bf16" }, { "f16", "f16", "f16" }, { "bf16", "f32", "bf16" } }) do
    it(("has the reference's gradients: x %s, weight %s, bias %s"):format(unpack(types)), function()
      local tolerances = { 1e-5, 1e-5 }
      for i = 1, 3 do tolerances[2 + i] = types[i] == "f32" and 1e-5 or 2 ^ -7 end
      for _, size in ipairs({ { 1, 1, 1 }, { 3, 5, 7 }, { 0, 4, 8 }, { 33, 17, 12 }, { 65, 72, 40 } }) do
        local rows, inputs, outputs = unpack(size)
        local operands = { randn({ rows, inputs }, types[1]), randn({ inputs, outputs }, types[2]),
          randn({ outputs }, types[3]), randn({ rows, outputs }, types[1]) }
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both(operands, gradients, move)
          for i, name in ipairs({ "leaf weight", "leaf bias", "x", "weight", "bias" }) do
            testing.assert_close(expected[i], actual[i], tolerances[i], name)
          end
        end
      end
    end)
  end

  it("over no channels is the bias", function()
    local out = qm.linear(qm.empty({ 2, 0 }), qm.empty({ 0, 3 }), qm.tensor({ 1, 2, 3 }))
    assert.same({ { 1, 2, 3 }, { 1, 2, 3 } }, out:totable())
    assert.same({ { 0 } }, qm.linear(qm.empty({ 1, 0 }), qm.empty({ 0, 1 })):totable())
  end)

  it("lets f32 weights meet 16-bit activations, and sums their gradient in f32", function()
    local x = qm.randn({ 6, 5 }):to("bf16"):requires_gradient()
    local weight = qm.randn({ 5, 4 }, { requires_grad = true })
    local dout = qm.randn({ 6, 4 }):to("bf16")
    local out = qm.linear(x, weight)
    assert.equal("bf16", out.dtype)
    testing.assert_equal(qm.matmul(x:to("bf16"), weight:to("bf16")), out)
    out:backward(dout)
    assert.equal("f32", weight.grad.dtype)
    testing.assert_close(qm.matmul(x:to("f32"), dout:to("f32"), { trans_a = true }), weight.grad, 1e-5)
    testing.assert_close(qm.matmul(dout:to("f32"), weight:to("bf16"):to("f32"), { trans_b = true }), x.grad, 2 ^ -7)
    local before = weight.grad:clone()
    qm.linear(x, weight):backward(dout)
    local doubled = qm.matmul(x:to("f32"), dout:to("f32"), { trans_a = true })
    binding.check(binding.lib.qm_gemm(x:to("f32").desc, dout:to("f32").desc, doubled.desc, 1, 0, 1, 1), "qm_gemm")
    testing.assert_close(doubled, weight.grad, 1e-5)
    assert.not_equal(before:bytes(), weight.grad:bytes())
  end)

  it("speaks of x and weight when they do not fit", function()
    assert.error_matches(function() qm.linear(qm.ones({ 2, 3 }), qm.ones({ 2, 3 })) end,
      "qm.linear: argument 'weight': expected f32 [K=3, N], got f32 [2, 3]", 1, true)
    assert.error_matches(function() qm.linear(qm.ones({ 2 }), qm.ones({ 2, 3 })) end,
      "qm.linear: argument 'x': expected float [M, K], got f32 [2]", 1, true)
    assert.error_matches(function() qm.linear(qm.ones({ 2, 2 }), qm.ones({ 2, 3 }), qm.ones({ 1 })) end,
      "qm.linear: argument 'bias': expected float [N=3], got qm.Tensor f32 [1]", 1, true)
  end)
end)
