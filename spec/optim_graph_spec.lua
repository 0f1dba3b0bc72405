-- An optimizer whose step is recorded once and replayed: the same steps, bit for bit.
local qm = require("quartermoon")
local testing = require("spec.support.testing")

local K, N, ROWS = 64, 32, 5

---A layer of each kind, and random inputs of some steps.
local function setup(options)
  local generator = qm.generator(11)
  local function random(shape) return generator:randn(shape, { device = testing.device }) end
  local function quantized(w_bit)
    local q = qm.QParam.quantize(random({ K, N }), { w_bit = w_bit, group_size = 32 })
    q.requires_grad = true
    return q
  end
  local four, two = quantized(4), quantized(2)
  local dense, bias = random({ N, N }):requires_gradient(), random({ N }):requires_gradient()
  local list = { four, two, dense, bias }
  local merged = { lr = qm.schedule.cosine(0.05, 30), weight_decay = 0.1, seed = 3 }
  for key, value in pairs(options or {}) do merged[key] = value end
  local optim = qm.optim.new(list, merged)
  local inputs = {}
  for step = 1, 24 do inputs[step] = random({ ROWS, K }):keep() end
  local function step(x)
    local hidden = qm.qlinear(x, four) * qm.qlinear(x, two)
    local loss = qm.linear(hidden, dense, bias):square():mean()
    loss:backward()
    optim:clip_grad_norm(0.5)
    optim:step()
    optim:zero_grad()
    return loss
  end
  return { list = list, optim = optim, inputs = inputs, step = step }
end

local function assert_same(a, b)
  for i, param in ipairs(a.list) do
    local twin = b.list[i]
    if param.data then
      testing.assert_equal(param.data, twin.data, "codes")
      if param.residual then testing.assert_equal(param.residual, twin.residual, "residual") end
    else
      testing.assert_equal(param, twin, "weight")
    end
    local slot, other = a.optim.slots[i], b.optim.slots[i]
    testing.assert_equal(slot.exp_avg, other.exp_avg, "exp_avg")
    testing.assert_equal(slot.exp_avg_sq, other.exp_avg_sq, "exp_avg_sq")
    assert.equal(slot.steps, other.steps)
  end
end

describe("qm.optim in a qm.graph", function()
  for _, moments in ipairs({ "f32", "bf16" }) do
    it("takes the steps of plain calls: clipping, schedule, decay, feedback; moments " .. moments, function()
      local plain, graphed = setup({ moments = moments }), setup({ moments = moments })
      assert.equal("momentum", plain.optim.slots[1].feedback)
      assert.equal("residual", plain.optim.slots[2].feedback)
      local step = qm.graph(graphed.step, { device = testing.device })
      for i, input in ipairs(plain.inputs) do
        local expected, actual = qm.scope(plain.step, input), step(graphed.inputs[i])
        testing.assert_equal(expected, actual, "loss of step " .. i)
        local report, other = plain.optim:report(), graphed.optim:report()
        assert.equal(i, other.step)
        assert.equal(report.lr, other.lr)
        assert.equal(report.grad_norm, other.grad_norm)
        assert.is_true(report.grad_norm > 0.5, "clipping never mattered")
        assert.is_false(other.skipped)
      end
      assert_same(plain, graphed)
      assert.same(plain.optim:health(), graphed.optim:health())
      assert.equal(24, graphed.optim.steps)
      step:free()
    end)
  end

  it("skips a replayed step whose gradients are not finite, and goes on", function()
    local plain, graphed = setup(), setup()
    local step = qm.graph(graphed.step, { device = testing.device })
    for i = 1, 8 do
      if i == 5 then
        for _, run in ipairs({ plain, graphed }) do run.inputs[i]:fill(0 / 0) end
      end
      local before = graphed.list[1].data:bytes() .. graphed.list[3]:bytes()
      qm.scope(plain.step, plain.inputs[i])
      step(graphed.inputs[i])
      assert.equal(i == 5, graphed.optim:report().skipped)
      assert.equal(i == 5, before == graphed.list[1].data:bytes() .. graphed.list[3]:bytes())
    end
    assert.equal(1, graphed.optim.skipped)
    assert_same(plain, graphed)
    step:free()
  end)

  it("goes on with plain steps and from a checkpoint", function()
    local plain, graphed = setup(), setup()
    local step = qm.graph(graphed.step, { device = testing.device })
    for i = 1, 12 do
      qm.scope(plain.step, plain.inputs[i])
      if i < 6 then step(graphed.inputs[i]) else qm.scope(graphed.step, graphed.inputs[i]) end
    end
    assert_same(plain, graphed)
    step:free()
  end)

  it("says what cannot be recorded", function()
    local function refused(message, options, warmup)
      local run = setup(options)
      local step = qm.graph(run.step, { device = testing.device, warmup = warmup })
      assert.error_matches(function()
        for i = 1, 3 do step(run.inputs[i]) end
      end, message, 1, true)
    end
    refused("'parameter 1' would take its very first step inside a recording", nil, 0)
    refused("non_finite = 'stop' reads every step's norm", { non_finite = "stop" })
    refused("grid = 'refit' ('parameter 1') is decided on the host", { grid = "refit" })
    refused("the projector of 'parameter 1' looks at gradients on the host",
      { projector = function(param) return param.data and qm.projector.galore({ rank = 4 }) end })
  end)
end)

describe("qm.optim's report", function()
  it("is read until the next step", function()
    local w = qm.ones({ 2 }, { device = testing.device }):requires_gradient()
    local optim = qm.optim.new({ w }, { lr = 0.1 })
    assert.is_nil(optim:report())
    w:sum():backward()
    local first = optim:step()
    local second = optim:step()
    assert.equal(second, optim:report())
    assert.near(math.sqrt(2), second.grad_norm, 1e-6)
    assert.error_matches(function() return first.grad_norm end,
      "report.grad_norm: step 2 was taken since this report of step 1", 1, true)
    assert.equal(1, first.step)
    assert.is_nil(first.anything_else)
  end)
end)
