local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }
local leaf = { device = "reference", requires_grad = true }
local NAMES = { "out", "dx", "dweight", "dbias" }

---Forward and backward on one device.
local function run(x, weight, bias, dout)
  for _, tensor in ipairs({ x, weight, bias }) do tensor:requires_gradient():zero_grad() end
  local out = qm.layer_norm(x, weight, bias, 1e-5)
  out:backward(dout)
  return out, x.grad, weight.grad, bias.grad
end

-- Odd sizes; rows of one, two and four packs a thread on a GPU, and some too long for registers.
local SHAPES = { { 1, 7 }, { 3, 5 }, { 7, 515 }, { 130, 96 }, { 67, 1030 }, { 0, 4 }, { 90, 2056 }, { 1500, 768 },
  { 5, 5000 }, { 3, 20480 } }
-- bf16 and f16 outputs may differ by one rounding step: 2^-8 and 2^-11 of their own size.
local tolerance = { f32 = 3e-6, bf16 = 2 ^ -8, f16 = 2 ^ -10 }

describe("qm.layer_norm", function()
  it("takes each row's mean away and divides by its deviation", function()
    local x, weight, bias = qm.tensor({ { 1, 3 }, { 5, 5 } }), qm.tensor({ 1, 10 }), qm.tensor({ 0, 100 })
    local out = qm.layer_norm(x, weight, bias, 0.5):totable()
    local deviation = math.sqrt(1 + 0.5)
    assert.near(-1 / deviation, out[1][1], 1e-6)
    assert.near(10 / deviation + 100, out[1][2], 1e-5)
    assert.equal(0, out[2][1])
    assert.equal(100, out[2][2])
  end)

  it("does without a bias", function()
    local out = qm.layer_norm(qm.tensor({ { 1, 3 } }), qm.ones({ 2 }), nil, 0):totable()
    assert.near(-1, out[1][1], 1e-6)
    assert.near(1, out[1][2], 1e-6)
    testing.check_gradients(function(x, weight) return qm.layer_norm(x, weight, nil, 0.1) end,
      { qm.randn({ 3, 5 }, leaf), qm.randn({ 5 }, leaf) })
  end)

  for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
    it("and its gradient equal the reference in " .. dtype .. ", on odd sizes", function()
      for _, shape in ipairs(SHAPES) do
        local x = qm.randn(shape, reference, 0.5, 3):to(dtype)
        local weight_type = dtype == "f16" and "f16" or "f32"
        local weight = qm.randn({ shape[2] }, reference):to(weight_type)
        local bias = qm.randn({ shape[2] }, reference):to(weight_type)
        local dout = qm.randn(shape, reference):to(dtype)
        local expected, actual = testing.both({ x, weight, bias, dout }, run)
        for i, name in ipairs(NAMES) do
          testing.assert_close(expected[i], actual[i], i > 2 and 1e-5 or tolerance[dtype], name)
        end
      end
    end)
  end

  it("takes rows that begin anywhere", function()
    for _, columns in ipairs({ 64, 515 }) do
      local x, dout = qm.randn({ 9, columns }, reference):to("bf16"), qm.randn({ 9, columns }, reference):to("bf16")
      local weight, bias = qm.randn({ columns }, reference), qm.randn({ columns }, reference)
      for _, move in ipairs({ testing.shifted, testing.vectors_shifted }) do
        local expected, actual = testing.both({ x, weight, bias, dout }, run, move)
        for i, name in ipairs(NAMES) do
          testing.assert_close(expected[i], actual[i], i > 2 and 1e-5 or tolerance.bf16, name)
        end
      end
    end
  end)

  it("keeps its accuracy far from zero", function()
    -- In one pass, mean(x^2) - mean^2 would cancel: 1e6 against a variance of 1.
    local x = qm.randn({ 3, 1000 }, reference, 1000, 1)
    local weight, bias = qm.ones({ 1000 }, reference), qm.zeros({ 1000 }, reference)
    local expected, actual = testing.both({ x, weight, bias }, qm.layer_norm)
    testing.assert_close(expected[1], actual[1], 1e-4)
  end)

  it("has the gradient that central differences show", function()
    testing.check_gradients(function(x, weight, bias) return qm.layer_norm(x, weight, bias, 0.1) end,
      { qm.randn({ 3, 5 }, leaf), qm.randn({ 5 }, leaf), qm.randn({ 5 }, leaf) })
  end)

  it("hands a computed weight and bias their gradients on", function()
    local base, other = qm.randn({ 5 }, leaf), qm.randn({ 5 }, leaf)
    testing.check_gradients(function(x, w, b) return qm.layer_norm(x, qm.swiglu(w, w), qm.swiglu(b, b), 0.1) end,
      { qm.randn({ 3, 5 }, leaf), base, other })
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    assert.error_matches(function() qm.layer_norm(qm.ones({ 2, 3 }), qm.ones({ 4 })) end,
      "qm.layer_norm: argument 'weight': expected float [C=3], got f32 [4]", 1, true)
    local narrow = qm.ones({ 3 }, { dtype = "bf16" })
    assert.error_matches(function() qm.layer_norm(qm.ones({ 2, 3 }), qm.ones({ 3 }), narrow) end,
      "argument 'bias': expected f32 [C=3], got bf16 [3]", 1, true)
    assert.error_matches(function() qm.layer_norm(qm.ones({ 2, 3 }), qm.ones({ 3 }), nil, -1) end,
      "argument 'eps': expected a number of at least 0, got number -1", 1, true)
  end)
end)

describe("qm.add_layer_norm", function()
  for _, dtype in ipairs({ "f32", "bf16" }) do
    it("equals the reference in " .. dtype, function()
      for _, shape in ipairs({ { 9, 77 }, { 31, 768 }, { 2, 12288 } }) do
        local x, residual = qm.randn(shape, reference):to(dtype), qm.randn(shape, reference):to(dtype)
        local weight, bias = qm.randn({ shape[2] }, reference), qm.randn({ shape[2] }, reference)
        local expected, actual = testing.both({ x, residual, weight, bias }, qm.add_layer_norm)
        testing.assert_close(expected[1], actual[1], tolerance[dtype])
        testing.assert_equal(expected[2], actual[2], "sum")
      end
    end)
  end

  -- Through both outputs, the normalised one only, and the sum only.
  for _, case in ipairs({ { true, true }, { true, false }, { false, true } }) do
    it(("has the right gradient through out=%s, sum=%s"):format(tostring(case[1]), tostring(case[2])), function()
      local function fn(x, residual, weight, bias)
        local out, sum = qm.add_layer_norm(x, residual, weight, bias, 0.1)
        return qm.swiglu(case[1] and out or sum, case[2] and sum or out)
      end
      testing.check_gradients(fn, { qm.randn({ 3, 5 }, leaf), qm.randn({ 3, 5 }, leaf), qm.randn({ 5 }, leaf),
        qm.randn({ 5 }, leaf) }, { tolerance = 5e-3 })
    end)
  end

  it("needs a residual", function()
    assert.error_matches(function() qm.add_layer_norm(qm.ones({ 2, 3 }), nil, qm.ones({ 3 })) end,
      "qm.add_layer_norm: argument 'residual': expected a tensor, got nothing", 1, true)
  end)
end)

describe("qm.nn.LayerNorm", function()
  it("normalises, with a residual too, and prints", function()
    local layer = qm.nn.LayerNorm.new(2)
    local out, sum = layer(qm.tensor({ { 1, 5 } }), qm.tensor({ { 2, -2 } }))
    assert.same({ { 3, 3 } }, sum:totable())
    assert.same({ { 0, 0 } }, out:totable())
    assert.equal("LayerNorm(2, eps 1e-05): 4 weights, 0.0 KiB", tostring(layer))
    assert.is_nil(qm.nn.LayerNorm.new(2, { bias = false }).bias)
  end)
end)
