local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }
local leaf = { device = "reference", requires_grad = true }

---Forward and backward on one device: out, dx, dweight.
local function run(x, weight, dout)
  for _, tensor in ipairs({ x, weight }) do tensor:requires_gradient():zero_grad() end
  local out = qm.rms_norm(x, weight, 1e-5)
  out:backward(dout)
  return out, x.grad, weight.grad
end

-- Odd sizes; rows of one, two and four packs a thread on a GPU, and some too long for registers.
local SHAPES = { { 1, 7 }, { 3, 5 }, { 7, 515 }, { 130, 96 }, { 67, 1030 }, { 0, 4 }, { 90, 2056 }, { 1500, 768 },
  { 5, 5000 }, { 3, 20480 } }

describe("qm.rms_norm", function()
  it("divides each row by its root mean square", function()
    local out = qm.rms_norm(qm.tensor({ { 3, 4 }, { 0, 2 } }), qm.tensor({ 1, 10 }), 0):totable()
    assert.near(3 / math.sqrt(12.5), out[1][1], 1e-6)
    assert.near(40 / math.sqrt(12.5), out[1][2], 1e-5)
    assert.equal(0, out[2][1])
    assert.near(20 / math.sqrt(2), out[2][2], 1e-5)
  end)

  it("adds eps to the mean square", function()
    local out = qm.rms_norm(qm.tensor({ { 3, 4 } }), qm.ones({ 2 }), 12.5):totable()
    assert.near(3 / 5, out[1][1], 1e-6)
  end)

  -- bf16 and f16 outputs may differ by one rounding step: 2^-8 and 2^-11 of their own size.
  local tolerance = { f32 = 2e-6, bf16 = 2 ^ -8, f16 = 2 ^ -10 }
  for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
    it("and its gradient equal the reference in " .. dtype .. ", on odd sizes", function()
      for _, shape in ipairs(SHAPES) do
        local x = qm.randn(shape, reference, 0.5, 3):to(dtype)
        local weight = qm.randn({ shape[2] }, reference):to(dtype == "f16" and "f16" or "f32")
        local dout = qm.randn(shape, reference):to(dtype)
        local expected, actual = testing.both({ x, weight, dout }, run)
        for i, name in ipairs({ "out", "dx", "dweight" }) do
          testing.assert_close(expected[i], actual[i], name == "dweight" and 1e-5 or tolerance[dtype], name)
        end
      end
    end)
  end

  it("takes rows that begin anywhere", function()
    for _, columns in ipairs({ 64, 515 }) do
      local x, dout = qm.randn({ 9, columns }, reference):to("bf16"), qm.randn({ 9, columns }, reference):to("bf16")
      local weight = qm.randn({ columns }, reference)
      for _, move in ipairs({ testing.shifted, testing.vectors_shifted }) do
        local expected, actual = testing.both({ x, weight, dout }, run, move)
        for i, name in ipairs({ "out", "dx", "dweight" }) do
          testing.assert_close(expected[i], actual[i], name == "dweight" and 1e-5 or tolerance.bf16, name)
        end
      end
    end
  end)

  it("has the gradient that central differences show", function()
    testing.check_gradients(function(x, weight) return qm.rms_norm(x, weight, 0.1) end,
      { qm.randn({ 3, 5 }, leaf), qm.randn({ 5 }, leaf) })
  end)

  it("hands a computed weight its gradient on", function()
    local base = qm.randn({ 5 }, leaf)
    testing.check_gradients(function(x) return qm.rms_norm(x, qm.swiglu(base, base), 0.1) end,
      { qm.randn({ 3, 5 }, leaf) })
    assert.is_not_nil(base.grad)
  end)

  it("adds to the weight's gradient", function()
    local x, weight = qm.tensor({ { 2, 0 } }), qm.ones({ 2 }):requires_gradient()
    for _ = 1, 3 do qm.rms_norm(x, weight, 0):backward(qm.ones({ 1, 2 })) end
    assert.near(3 * math.sqrt(2), weight.grad:totable()[1], 1e-5)
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    assert.error_matches(function() qm.rms_norm(qm.ones({ 2, 3 }), qm.ones({ 4 })) end,
      "qm.rms_norm: argument 'weight': expected float [C=3], got f32 [4]", 1, true)
    assert.error_matches(function() qm.rms_norm(qm.ones({ 2, 3 }), qm.ones({ 3 }), -1) end,
      "argument 'eps': expected a number of at least 0, got number -1", 1, true)
  end)
end)

describe("qm.add_rms_norm", function()
  it("gives the sum and its normalisation", function()
    local out, sum = qm.add_rms_norm(qm.tensor({ { 1, 5 } }), qm.tensor({ { 2, -1 } }), qm.ones({ 2 }), 0)
    assert.same({ { 3, 4 } }, sum:totable())
    assert.near(3 / math.sqrt(12.5), out:totable()[1][1], 1e-6)
  end)

  for _, dtype in ipairs({ "f32", "bf16" }) do
    it("equals the reference in " .. dtype, function()
      for _, shape in ipairs({ { 9, 77 }, { 31, 768 }, { 2, 12288 } }) do
        local x, residual = qm.randn(shape, reference):to(dtype), qm.randn(shape, reference):to(dtype)
        local expected, actual = testing.both({ x, residual, qm.randn({ shape[2] }, reference) }, qm.add_rms_norm)
        testing.assert_close(expected[1], actual[1], dtype == "f32" and 2e-6 or 2 ^ -8)
        testing.assert_equal(expected[2], actual[2], "sum")
      end
    end)
  end

  -- Through both outputs, the normalised one only, and the sum only.
  for _, case in ipairs({ { true, true }, { true, false }, { false, true } }) do
    it(("has the right gradient through out=%s, sum=%s"):format(tostring(case[1]), tostring(case[2])), function()
      local function fn(x, residual, weight)
        local out, sum = qm.add_rms_norm(x, residual, weight, 0.1)
        return qm.swiglu(case[1] and out or sum, case[2] and sum or out)
      end
      testing.check_gradients(fn, { qm.randn({ 3, 5 }, leaf), qm.randn({ 3, 5 }, leaf), qm.randn({ 5 }, leaf) },
        { tolerance = 5e-3 })
    end)
  end

  it("leaves nothing behind, step after step", function()
    local x, residual = qm.randn({ 4, 8 }):requires_gradient(), qm.randn({ 4, 8 }):requires_gradient()
    local weight, device = qm.ones({ 8 }):requires_gradient(), qm.default_device()
    local live
    collectgarbage()
    collectgarbage()
    collectgarbage("stop")
    for step = 1, 20 do
      qm.scope(function()
        local out, sum = qm.add_rms_norm(x, residual, weight)
        local loss = qm.swiglu(out, sum)
        loss:backward(qm.ones({ 4, 8 }))
        loss:free()
      end)
      if step == 2 then live = device:memory().live_bytes end
    end
    collectgarbage("restart")
    assert.equal(live, device:memory().live_bytes)
  end)

  it("needs a residual", function()
    assert.error_matches(function() qm.add_rms_norm(qm.ones({ 2, 3 }), nil, qm.ones({ 3 })) end,
      "qm.add_rms_norm: argument 'residual': expected a tensor, got nothing", 1, true)
  end)
end)
