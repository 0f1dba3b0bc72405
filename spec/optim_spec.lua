local qm = require("quartermoon")
local testing = require("spec.support.testing")

local function parameter(shape, dtype) return qm.randn(shape):to(dtype or "f32"):requires_gradient() end

---Give a parameter a gradient of our choice.
local function give(param, grad)
  param:zero_grad()
  param.grad = grad:clone():keep()
end

describe("qm.optim, dense parameters", function()
  it("does not count a step that raised", function()
    local w = qm.ones({ 2, 2 }, { requires_grad = true })
    local projector = { project = function() error("no projection", 0) end }
    local optim = qm.optim.new({ w }, { projector = function() return projector end })
    w:sum():backward()
    assert.error_matches(function() optim:step() end, "no projection")
    assert.equal(0, optim.steps)
    assert.equal(0, optim.slots[1].steps)
  end)

  it("takes qm.adamw's steps, with the schedule's rates and the group's options", function()
    local a, b, bias = parameter({ 5, 3 }), parameter({ 4, 2 }), parameter({ 3 })
    local twins = { a:clone(), b:clone(), bias:clone() }
    local optim = qm.optim.new({
      { params = { a, bias }, weight_decay = 0.1 },
      { params = { b }, lr = 0.5, betas = { 0.5, 0.8 }, eps = 1e-3 },
    }, { lr = qm.schedule.linear(1, 0, 4), seed = 9 })
    local moments = {}
    for i, twin in ipairs(twins) do moments[i] = { twin:zeros_like(), twin:zeros_like() } end
    for step = 1, 3 do
      local expected = {
        { lr = 1 - (step - 1) / 4, weight_decay = 0.1 },
        { lr = 0.5, beta1 = 0.5, beta2 = 0.8, eps = 1e-3 },
        { lr = 1 - (step - 1) / 4 }, -- one dimension: not decayed
      }
      for i, param in ipairs({ a, b, bias }) do
        give(param, qm.randn(param.shape))
        expected[i].step = step
        qm.adamw(twins[i], param.grad, moments[i][1], moments[i][2], expected[i])
      end
      local report = optim:step()
      assert.equal(step, report.step)
      assert.same({ 1 - (step - 1) / 4, 0.5 }, report.lrs)
      assert.is_false(report.skipped)
    end
    for i, param in ipairs({ a, b, bias }) do testing.assert_equal(twins[i], param, "parameter " .. i) end
    assert.equal(4 * 2 * (15 + 8 + 3), optim:state_bytes())
  end)

  it("clips by the norm over all gradients, without touching them", function()
    local a, b = parameter({ 2 }), parameter({ 1, 2 })
    local twin = a:clone()
    give(a, qm.tensor({ 3, 0 }))
    give(b, qm.tensor({ { 0, 4 } }))
    local optim = qm.optim.new({ a, b }, { lr = 0.1, eps = 1 }) -- so large an eps makes scale matter
    optim:clip_grad_norm(2)
    assert.near(5, optim:grad_norm(), 1e-5)
    local report = optim:step()
    assert.near(5, report.grad_norm, 1e-5)
    qm.adamw(twin, qm.tensor({ 3, 0 }), twin:zeros_like(), twin:zeros_like(),
      { step = 1, lr = 0.1, eps = 1, grad_scale = 2 / report.grad_norm })
    testing.assert_equal(twin, a)
    assert.same({ 3, 0 }, a.grad:totable())
    local before = a:clone()
    optim:clip_grad_norm(100)
    optim:step()
    assert.not_equal(before:bytes(), a:bytes())
  end)

  it("takes the mean over accumulated backward passes", function()
    local a = parameter({ 3 })
    local twin = a:clone()
    local optim = qm.optim.new({ a }, { lr = 0.1, eps = 1, accumulate = 2 })
    for _, factor in ipairs({ 2, 4 }) do qm.mul(a, factor):sum():backward() end
    assert.near(math.sqrt(3) * 3, optim:step().grad_norm, 1e-5)
    qm.adamw(twin, qm.full({ 3 }, 3), twin:zeros_like(), twin:zeros_like(), { step = 1, lr = 0.1, eps = 1 })
    testing.assert_close(twin, a, 1e-6)
  end)

  it("leaves parameters without a gradient alone, and counts their steps apart", function()
    local a, b = parameter({ 3 }), parameter({ 3 })
    local before = b:bytes()
    local optim = qm.optim.new({ a, b }, { lr = 0.1 })
    give(a, qm.ones({ 3 }))
    optim:step()
    assert.equal(before, b:bytes())
    local twin = b:clone()
    give(b, qm.ones({ 3 }))
    optim:step()
    qm.adamw(twin, b.grad, twin:zeros_like(), twin:zeros_like(), { step = 1, lr = 0.1 })
    testing.assert_equal(twin, b)
  end)

  for _, bad in ipairs({ 0 / 0, math.huge }) do
    it("skips a step whose gradients hold " .. tostring(bad), function()
      local a, b = parameter({ 3 }), parameter({ 3 })
      local optim = qm.optim.new({ a, b }, { lr = 0.1 })
      give(a, qm.ones({ 3 }))
      give(b, qm.tensor({ 1, bad, 1 }))
      local bytes = a:bytes() .. b:bytes()
      optim:clip_grad_norm(1)
      local report = optim:step()
      assert.is_true(report.skipped)
      assert.equal(1, optim.skipped)
      assert.equal(bytes, a:bytes() .. b:bytes())
      give(b, qm.ones({ 3 }))
      assert.equal(2, optim:step().step)
      assert.not_equal(bytes, a:bytes() .. b:bytes())
    end)
  end

  it("stops where asked to, naming the parameter", function()
    local a, b = parameter({ 3 }), parameter({ 3 })
    local optim = qm.optim.new({ { name = "first", param = a }, { name = "second", param = b } },
      { lr = 0.1, non_finite = "stop" })
    give(a, qm.ones({ 3 }))
    give(b, qm.tensor({ 1, 0 / 0, 1 }))
    assert.error_matches(function() optim:step() end, "the gradient of second is not finite (step 1)", 1, true)
  end)

  it("resumes bit for bit, bf16 states and parameters too", function()
    local a, b = parameter({ 7, 5 }, "bf16"), parameter({ 9 })
    local function options() return { lr = qm.schedule.cosine(0.1, 10), moments = "bf16", seed = 3 } end
    local optim = qm.optim.new({ a, b }, options())
    local grads = {}
    for step = 1, 6 do grads[step] = { qm.randn({ 7, 5 }), qm.randn({ 9 }) } end
    local function run(o, p, q, first, last)
      for step = first, last do
        give(p, grads[step][1])
        give(q, grads[step][2])
        o:step()
      end
    end
    run(optim, a, b, 1, 3)
    local state = optim:state()
    local a2, b2 = a:clone():requires_gradient(), b:clone():requires_gradient()
    local resumed = qm.optim.new({ a2, b2 }, options())
    resumed:load_state(state)
    run(optim, a, b, 4, 6)
    run(resumed, a2, b2, 4, 6)
    testing.assert_equal(a, a2)
    testing.assert_equal(b, b2)
    assert.equal(6, resumed.steps)
  end)

  it("projects where asked to", function()
    -- A projector onto the first row: only that row may move, by Adam's step on it.
    local a = parameter({ 3, 4 })
    local twin = a:clone()
    local projector = {
      project = function(_, grad) return grad:narrow(1, 1):clone() end,
      project_back = function(_, low)
        local full = qm.zeros({ 3, 4 })
        full:narrow(1, 1):copy(low)
        return full
      end,
    }
    local optim = qm.optim.new({ a }, { lr = 0.1, projector = function(param)
      assert.equal(a, param)
      return projector
    end })
    give(a, qm.randn({ 3, 4 }))
    optim:step()
    local row = twin:narrow(1, 1)
    qm.adamw(row, a.grad:narrow(1, 1), row:zeros_like(), row:zeros_like(), { step = 1, lr = 0.1 })
    testing.assert_close(twin, a, 1e-6)
    assert.equal(4 * 2 * 4, optim:state_bytes())
  end)

  it("refuses what it cannot take", function()
    local a = parameter({ 3 })
    assert.error_matches(function() qm.optim.new({ a }, { weigth_decay = 1 }) end,
      "did you mean 'weight_decay'", 1, true)
    assert.error_matches(function() qm.optim.new({ a }, { lr = "fast" }) end,
      "argument 'lr': expected a number or a function", 1, true)
    assert.error_matches(function() qm.optim.new({ a, a }) end, "is there twice", 1, true)
    assert.error_matches(function() qm.optim.new({ 3 }) end, "'params[1]': expected a tensor or a QParam", 1, true)
    assert.error_matches(function() qm.optim.new({}) end, "at least one parameter", 1, true)
    local optim = qm.optim.new({ a })
    assert.error_matches(function() optim:step() end, "no parameter has a gradient", 1, true)
    assert.error_matches(function() optim:load_state({ numbers = { slots = {} }, tensors = {} }) end,
      "expected a state of 1 parameters, got number 0", 1, true)
  end)
end)
