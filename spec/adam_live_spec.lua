-- Numbers of an optimizer step that kernels read from device memory when they run.
local qm = require("quartermoon")
local testing = require("spec.support.testing")

local function with(options, changes)
  local merged = {}
  for key, value in pairs(options) do merged[key] = value end
  for key, value in pairs(changes) do merged[key] = value end
  return merged
end

describe("qm.adamw with numbers that lie on the device", function()
  local steps = {
    { step = 4, lr = 0.1, lr_next = 0.2, beta1 = 0.5, seed = 1, parameter = 2 },
    { step = 7, lr = 0.01, weight_decay = 0.1, seed = 5, parameter = 3, grad_scale = 0.3 },
  }
  local function run(device, options, types)
    local there = { device = device }
    local generator = qm.generator(3)
    local function random(dtype) return generator:rand({ 5, 777 }, there, 0.1, 2):to(dtype) end
    local w, g, m, v = random(types), random("f32"), random(types), random(types)
    qm.adamw(w, g, m, v, options)
    return w, m, v, qm.adam_direction(g, m, v, options)
  end

  for _, device in ipairs({ "reference", testing.device }) do
    it("gives the bits of the same numbers given outright, on " .. device, function()
      local live = qm.zeros({ 2, 16 }, { dtype = "i32", device = device })
      qm.adam_write(steps, live)
      for row, options in ipairs(steps) do
        for _, types in ipairs({ "f32", "bf16" }) do
          local expected = { run(device, options, types) }
          local actual = { run(device, { live = live:narrow(row, 1):reshape(16) }, types) }
          for i = 1, 4 do testing.assert_equal(expected[i], actual[i]) end
        end
      end
    end)

    it("multiplies `scale` into the gradient's scale, on " .. device, function()
      local scale = qm.full({}, 0.5, { device = device })
      local given = { step = 7, lr = 0.01, grad_scale = 0.25 }
      local expected = { run(device, { step = 7, lr = 0.01, grad_scale = 0.125 }, "f32") }
      local live = qm.adam_write({ given }, qm.zeros({ 1, 16 }, { dtype = "i32", device = device }))
      for _, options in ipairs({ { step = 7, lr = 0.01, grad_scale = 0.25, scale = scale },
        { live = live:reshape(16), scale = scale } }) do
        local actual = { run(device, options, "f32") }
        for i = 1, 4 do testing.assert_equal(expected[i], actual[i]) end
      end
    end)

    it("changes nothing where `scale` is not finite, on " .. device, function()
      for _, value in ipairs({ 0 / 0, math.huge, -math.huge }) do
        local scale = qm.full({}, value, { device = device })
        local w, g = qm.ones({ 999 }, { device = device }), qm.randn({ 999 }, { device = device })
        local m, v = qm.full({ 999 }, 2, { device = device }), qm.full({ 999 }, 3, { device = device })
        local options = { step = 1, lr = 1, weight_decay = 1, scale = scale }
        qm.adamw(w, g, m, v, options)
        qm.adamw(w, g, nil, nil, options)
        local direction = qm.adam_direction(g, m, v, options)
        for tensor, expected in pairs({ [w] = 1, [m] = 2, [v] = 3, [direction] = 0 }) do
          testing.assert_equal(qm.full({ 999 }, expected, { device = device }), tensor)
        end
      end
    end)
  end

  it("says what does not fit", function()
    local live = qm.zeros({ 2, 16 }, { dtype = "i32" })
    assert.error_matches(function() qm.adam_write({ steps[1] }, live) end,
      "qm.adam_write: argument 'live': expected i32 [count=1, 16], got i32 [2, 16]", 1, true)
    assert.error_matches(function() qm.adam_write({ { step = 1, lr = 1, beta2 = 1 }, steps[1] }, live) end,
      "argument 'betas': expected both in [0, 1), got 0.9 and 1", 1, true)
    local w = qm.ones({ 3 })
    assert.error_matches(function() qm.adamw(w, w:clone(), w:clone(), w:clone(), { live = live }) end,
      "qm.adamw: argument 'live': expected i32 [16], got i32 [2, 16]", 1, true)
    assert.error_matches(function() qm.adamw(w, w:clone(), w:clone(), nil, { step = 1, lr = 1 }) end,
      "argument 'exp_avg_sq': expected both moments, or neither", 1, true)
  end)
end)

describe("qm.QParam.update with numbers that lie on the device", function()
  local cases = {
    { feedback = "momentum" }, { feedback = "residual", residual_bits = 8, moments = "bf16" },
    { feedback = "none", rounding = "nearest" }, { feedback = "none", direction = true }, { mode = "bie" },
  }
  ---One step of a fresh parameter; everything it wrote.
  local function run(device, case, options)
    local generator = qm.generator(9)
    local function random(low) return generator:rand({ 64, 96 }, { device = device }, low, 1) end
    local q = qm.QParam.quantize(random(-1), { w_bit = 4, group_size = 32, asym = case.mode == "bie" })
    q.id = 5
    if case.residual_bits then q:add_residual(case.residual_bits, qm.generator(1, 2)) end
    local m, v = random(-1):to(case.moments or "f32"), random(0):to(case.moments or "f32")
    local health = case.mode ~= "bie" and qm.zeros({ 4 }, { dtype = "i64", device = device }) or nil
    qm.QParam.update(q, with(options, { feedback = case.feedback or "none", mode = case.mode,
      rounding = case.rounding or "stochastic", grad = random(-1), health = health,
      exp_avg_l = not case.direction and m or nil, exp_avg_s = not case.direction and v or nil }))
    return { q.data, q.zeros, m, v, q.residual or q.data, health or q.data }
  end

  for _, device in ipairs({ "reference", testing.device }) do
    it("gives the bits of the same numbers given outright, on " .. device, function()
      for _, case in ipairs(cases) do
        local o = { lr = 0.02, lr_next = 0.01, beta1 = 0.9, beta2 = 0.99, eps = 1e-6, weight_decay = 0.1,
          correct_bias = true, seed = 4 }
        local written = with(o, { step = 5, parameter = 5 }) -- a fifth step: bie moves zeros
        local live = qm.adam_write({ written }, qm.zeros({ 1, 16 }, { dtype = "i32", device = device })):reshape(16)
        local scale = qm.full({}, 0.25, { device = device })
        local expected = run(device, case, with(o, { step = 4 }))
        local actual = run(device, case, { step = 0, live = live })
        for i = 1, #expected do testing.assert_equal(expected[i], actual[i]) end
        expected = run(device, case, with(o, { step = 4, grad_scale = case.direction and 1 or 0.25 }))
        actual = run(device, case, { step = 0, live = live, scale = scale })
        for i = 1, #expected do testing.assert_equal(expected[i], actual[i]) end
      end
    end)

    it("changes nothing where `scale` is not finite, on " .. device, function()
      for _, case in ipairs(cases) do
        local still = run(device, case, { step = 4, lr = 0, beta1 = 0.5, scale = qm.full({}, 0 / 0,
          { device = device }) })
        local moved = run(device, case, { step = 4, lr = 1, weight_decay = 1, scale = qm.full({}, math.huge,
          { device = device }) })
        for i = 1, #still do testing.assert_equal(still[i], moved[i]) end
        if still[6].dtype == "i64" then assert.same({ 0, 0, 0, 0 }, still[6]:totable()) end
      end
    end)
  end
end)

describe("qm.grad_scale", function()
  local function run(squares, options, device)
    local there = { device = device }
    local norm, scale = qm.zeros({}, there), qm.zeros({}, there)
    local skipped = qm.zeros({}, { dtype = "i64", device = device })
    qm.grad_scale(qm.full({}, squares, there), norm, scale, skipped, options)
    return norm:item(), scale:item(), skipped:item()
  end

  for _, device in ipairs({ "reference", testing.device }) do
    it("clips to the largest norm allowed, on " .. device, function()
      assert.same({ 5, 1, 0 }, { run(25, nil, device) })
      assert.same({ 5, 0.5, 0 }, { run(25, { max_norm = 2.5 }, device) })
      assert.same({ 5, 1, 0 }, { run(25, { max_norm = 5 }, device) })
      assert.same({ 5, 0, 0 }, { run(25, { max_norm = 0 }, device) })
      assert.same({ 0, 1, 0 }, { run(0, { max_norm = 0 }, device) })
      assert.same({ 2.5, 0.25, 0 }, { run(25, { max_norm = 1.25, factor = 0.5 }, device) })
    end)

    it("counts and skips what is not finite, on " .. device, function()
      for _, squares in ipairs({ 0 / 0, math.huge }) do
        local _, scale, skipped = run(squares, { max_norm = 1 }, device)
        assert.is_true(scale ~= scale)
        assert.equal(1, skipped)
      end
      local one = qm.full({}, 1, { device = device })
      local skipped = qm.full({}, 6, { device = device, dtype = "i64" })
      qm.grad_scale(qm.full({}, 0 / 0, { device = device }), one:clone(), one:clone(), skipped)
      qm.grad_scale(one, one:clone(), one:clone(), skipped)
      assert.equal(7, skipped:item())
    end)
  end

  it("says what does not fit", function()
    local one, skipped = qm.ones({}), qm.zeros({}, { dtype = "i64" })
    assert.error_matches(function() qm.grad_scale(one, one:clone(), one:clone(), skipped, { max_norm = -1 }) end,
      "qm.grad_scale: argument 'max_norm': expected at least 0, got -1", 1, true)
    assert.error_matches(function() qm.grad_scale(one, one, one:clone(), skipped) end, "overlaps argument", 1, true)
  end)
end)
