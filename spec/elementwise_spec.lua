local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }
local with_gradient = { device = "reference", requires_grad = true }

-- Each operation: its value by Lua's own arithmetic, and inputs from where it is smooth.
local function sigmoid(x) return 1 / (1 + math.exp(-x)) end
local function erf(x) -- Abramowitz and Stegun 7.1.5, the power series
  local sum, term = x, x
  for n = 1, 60 do
    term = -term * x * x / n
    sum = sum + term / (2 * n + 1)
  end
  return 2 / math.sqrt(math.pi) * sum
end
local UNARY = {
  neg = { function(x) return -x end },
  abs = { math.abs },
  exp = { math.exp },
  log = { math.log, positive = true },
  sqrt = { math.sqrt, positive = true },
  rsqrt = { function(x) return 1 / math.sqrt(x) end, positive = true },
  reciprocal = { function(x) return 1 / x end, positive = true },
  tanh = { math.tanh },
  sigmoid = { sigmoid },
  silu = { function(x) return x * sigmoid(x) end },
  gelu = { function(x) return 0.5 * x * (1 + erf(x / math.sqrt(2))) end },
  relu = { function(x) return math.max(x, 0) end },
  square = { function(x) return x * x end },
  sin = { math.sin },
  cos = { math.cos },
  sign = { function(x) return x > 0 and 1 or x < 0 and -1 or 0 end, flat = true },
  floor = { math.floor, flat = true },
  round = { function(x) return math.floor(x + 0.5) end, flat = true },
}
-- Parameters beyond x, and how the name is called with them.
local CALLS = {
  ["gelu tanh"] = { function(x) return qm.gelu(x, "tanh") end,
    function(x) return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ^ 3))) end },
  ["pow 2.5"] = { function(x) return qm.pow(x, 2.5) end, function(x) return x ^ 2.5 end, positive = true },
  ["pow -1"] = { function(x) return x ^ -1 end, function(x) return 1 / x end, positive = true },
  clamp = { function(x) return qm.clamp(x, -0.5, 0.75) end,
    function(x) return math.min(math.max(x, -0.5), 0.75) end },
  ["2 x - 3"] = { function(x) return 2 * x - 3 end, function(x) return 2 * x - 3 end },
  ["1 - x"] = { function(x) return 1 - x end, function(x) return 1 - x end },
  ["1 / x"] = { function(x) return 1 / x end, function(x) return 1 / x end, positive = true },
  ["x / 3"] = { function(x) return x / 3 end, function(x) return x / 3 end },
}
for name, entry in pairs(UNARY) do
  CALLS[name] = { qm[name], entry[1], positive = entry.positive, flat = entry.flat }
end

-- Away from the kinks of abs, relu, clamp, floor and round, so that central differences hold.
local function inputs_for(entry, shape, options)
  local x = qm.rand(shape, { device = "reference" }, 0.1, 0.4)
  local signs = qm.rand(shape, { device = "reference" }, -1, 1):sign()
  local y = entry.positive and x + 0.5 or signs * (x + 1)
  return options and options.requires_grad and y:requires_gradient() or y
end

describe("qm.pow", function()
  it("has gradient 0 for the exponent 0, at 0 too", function()
    local x = qm.tensor({ 0, 2 }, { requires_grad = true })
    x:pow(0):sum():backward()
    assert.same({ 0, 0 }, x.grad:totable())
  end)
end)

---The value, and the gradient where there is one, of an operation.
local function run(entry)
  return function(x, dout)
    if entry.flat then return entry[1](x) end
    x:requires_gradient():zero_grad()
    local out = entry[1](x):keep()
    out:backward(dout)
    return out, x.grad
  end
end

describe("unary operations", function()
  for name, entry in pairs(CALLS) do
    it(name .. " has its value, also far out", function()
      local values = entry.positive and { 0.25, 1, 3, 1000 } or { -3, -1.25, -0.25, 0, 0.25, 1.3, 3 }
      local actual = entry[1](qm.tensor(values)):totable()
      for i, x in ipairs(values) do
        assert.near(entry[2](x), actual[i], 3e-6 * math.max(1, math.abs(entry[2](x))), "x = " .. x)
      end
    end)

    for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
      it(name .. " and its gradient equal the reference in " .. dtype .. ", on odd sizes", function()
        for _, shape in ipairs({ {}, { 1 }, { 3, 5 }, { 7, 515 }, { 0, 3 } }) do
          local x = inputs_for(entry, shape):to(dtype)
          for _, move in ipairs({ false, testing.shifted }) do
            local dout = qm.randn(shape, { device = "reference" }):to(dtype)
            local expected, actual = testing.both({ x, dout }, run(entry), move)
            testing.assert_close(expected[1], actual[1], dtype == "f32" and 2e-6 or 1e-2)
            if not entry.flat then
              testing.assert_close(expected[2], actual[2], dtype == "f32" and 4e-6 or 1e-2, "dx", 0.1)
            end
          end
        end
      end)
    end

    if not entry.flat then
      it(name .. " has the gradient that central differences show", function()
        testing.check_gradients(entry[1], { inputs_for(entry, { 3, 5 }, with_gradient) },
          { step = 2e-3, tolerance = 5e-3 })
      end)
    end
  end

  it("keep NaN, and infinities where they make sense", function()
    local nan, inf = 0 / 0, math.huge
    for name, entry in pairs(CALLS) do
      assert.is_true(entry[1](qm.tensor({ nan })):item() ~= entry[1](qm.tensor({ nan })):item(), name)
    end
    assert.same({ inf, 0, inf }, { qm.exp(qm.tensor({ 200, -200, inf })):totable()[1],
      qm.exp(qm.tensor({ -200 })):item(), qm.abs(qm.tensor({ -inf })):item() })
    assert.same({ 1, -1 }, qm.tanh(qm.tensor({ 100, -inf })):totable())
    assert.same({ 1, 0 }, qm.sigmoid(qm.tensor({ inf, -200 })):totable())
    assert.equal(-inf, qm.log(qm.tensor({ 0 })):item())
  end)

  it("round halves to even", function()
    assert.same({ 0, 2, 2, -2, -0 }, qm.round(qm.tensor({ 0.5, 1.5, 2.5, -1.5, -0.5 })):totable())
  end)

  it("are methods", function()
    assert.same({ 4, 1 }, qm.tensor({ -2, 1 }):square():totable())
    assert.same({ 0, 1 }, qm.tensor({ -2, 4 }):clamp(0, 1):totable())
  end)

  it("refuse what they cannot take", function()
    assert.error_matches(function() qm.exp(3) end, "qm.exp: argument 'x': expected a tensor, got number 3", 1, true)
    assert.error_matches(function() qm.exp(qm.zeros({ 2 }, { dtype = "i32" })) end,
      "qm.exp: argument 'x': expected float [...], got i32 [2]", 1, true)
    assert.error_matches(function() qm.clamp(qm.ones(1), 2, 1) end,
      "qm.clamp: argument 'high': expected a number of at least 2, got number 1", 1, true)
    assert.error_matches(function() qm.gelu(qm.ones(1), "fast") end,
      "argument 'approximation': expected one of 'none', 'tanh', got string 'fast'", 1, true)
    local x = qm.ones(1)
    x:free()
    assert.error_matches(function() qm.exp(x) end, "argument 'x': not a tensor (or one that was freed)", 1, true)
  end)
end)

local BINARY = {
  add = function(a, b) return a + b end,
  sub = function(a, b) return a - b end,
  mul = function(a, b) return a * b end,
  div = function(a, b) return a / b end,
  maximum = math.max,
  minimum = math.min,
  eq = function(a, b) return a == b and 1 or 0 end,
  lt = function(a, b) return a < b and 1 or 0 end,
  le = function(a, b) return a <= b and 1 or 0 end,
}
local SHAPES = { { { 3, 5 }, { 3, 5 } }, { { 3, 5 }, { 5 } }, { { 5 }, { 3, 5 } }, { { 3, 5 }, { 3, 1 } },
  { { 3, 5 }, {} }, { { 2, 1, 3, 1 }, { 4, 1, 5 } }, { { 7, 515 }, { 515 } }, { { 7, 515 }, { 7, 1 } },
  { { 1030 }, { 1030 } }, { { 2, 0 }, { 1, 1 } },
  { { 7, 48 }, { 48 } }, { { 7, 48 }, { 7, 1 } }, { { 5, 3, 2, 16 }, { 5, 1, 2, 1 } }, { { 40, 1 }, { 1, 40 } } }

describe("binary operations", function()
  for name, plain in pairs(BINARY) do
    it(name .. " has its value", function()
      local a, b = { 1, -2, 3, 0.5 }, { 1, 4, -0.25, 2 }
      local out = qm[name](qm.tensor(a), qm.tensor(b)):totable()
      for i = 1, #a do assert.near(plain(a[i], b[i]), out[i], 1e-6) end
      assert.near(plain(3, 2), qm[name](qm.tensor({ 3 }), 2):item(), 1e-6)
      assert.near(plain(2, 3), qm[name](2, qm.tensor({ 3 })):item(), 1e-6)
    end)

    it(name .. " equals the reference, broadcasting, in all pairs of types", function()
      for _, shapes in ipairs(SHAPES) do
        for _, types in ipairs({ { "f32", "f32" }, { "bf16", "bf16" }, { "f16", "f32" }, { "bf16", "f32" } }) do
          local a = qm.randn(shapes[1], reference):to(types[1])
          local b = (qm.rand(shapes[2], reference, 0.5, 2)):to(types[2])
          for _, move in ipairs({ false, testing.shifted }) do
            local expected, actual = testing.both({ a, b }, qm[name], move)
            testing.assert_equal(expected[1], actual[1])
          end
        end
      end
    end)
  end

  ---Values on both sides of 1 .. 2 and away from it, where maximum and minimum have a kink.
  local function either_side(shape)
    local side = qm.rand(shape, reference):totable()
    local function draw(value)
      if type(value) == "number" then return value < 0.5 and 1.8 * value or 1.2 + 1.8 * value end
      for i, inner in ipairs(value) do value[i] = draw(inner) end
      return value
    end
    return qm.tensor(draw(side), with_gradient)
  end

  for _, name in ipairs({ "add", "sub", "mul", "div", "maximum", "minimum" }) do
    it(name .. " has the gradients that central differences show, broadcasting", function()
      for i = 1, 6 do
        local a = name:find("imum") and either_side(SHAPES[i][1]) or qm.randn(SHAPES[i][1], with_gradient)
        local b = qm.rand(SHAPES[i][2], with_gradient, 1, 2)
        testing.check_gradients(qm[name], { a, b }, { step = 1e-3, tolerance = 1e-2 })
      end
    end)
  end

  it("broadcast as numpy does", function()
    local out = qm.tensor({ { 1 }, { 2 } }) + qm.tensor({ 10, 20, 30 })
    assert.same({ { 11, 21, 31 }, { 12, 22, 32 } }, out:totable())
  end)

  it("give the type of both, or f32", function()
    local a, b = qm.ones(2, { dtype = "bf16" }), qm.ones(2)
    assert.equal("bf16", (a + a).dtype)
    assert.equal("bf16", (a / 2).dtype)
    assert.equal("f32", (a * b).dtype)
  end)

  it("return a gradient of each operand's own type", function()
    local a = qm.tensor({ 1, 2 }, { requires_grad = true })
    local half = qm.cast(a, "bf16")
    local b = qm.tensor({ 3, 4 }, { requires_grad = true })
    local out = (half * b):sum()
    out:backward()
    assert.same({ 3, 4 }, a.grad:totable())
    assert.same({ 1, 2 }, b.grad:totable())
  end)

  it("sum a broadcast gradient back: by hand", function()
    local x = qm.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, { requires_grad = true })
    local bias = qm.tensor({ 10, 20, 30 }, { requires_grad = true })
    local scale = qm.tensor({ { 2 }, { 3 } }, { requires_grad = true });
    ((x + bias) * scale):sum():backward()
    assert.same({ { 2, 2, 2 }, { 3, 3, 3 } }, x.grad:totable())
    assert.same({ 5, 5, 5 }, bias.grad:totable())
    assert.same({ { 66 }, { 75 } }, scale.grad:totable())
  end)

  it("give NaN where one operand is", function()
    local nan = 0 / 0
    for _, name in ipairs({ "maximum", "minimum", "add" }) do
      local out = qm[name](qm.tensor({ nan, 1 }), qm.tensor({ 1, nan })):totable()
      assert.is_true(out[1] ~= out[1] and out[2] ~= out[2], name)
    end
  end)

  it("say which shapes do not fit", function()
    assert.error_matches(function() return qm.ones({ 2, 3 }) + qm.ones({ 2 }) end,
      "qm.add: argument 'b': expected what broadcasts with [2, 3], got qm.Tensor f32 [2]", 1, true)
    assert.error_matches(function() return qm.ones({ 2 }) * "x" end,
      "qm.mul: argument 'b': expected a tensor, got string 'x'", 1, true)
    assert.error_matches(function() return qm.ones({ 2 }) + qm.ones({ 2 }, { dtype = "i64" }) end,
      "qm.add: argument 'b': expected float [...], got i64 [2]", 1, true)
  end)
end)

describe("in place", function()
  it("add_ and mul_ change the tensor itself", function()
    local x = qm.tensor({ { 1, 2 }, { 3, 4 } })
    assert.equal(x, x:add_(qm.tensor({ { 1, 1 }, { 2, 2 } }), 0.5))
    assert.same({ { 1.5, 2.5 }, { 4, 5 } }, x:totable())
    assert.same({ { 3, 5 }, { 8, 10 } }, x:mul_(2):totable())
    assert.same({ { 2, 4 }, { 7, 9 } }, x:add_(-1):totable())
    assert.same({ { 0, 5 }, { 5, 10 } }, x:add_(qm.tensor({ 2, -1 }), -1):totable())
    assert.same({ { 0, 5 }, { 50, 100 } }, x:mul_(qm.tensor({ { 1 }, { 10 } })):totable())
  end)

  it("are refused on tensors whose value the tape may need", function()
    local x = qm.ones(2, { requires_grad = true })
    local y = x * 2
    for _, change in ipairs({ function() y:add_(1) end, function() y:mul_(2) end, function() y:fill(0) end,
      function() y:copy(x) end }) do
      assert.error_matches(change, "this tensor is on the gradient tape", 1, true)
    end
    assert.same({ 3, 3 }, x:add_(2):totable()) -- a leaf between steps
  end)

  it("say what does not fit", function()
    assert.error_matches(function() qm.ones({ 2 }):mul_(qm.ones({ 3 })) end,
      "mul_: argument 'b': expected what broadcasts to f32 [2], got f32 [3]", 1, true)
  end)
end)
