local qm = require("quartermoon")
local testing = require("spec.support.testing")

local function quantized(w_bit, options)
  local o = { w_bit = w_bit, group_size = 32 }
  for key, value in pairs(options or {}) do o[key] = value end
  return qm.QParam.quantize(qm.randn({ 64, 32 }), o)
end

local function give(q, grad)
  q:zero_grad()
  q.privileged_grad = grad:clone():keep()
end

---All tensors of two parameters, to the bit.
local function assert_same_parameter(a, b)
  local parts = b:tensors()
  for i, part in ipairs(a:tensors()) do
    assert.equal(part.name, parts[i].name)
    testing.assert_equal(part.tensor, parts[i].tensor, part.name)
  end
end

describe("qm.optim, quantized parameters", function()
  for _, case in ipairs({ { 8, "none" }, { 4, "momentum" }, { 2, "residual" }, { 1, "residual" } }) do
    it(("takes QParam.update's step with feedback '%s' at %d bits"):format(case[2], case[1]), function()
      local q = quantized(case[1])
      local optim = qm.optim.new({ q }, { lr = qm.schedule.linear(0.1, 0.05, 5), seed = 7, weight_decay = 0.1 })
      local twin = q:clone()
      if case[2] == "residual" then twin:add_residual(8, qm.generator(7, 1)) end
      local m, v = qm.zeros({ 64, 32 }), qm.zeros({ 64, 32 })
      for step = 1, 3 do
        give(q, qm.randn({ 64, 32 }))
        qm.QParam.update(twin, { step = step - 1, exp_avg_l = m, exp_avg_s = v, grad = q.privileged_grad,
          lr = 0.1 - 0.01 * (step - 1), lr_next = 0.1 - 0.01 * step, beta1 = 0.9, beta2 = 0.99, eps = 1e-8,
          correct_bias = true, weight_decay = 0.1, seed = 7, feedback = case[2] })
        optim:step()
      end
      assert_same_parameter(twin, q)
      assert.equal(2 * 4 * 64 * 32 + (case[2] == "residual" and 64 * 32 or 0), optim:state_bytes())
    end)
  end

  it("clips dense and quantized gradients by their common norm", function()
    local q, w = quantized(4), qm.randn({ 2 }):requires_gradient()
    local optim = qm.optim.new({ q, w })
    local grad = qm.zeros({ 64, 32 })
    grad:narrow(5, 1):narrow(1, 1):fill(3 / math.sqrt(32))
    give(q, grad)
    w.grad = qm.tensor({ 0, 4 }):keep()
    optim:clip_grad_norm(1)
    assert.near(5, optim:grad_norm(), 1e-5)
    assert.near(5, optim:step().grad_norm, 1e-5)
  end)

  it("skips the whole step for one bad gradient", function()
    local q, w = quantized(4), qm.randn({ 2 }):requires_gradient()
    local optim = qm.optim.new({ w, q })
    local before, codes = w:bytes(), q.data:bytes()
    give(q, qm.full({ 64, 32 }, 0 / 0))
    w.grad = qm.ones({ 2 }):keep()
    assert.is_true(optim:step().skipped)
    assert.equal(before, w:bytes())
    assert.equal(codes, q.data:bytes())
  end)

  it("says how the codes move, and warns when they do not", function()
    local still, moving = quantized(4), quantized(4)
    still.name = "still"
    local optim = qm.optim.new({ { params = { still }, rounding = "nearest", feedback = "none" },
      { params = { moving } } }, { lr = 1e-4 })
    local codes, warnings = still.data:bytes(), {}
    for step = 1, 100 do
      give(still, qm.ones({ 64, 32 }))
      give(moving, qm.ones({ 64, 32 }))
      warnings[step] = optim:step().warning
    end
    assert.equal(codes, still.data:bytes())
    for _, step in ipairs({ 50, 100 }) do
      assert.matches("the codes of 'still' did not move in 50 steps", warnings[step], 1, true)
      assert.matches("use rounding = 'stochastic'", warnings[step], 1, true)
      warnings[step] = nil
    end
    assert.is_nil(next(warnings))
    local health = optim:health()
    assert.equal(0, health[1].moved)
    assert.is_true(health[2].moved > 0 and health[2].moved < 0.05)
    assert.equal(0, health[2].non_finite)
  end)

  it("takes the original system's step where asked to", function()
    local q = quantized(4, { asym = false, layer_type = 2 })
    local optim = qm.optim.new({ q }, { mode = "bie", lr = 0.1 })
    local twin, m, v = q:clone(), qm.zeros({ 64, 32 }), qm.zeros({ 64, 32 })
    for step = 1, 6 do
      give(q, qm.randn({ 64, 32 }))
      qm.QParam.update(twin, { mode = "bie", step = step - 1, exp_avg_l = m, exp_avg_s = v,
        grad = q.privileged_grad, lr = 0.1, beta1 = 0.9, beta2 = 0.99, eps = 1e-8, correct_bias = true })
      optim:step()
    end
    assert_same_parameter(twin, q)
  end)

  it("gives each parameter its own random bits, the same in every run", function()
    local first = quantized(4)
    local function run(copies)
      local list = {}
      for i = 1, copies do list[i] = first:clone() end
      local optim = qm.optim.new(list, { lr = 1e-2 })
      for _, q in ipairs(list) do give(q, qm.ones({ 64, 32 })) end
      optim:step()
      return list
    end
    local a, b = run(2), run(2)
    assert_same_parameter(a[1], b[1])
    assert_same_parameter(a[2], b[2])
    assert.not_equal(a[1].data:bytes(), a[2].data:bytes())
  end)

  it("projects, with a residual for what the codes lose", function()
    -- A projector onto the first 8 rows.
    local projector = {
      project = function(_, grad) return grad:narrow(1, 8):clone() end,
      project_back = function(_, low)
        local full = qm.zeros({ 64, 32 })
        full:narrow(1, 8):copy(low)
        return full
      end,
    }
    local q = quantized(4)
    q:add_residual(8)
    local before = q:dequantize("f32")
    local optim = qm.optim.new({ q }, { lr = 0.05, projector = function() return projector end })
    give(q, qm.ones({ 64, 32 }))
    optim:step()
    local after = q:dequantize("f32", "residual")
    testing.assert_equal(before:narrow(9, 56), after:narrow(9, 56))
    -- The first direction is the gradient's sign; a residual step is 1/256 of a code.
    local moved = (before - after):narrow(1, 8):mean():item()
    assert.near(0.05, moved, 0.05 * 0.02)
    assert.equal("residual", optim.slots[1].feedback)
  end)

  describe("attached", function()
    local CONFIG = { vocab_size = 32, hidden_size = 64, intermediate_size = 64, num_hidden_layers = 3,
      num_attention_heads = 2, max_position_embeddings = 8, tie_word_embeddings = true }
    local tokens = qm.tensor({ 1, 2, 3, 4 }, { dtype = "i32" })

    local function train(attach, checkpoint)
      qm.seed(5)
      local model = qm.models.llama.new(CONFIG, { linear = { group_size = 32 }, dtype = "f32",
        checkpoint = checkpoint })
      local optim = qm.optim.new(model, { lr = 1e-2, seed = 2 })
      if attach then optim:attach() end
      local norms, peak = {}, 0
      collectgarbage()
      collectgarbage("stop") -- what earlier models dropped must not go while we count
      for step = 1, 4 do
        local before = qm.default_device():memory().live_bytes
        qm.default_device():reset_peak()
        model:loss(tokens, tokens):backward()
        peak = qm.default_device():memory().peak_bytes - before
        local held = 0
        for _, param in ipairs(model:parameters()) do
          if param.grad or param.privileged_grad then held = held + 1 end
        end
        assert.equal(attach and 0 or #model:parameters(), held)
        norms[step] = optim:step().grad_norm
        optim:zero_grad()
      end
      collectgarbage("restart")
      return model, norms, peak
    end

    for _, checkpoint in ipairs({ false, true }) do
      it("gives the same bits" .. (checkpoint and ", with recomputation too" or ""), function()
        local plain, plain_norms, plain_peak = train(false, checkpoint)
        local attached, norms, peak = train(true, checkpoint)
        local twins = attached:parameters()
        for i, param in ipairs(plain:parameters()) do
          if param.w_bit then assert_same_parameter(param, twins[i]) else testing.assert_equal(param, twins[i]) end
        end
        for step = 1, 4 do assert.near(plain_norms[step], norms[step], 1e-5 * norms[step]) end
        assert.is_true(peak < plain_peak, ("peak %d bytes against %d"):format(peak, plain_peak))
      end)
    end

    it("leaves a parameter with a bad gradient alone, and detaches", function()
      local good, bad = qm.ones({ 2 }):requires_gradient(), qm.ones({ 2 }):requires_gradient()
      local optim = qm.optim.new({ good, bad }, { lr = 0.1 }):attach()
      local factors = qm.tensor({ 1, 0 / 0 });
      (good * 2 + bad * factors):sum():backward()
      local report = optim:step()
      assert.is_true(report.skipped)
      assert.same({ 1, 1 }, bad:totable())
      assert.not_same({ 1, 1 }, good:totable())
      assert.error_matches(function() optim:clip_grad_norm(1) end, "see attach's clip_each", 1, true)
      optim:detach()
      qm.mul(good, 2):sum():backward()
      assert.same({ 2, 2 }, good.grad:totable())
    end)

    it("refuses two gradients in one step", function()
      local w = qm.ones({ 2 }):requires_gradient()
      qm.optim.new({ { name = "w", param = w } }):attach()
      qm.mul(w, 2):sum():backward()
      assert.error_matches(function() qm.mul(w, 2):sum():backward() end, "'w' got a second gradient", 1, true)
    end)
  end)
end)
