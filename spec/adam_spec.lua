local qm = require("quartermoon")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

---Adam in Lua numbers (f64), on lists.
local function expected_step(w, g, m, v, o)
  local a = o.lr * math.sqrt(1 - o.beta2 ^ o.step) / (1 - o.beta1 ^ o.step)
  for i = 1, #w do
    m[i] = o.beta1 * m[i] + (1 - o.beta1) * g[i]
    v[i] = o.beta2 * v[i] + (1 - o.beta2) * g[i] * g[i]
    w[i] = w[i] - a * m[i] / (math.sqrt(v[i]) + o.eps) - o.lr * o.weight_decay * w[i]
  end
end

describe("qm.adamw", function()
  it("moves by lr against the gradient's sign on the first step", function()
    -- m = 0.1 g, v = 0.01 g^2, a = lr * 0.1 / 0.1: u = g / |g|, eps aside.
    local w = qm.tensor({ 1, 1, 1 })
    qm.adamw(w, qm.tensor({ 0.5, -2, 0 }), w:zeros_like(), w:zeros_like(), { step = 1, lr = 0.25, eps = 1e-20 })
    local values = w:totable()
    assert.near(0.75, values[1], 1e-6)
    assert.near(1.25, values[2], 1e-6)
    assert.equal(1, values[3])
  end)

  it("follows the formula over five steps, decay and bias correction included", function()
    local w, m, v = { 0.3, -1.5, 2 }, { 0, 0, 0 }, { 0, 0, 0 }
    local param = qm.tensor(w)
    local exp_avg, exp_avg_sq = param:zeros_like(), param:zeros_like()
    for step = 1, 5 do
      local g = { 0.1 * step, -0.3, 0.02 * (step - 3) }
      local o = { step = step, lr = 0.01, beta1 = 0.8, beta2 = 0.95, eps = 1e-3, weight_decay = 0.1 }
      qm.adamw(param, qm.tensor(g), exp_avg, exp_avg_sq, o)
      expected_step(w, g, m, v, o)
    end
    testing.assert_close(qm.tensor(w), param, 1e-6)
    testing.assert_close(qm.tensor(m), exp_avg, 1e-6)
    testing.assert_close(qm.tensor(v), exp_avg_sq, 1e-6)
  end)

  it("scales the gradient before everything else", function()
    local a, b = qm.ones({ 5 }), qm.ones({ 5 })
    local g = qm.randn({ 5 })
    local values = g:totable()
    for i = 1, 5 do values[i] = 2 * values[i] end
    local doubled = qm.tensor(values)
    qm.adamw(a, g, a:zeros_like(), a:zeros_like(), { step = 1, lr = 0.1, eps = 0.5, grad_scale = 2 })
    qm.adamw(b, doubled, b:zeros_like(), b:zeros_like(), { step = 1, lr = 0.1, eps = 0.5 })
    testing.assert_equal(a, b)
  end)

  for _, types in ipairs({ { "f32", "f32", "f32" }, { "bf16", "bf16", "bf16" }, { "f32", "f16", "bf16" },
    { "bf16", "bf16", "f32" } }) do
    it(("gives the reference's bits: %s parameter, %s gradient, %s moments"):format(unpack(types)), function()
      local there = { device = "reference" }
      for _, shape in ipairs({ { 1 }, { 3, 5 }, { 7, 515 }, { 70001 } }) do
        local inputs = { qm.randn(shape, there):to(types[1]), qm.randn(shape, there):to(types[2]),
          qm.randn(shape, there):to(types[3]), qm.rand(shape, there):to(types[3]) }
        local options = { step = 7, lr = 0.01, weight_decay = 0.1, seed = 5, parameter = 3, grad_scale = 0.3 }
        local expected, actual = testing.both(inputs, function(w, g, m, v)
          qm.adamw(w, g, m, v, options)
          return w, m, v, qm.adam_direction(g, m, v, options)
        end)
        for i, what in ipairs({ "param", "exp_avg", "exp_avg_sq", "direction" }) do
          testing.assert_equal(expected[i], actual[i], what)
        end
      end
    end)
  end

  it("takes the steps of a list as the reference does one by one: any types, sizes, alignments, numbers", function()
    local there, list, steps = { device = "reference" }, {}, {}
    local types = { { "f32", "f32", "f32" }, { "f32", "f32", "bf16" }, { "f32", "bf16", "f32" },
      { "bf16", "f32", "f32" }, { "bf16", "bf16", "bf16" }, { "f32", "f16", "f32" }, { "f32", "bf16", "bf16" },
      { "bf16", "f32", "bf16" } }
    local counts = { 0, 1, 7, 4095, 4096, 4097, 3 * 4096 + 2 }
    local numbers = qm.adam_write({ { step = 9, lr = 0.02, weight_decay = 0.3, seed = 4, parameter = 6 } },
      qm.zeros({ 1, 16 }, { dtype = "i32", device = testing.device })):reshape(16)
    local scale, numbers_there = qm.full({}, 0.7), numbers:to("reference")
    for i = 1, 190 do -- the last all of one type: more than one launch takes
      local type_of, shape = types[i < 110 and i % 8 + 1 or 1], { counts[i % 7 + 1] }
      local tensors = { qm.randn(shape, there):to(type_of[1]), qm.randn(shape, there):to(type_of[2]) }
      if i % 13 > 0 then
        for j = 3, 4 do tensors[j] = qm.rand(shape, there):to(i % 11 == 0 and j == 3 and "bf16" or type_of[3]) end
      end
      local moved = {}
      for j, tensor in ipairs(tensors) do
        moved[j] = i % 5 == 0 and testing.shifted(tensor) or tensor:to(testing.device)
      end
      local options = { step = i, lr = 0.01 / i, weight_decay = i % 3, seed = 5, parameter = i }
      local others = { step = i, lr = 0.01 / i, weight_decay = i % 3, seed = 5, parameter = i }
      if i % 4 == 0 then options.live, others.live = numbers, numbers_there end
      if i % 2 == 0 then options.scale, others.scale = scale, scale:to("reference") end
      steps[i] = { param = moved[1], grad = moved[2], exp_avg = moved[3], exp_avg_sq = moved[4], options = options }
      list[i] = { tensors, moved, others }
    end
    assert.equal(steps, qm.adamw(steps))
    for i, case in ipairs(list) do
      local w, g, m, v = unpack(case[1], 1, 4)
      qm.adamw(w, g, m, v, case[3])
      for j, tensor in ipairs(case[1]) do testing.assert_equal(tensor, case[2][j], ("%d of step %d"):format(j, i)) end
    end
    assert.same({}, qm.adamw({}))
  end)

  it("takes a direction where there are no moments", function()
    local w, u = qm.tensor({ 1, -2 }), qm.tensor({ 0.5, 4 })
    qm.adamw(w, u, nil, nil, { step = 1, lr = 0.25, weight_decay = 0.5, correct_bias = false,
      scale = qm.full({}, 3) }) -- scale leaves a direction alone
    assert.same({ 1 - 0.125 - 0.125, -2 - 1 + 0.25 }, w:totable())
  end)

  it("gives the reference's bits where nothing is aligned, and nothing at all for nothing", function()
    local there = { device = "reference" }
    for _, types in ipairs({ { "f32", "f32" }, { "bf16", "bf16" } }) do
      for _, case in ipairs({ { 1, 4099 }, { 3, 1 }, { 2, 0 } }) do
        local first, count = unpack(case)
        local inputs = {}
        for i = 1, 4 do inputs[i] = qm.rand({ first + count + 2 }, there, 0.1, 1):to(types[i == 2 and 1 or 2]) end
        local options = { step = 2, lr = 0.1, seed = 1, parameter = 2 }
        local expected, actual = testing.both(inputs, function(...)
          local views = {}
          for i, tensor in ipairs({ ... }) do views[i] = tensor:narrow(first + 1, count) end
          qm.adamw(views[1], views[2], views[3], views[4], options)
          qm.adamw(views[1], views[2], nil, nil, options)
          local direction = qm.adam_direction(views[2], views[3], views[4], options)
          return direction, ...
        end)
        for i = 1, 5 do testing.assert_equal(expected[i], actual[i]) end
      end
    end
  end)

  it("rounds bf16 so that the mean is exact: steps far below half a unit still add up", function()
    -- 4096 weights of 1 step by 1/64 of a bf16 unit (2^-8 below 1), 64 times: 1 unit on average.
    local count, unit = 4096, 2 ^ -8
    local w, g = qm.ones({ count }, { dtype = "bf16" }), qm.ones({ count })
    for step = 1, 64 do
      local m, v = qm.zeros({ count }), qm.zeros({ count })
      qm.adamw(w, g, m, v, { step = step, lr = unit / 64, correct_bias = false, beta1 = 0, beta2 = 0, seed = 1 })
    end
    local sum = 0
    for _, value in ipairs(w:totable()) do sum = sum + value end
    -- One weight's variance is at most 64 * (unit/64) * unit: a standard error of unit / sqrt(count).
    assert.near(1 - unit, sum / count, 5 * unit / math.sqrt(count))
  end)

  it("rounds a bf16 weight and both bf16 moments of an element with one word", function()
    for _, device in ipairs({ "reference", testing.device }) do
      for _, types in ipairs({ { "bf16", "bf16" }, { "f32", "bf16" }, { "bf16", "f32" } }) do
        local g = qm.randn({ 999 }, { device = device })
        local m, v = qm.zeros({ 999 }, { device = device, dtype = types[1] }),
          qm.zeros({ 999 }, { device = device, dtype = types[2] })
        qm.adamw(g:zeros_like(), g, m, v, { step = 6, lr = 1, beta1 = 0.5, beta2 = 0.75, seed = 8, parameter = 9 })
        local gradients, first, second = g:totable(), m:totable(), v:totable()
        for i, gradient in ipairs(gradients) do -- 0.5 g is exact, 0.25 g g rounds once
          local f32_m, f32_v = 0.5 * gradient, mpq.f32(0.25 * gradient * gradient)
          local bf16_m, bf16_v = mpq.moments_to_bf16(f32_m, f32_v, 8, 9, 6, 1, i - 1)
          assert.equal(types[1] == "f32" and f32_m or bf16_m, first[i])
          assert.equal(types[2] == "f32" and f32_v or bf16_v, second[i])
        end
        local w = qm.zeros({ 999 }, { device = device, dtype = "bf16" })
        qm.adamw(w, g, nil, nil, { step = 6, lr = 1, correct_bias = false, seed = 8, parameter = 9 })
        for i, weight in ipairs(w:totable()) do
          assert.equal(mpq.to_bf16(-gradients[i], math.floor(mpq.random_bits(8, 9, 6, 1, i - 1) / 65536)), weight)
        end
      end
    end
  end)

  it("rounds them independently of each other, one by one", function()
    -- All start alike and are rounded up with the same probabilities, of which each pair's is the product.
    local count, half = 65536, { dtype = "bf16" }
    local w, m, v = qm.ones({ count }, half), qm.zeros({ count }, half), qm.zeros({ count }, half)
    qm.adamw(w, qm.full({ count }, 1.0058), m, v, { step = 1, lr = 0.001, beta1 = 0.5, beta2 = 0.75, seed = 3 })
    local values, ups = { w:totable(), m:totable(), v:totable() }, {}
    for i, list in ipairs(values) do
      local lowest = math.min(unpack(list, 1, 1000))
      ups[i] = {}
      for e, value in ipairs(list) do ups[i][e] = value > lowest and 1 or 0 end
    end
    local function mean(first, second)
      local sum = 0
      for e = 1, count do sum = sum + first[e] * second[e] end
      return sum / count
    end
    for i = 1, 3 do
      local p = mean(ups[i], ups[i])
      assert.is_true(p > 0.1 and p < 0.9)
      for j = 1, i - 1 do -- 5 standard errors of a covariance
        local q = mean(ups[j], ups[j])
        assert.near(p * q, mean(ups[i], ups[j]), 5 * math.sqrt(p * (1 - p) * q * (1 - q) / count))
      end
    end
  end)

  it("draws other bits for another parameter and another step", function()
    local function run(parameter, step)
      local w = qm.ones({ 256 }, { dtype = "bf16" })
      qm.adamw(w, qm.ones({ 256 }), qm.zeros({ 256 }), qm.zeros({ 256 }),
        { step = step, lr = 1e-3, correct_bias = false, beta1 = 0, beta2 = 0, parameter = parameter })
      return w:bytes()
    end
    assert.equal(run(1, 1), run(1, 1))
    assert.not_equal(run(1, 1), run(2, 1))
    assert.not_equal(run(1, 1), run(1, 2))
  end)

  it("says which argument is wrong", function()
    local w = qm.ones({ 2, 3 })
    local function step(...)
      local arguments = { ... }
      return function() qm.adamw(unpack(arguments)) end
    end
    assert.error_matches(step(w, qm.ones({ 3, 2 }), w:clone(), w:clone(), { step = 1, lr = 1 }),
      "qm.adamw: argument 'grad': expected f32 [2, 3], got f32 [3, 2]", 1, true)
    assert.error_matches(step(w, w:clone(), w, w:clone(), { step = 1, lr = 1 }), "overlaps argument", 1, true)
    assert.error_matches(step(w, w:clone(), w:clone(), w:clone(), { step = 0, lr = 1 }),
      "argument 'step': expected an integer from 1", 1, true)
    assert.error_matches(step(w, w:clone(), w:clone(), w:clone(), { step = 1, lr = 1, beta1 = 1 }),
      "argument 'betas': expected both in [0, 1), got 1 and 0.99", 1, true)
    assert.error_matches(step(w, w:clone(), w:clone(), w:clone(), { step = 1, lr = 1, weigth_decay = 1 }),
      "did you mean 'weight_decay'", 1, true)
    assert.error_matches(step(w, w:clone(), w:to("f16"), w:clone(), { step = 1, lr = 1 }),
      "argument 'exp_avg': expected f32|bf16 [...]", 1, true)
    assert.error_matches(step({}, w), "argument 'param': expected a tensor, got a table", 1, true)
    assert.error_matches(step({ w }), "argument 'param': expected a tensor, got nothing", 1, true)
    local list = {}
    for i = 1, 50 do list[i] = { param = w:clone(), grad = w, options = { step = 1, lr = 1 } } end
    assert.same({ 0, 0, 0 }, qm.adamw(list)[50].param:totable()[2])
    list[32] = { param = w:clone(), grad = qm.ones({ 3, 2 }), options = { step = 1, lr = 1 } }
    assert.error_matches(step(list), "qm.adamw: argument 'grad[32]': expected f32 [2, 3], got f32 [3, 2]", 1, true)
    list[32] = { param = list[7].param:reshape(6):narrow(5, 1), grad = qm.ones({ 1 }), options = { step = 1, lr = 1 } }
    assert.error_matches(step(list), "qm.adamw: argument 'param': overlaps argument 'param'", 1, true)
    assert.same({ 0, 0, 0 }, list[50].param:totable()[2])
  end)

  it("takes nothing of a list where something is wrong", function()
    local w = qm.ones({ 2 })
    local steps = { { param = w, grad = qm.ones({ 2 }), options = { step = 1, lr = 1 } },
      { param = w:clone(), grad = qm.ones({ 3 }), options = { step = 1, lr = 1 } } }
    assert.is_false((pcall(qm.adamw, steps)))
    assert.same({ 1, 1 }, w:totable())
  end)
end)
