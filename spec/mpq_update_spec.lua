local qm = require("quartermoon")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

local REFERENCE = { device = "reference" }

---The options of a step with every number given.
local function step_options(changes)
  local o = { step = 2, lr = 0.02, lr_next = 0.015, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99, eps = 1e-6,
    correct_bias = true, rounding = "stochastic", feedback = "none", seed = 17 }
  for key, value in pairs(changes or {}) do o[key] = value end
  return o
end

local function with(options, changes)
  local merged = {}
  for key, value in pairs(options) do merged[key] = value end
  for key, value in pairs(changes) do merged[key] = value end
  return merged
end

---Random gradients, moments as after a few steps.
local function state(k, n)
  local function random(deviation) return qm.randn({ k, n }, REFERENCE, 0, deviation) end
  local v = random(0.3)
  return random(0.3), random(0.1), v * v
end

describe("qm.QParam.update", function()
  for _, case in ipairs({
    { feedback = "none", rounding = "nearest", lr = 1 }, { feedback = "none", rounding = "stochastic" },
    { feedback = "momentum", rounding = "stochastic" },
    { feedback = "residual", rounding = "stochastic", residual_bits = 4 },
    { feedback = "residual", rounding = "nearest", residual_bits = 8 },
    { feedback = "momentum", rounding = "stochastic", correct_bias = false },
    { feedback = "momentum", rounding = "stochastic", dtype = "bf16" },
    { feedback = "none", rounding = "nearest", dtype = "bf16" },
  }) do
    it(("derives every integer and moment as plain Lua does: %s, %s, %s"):format(case.feedback, case.rounding,
      case.dtype or "f32"), function()
      local moved = 0
      for _, w_bit in ipairs({ 1, 2, 3, 4, 8 }) do
        for _, asym in ipairs({ true, false }) do
          local k, n = 64, 32
          local q = mpq.random(k, n, { w_bit = w_bit, asym = asym, group_size = 32, zero_offset = w_bit % 2,
            residual_bits = case.residual_bits, dtype = asym and "f16" or "f32", q_perm = not asym and
            mpq.permutation(k) or nil, g_idx = asym and mpq.random_groups(k, 2) or nil })
          local grad, m, v = state(k, n)
          local o = step_options(case)
          if o.dtype then m, v = m:to(o.dtype), v:to(o.dtype) end
          o.residual_bits = nil
          local codes, first, second, residuals, counts =
            mpq.update(q, grad:totable(), m:totable(), v:totable(), o)
          local r = q:to(testing.device)
          r.privileged_grad = grad:to(testing.device)
          m, v = m:to(testing.device), v:to(testing.device)
          local health = qm.zeros({ 4 }, { dtype = "i64", device = testing.device })
          assert.equal(3, qm.QParam.update(r, with(o, { exp_avg_l = m, exp_avg_s = v, health = health })))
          assert.same(codes, r:unpack():totable())
          assert.same(first, m:totable())
          assert.same(second, v:totable())
          if residuals then assert.same(residuals, mpq.residuals(r)) end
          assert.same(counts, health:totable())
          moved = moved + counts[2]
        end
      end
      assert.is_true(moved > 0)
    end)
  end

  describe("gives the reference's bits", function()
    for _, asym in ipairs({ true, false }) do
      for _, w_bit in ipairs({ 1, 2, 4, 8 }) do
        it(("%s, %d bit, every rounding, feedback and type"):format(asym and "asym" or "sym", w_bit), function()
          for variant = 1, 8 do
            local k, n = 32 * (1 + variant % 3), asym and 32 * (variant + 1) or 67 * variant + 1
            local rb = ({ 0, 0, 0, 4, 8, 0, 8, 0 })[variant]
            local q = mpq.random(k, n, { w_bit = w_bit, asym = asym, group_size = 32, residual_bits = rb,
              dtype = ({ "f32", "f16", "bf16", "f32", "f16", "f32", "f16", "f16" })[variant],
              q_perm = variant % 2 == 0 and mpq.permutation(k) or nil,
              g_idx = variant % 3 == 0 and mpq.random_groups(k, math.ceil(k / 32)) or nil })
            local r = q:to(testing.device)
            local grad, m, v = state(k, n)
            grad = grad:to(({ "f32", "bf16", "f16", "f32", "f32", "bf16", "f32", "f32" })[variant])
            local half = variant % 4 == 2
            if half then m, v = m:to("bf16"), v:to("bf16") end
            local there = { grad:to(testing.device), m:to(testing.device), v:to(testing.device) }
            local health = qm.zeros({ 4 }, { dtype = "i64", device = "reference" })
            local health_there = health:to(testing.device)
            for step = 0, 2 do
              local o = step_options({ step = step, correct_bias = variant > 2, lr = ({ 0.3, 0.02, 0.001 })[step + 1],
                rounding = (variant == 1 or variant == 7) and "nearest" or "stochastic", grad_scale = 0.7,
                feedback = rb > 0 and "residual" or (variant == 6 or variant == 2) and "momentum" or "none" })
              local moments = variant ~= 8 and { exp_avg_l = m, exp_avg_s = v } or {}
              local moments_there = variant ~= 8 and { exp_avg_l = there[2], exp_avg_s = there[3] } or {}
              qm.QParam.update(q, with(with(o, moments), { grad = grad, health = health }))
              qm.QParam.update(r, with(with(o, moments_there), { grad = there[1], health = health_there }))
              local what = ("variant %d, step %d: "):format(variant, step)
              testing.assert_equal(q.data, r.data, what .. "codes")
              if rb > 0 then testing.assert_equal(q.residual, r.residual, what .. "residual") end
              testing.assert_equal(m, there[2], what .. "exp_avg_l")
              testing.assert_equal(v, there[3], what .. "exp_avg_s")
              testing.assert_equal(health, health_there, what .. "health")
            end
          end
        end)

        it(("%s, %d bit, as the original"):format(asym and "asym" or "sym", w_bit), function()
          local q = mpq.random(96, 64, { w_bit = w_bit, asym = asym, group_size = 32,
            g_idx = mpq.random_groups(96, 3), dtype = "f16" })
          local r = q:to(testing.device)
          local grad, m, v = state(96, 64)
          local there = { grad:to(testing.device), m:to(testing.device), v:to(testing.device) }
          for step = 3, 5 do
            local o = { mode = "bie", step = step, lr = 0.1, correct_bias = true }
            qm.QParam.update(q, with(o, { grad = grad, exp_avg_l = m, exp_avg_s = v }))
            qm.QParam.update(r, with(o, { grad = there[1], exp_avg_l = there[2], exp_avg_s = there[3] }))
            testing.assert_equal(q.data, r.data, "codes")
            testing.assert_equal(q.zeros, r.zeros, "zeros")
            testing.assert_equal(m, there[2], "exp_avg_l")
          end
        end)
      end
    end
  end)

  it("loses nothing with a residual: codes and residuals add up to what went in", function()
    for _, bits in ipairs({ 4, 8 }) do
      local unit = 2 ^ bits
      local q = mpq.random(32, 32, { w_bit = 4, asym = false, residual_bits = bits, dtype = "f32" }):to(testing.device)
      q.scales:fill(0.5)
      q.zeros:fill(3.5)
      local w = qm.rand({ 32, 32 }, nil, -2, 2)
      q:pack(w)
      local before = q:dequantize("f32", "residual"):totable()
      -- Steps of whole units are exact in both roundings: lr 1, direction -(3 / unit) * scale.
      for step = 1, 5 do
        qm.QParam.update(q, { step = step, lr = 1, grad = qm.full({ 32, 32 }, -3 / unit * 0.5) })
      end
      local after = q:dequantize("f32", "residual"):totable()
      for k = 1, 32 do
        for n = 1, 32 do assert.equal(before[k][n] + 15 / unit * 0.5, after[k][n]) end
      end
    end
  end)

  it("pays rounding errors back through the momentum: a constant drift arrives in full", function()
    local n, steps, lr = 64, 400, 1e-3
    local function drift(feedback)
      local q = qm.QParam.quantize(qm.zeros({ 32, n }), { w_bit = 8, asym = false, dtype = "f32", id = 77 })
      q.scales:fill(0.05)
      q:pack(qm.full({ 32, n }, 6))
      q.zeros:fill(0)
      q:pack(qm.full({ 32, n }, 6))
      local m, v = qm.zeros({ 32, n }), qm.zeros({ 32, n })
      local grad = qm.ones({ 32, n }) -- u tends to 1: the exact weight moves by -lr a step
      for step = 0, steps - 1 do
        qm.QParam.update(q, { step = step, lr = lr, grad = grad, exp_avg_l = m, exp_avg_s = v, beta1 = 0.9,
          beta2 = 0.99, correct_bias = true, feedback = feedback })
      end
      local w, count = q:dequantize("f32"):host()
      local mean, spread = 0, 0
      for i = 0, count - 1 do mean = mean + w[i] / count end
      for i = 0, count - 1 do spread = spread + (w[i] - mean) ^ 2 / count end
      return mean, math.sqrt(spread)
    end
    local exact = 6 - steps * lr
    local plain, plain_spread = drift("none")
    local paid, paid_spread = drift("momentum")
    -- Plain rounding walks: the spread is scale sqrt(steps f (1 - f)), f = lr / scale. Feedback holds
    -- it near a dither's, at most half a code; the standard error is the spread / sqrt(32 n).
    assert.near(exact, plain, 4 * plain_spread / math.sqrt(32 * n))
    assert.near(exact, paid, 0.003)
    assert.is_true(plain_spread > 0.12)
    assert.is_true(paid_spread < 0.04)
  end)

  it("moves where nearest rounding does not: a noisy quadratic at a fine-tuning learning rate", function()
    -- AdamW on a quadratic whose optimum lies 0.005 away from weights of deviation 0.02, 4 bits,
    -- groups of 128, lr 5e-6 here in fewer, larger steps: nearest moves no code at all.
    local k, n, lr, steps = 128, 32, 2e-5, 300
    local function train(options, residual_bits)
      local generator = qm.generator(11)
      local w = generator:randn({ k, n }, nil, 0, 0.02)
      local target = w + generator:randn({ k, n }, nil, 0, 0.005)
      local q = qm.QParam.quantize(w, { group_size = 128, dtype = "f32", residual_bits = residual_bits, id = 3 })
      local m, v = qm.zeros({ k, n }), qm.zeros({ k, n })
      local before, health = q:unpack(), qm.zeros({ 4 }, { dtype = "i64" })
      local function distance()
        local difference = q:dequantize("f32") - target
        return qm.sum_squares(difference):item() / (k * n)
      end
      local start = distance()
      for step = 0, steps - 1 do
        qm.scope(function()
          local grad = q:dequantize("f32") - target
          grad = grad + generator:randn({ k, n }, nil, 0, 0.003)
          qm.QParam.update(q, with({ step = step, lr = lr, grad = grad, exp_avg_l = m, exp_avg_s = v, beta1 = 0.9,
            beta2 = 0.99, correct_bias = true, health = health }, options))
        end)
      end
      local a, count = before:host()
      local b = q:unpack():host()
      local moved = 0
      for i = 0, count - 1 do moved = moved + (a[i] ~= b[i] and 1 or 0) end
      return start, distance(), moved / count
    end
    local start, nearest, moved = train({ rounding = "nearest" })
    assert.equal(start, nearest)
    assert.equal(0, moved)
    local _, stochastic, share = train({ rounding = "stochastic" })
    assert.is_true(share > 0.1)
    assert.is_true(stochastic < 0.9 * start)
    local start_residual, residual = train({ feedback = "residual" }, 8)
    assert.is_true(residual < stochastic and residual < 0.9 * start_residual)
  end)

  it("decays weights that get no gradient, in the mean", function()
    local q = mpq.random(32, 4096, { w_bit = 4, asym = false, dtype = "f32", id = 9 }):to(testing.device)
    q.scales:fill(0.1)
    q.zeros:fill(0)
    q:pack(qm.full({ 32, 4096 }, 1))
    local m, v = qm.zeros({ 32, 4096 }), qm.zeros({ 32, 4096 })
    qm.QParam.update(q, { step = 0, lr = 0.01, weight_decay = 0.5, grad = m:clone(), exp_avg_l = m, exp_avg_s = v })
    local mean = q:dequantize("f32"):mean():item()
    assert.near(1 - 0.005, mean, 4 * 0.1 * math.sqrt(0.05 * 0.95 / (32 * 4096))) -- a step of 0.05 codes
  end)

  it("leaves elements whose gradient is not finite as they were, and counts them", function()
    for _, device in ipairs({ "reference", testing.device }) do
      local q = mpq.random(32, 32, { residual_bits = 4 }):to(device)
      local grad = qm.ones({ 32, 32 }, { device = device })
      local bad = { 0 / 0, 1 / 0, -1 / 0, 1e30 } -- the square of the last overflows
      for row, value in ipairs(bad) do grad:view_rows("spec", row, 1):fill(value) end
      local m, v = grad:zeros_like():fill(0.5), grad:zeros_like():fill(0.25)
      local before, residual = q:unpack():totable(), mpq.residuals(q)
      local health = qm.zeros({ 4 }, { dtype = "i64", device = device })
      qm.QParam.update(q, { step = 0, lr = 0.1, grad = grad, exp_avg_l = m, exp_avg_s = v, health = health })
      local after, m_after, v_after = q:unpack():totable(), m:totable(), v:totable()
      local residual_after = mpq.residuals(q)
      for row = 1, #bad do
        assert.same(before[row], after[row])
        assert.same(residual[row], residual_after[row])
        assert.equal(0.5, m_after[row][7])
        assert.equal(0.25, v_after[row][7])
      end
      assert.not_equal(0.5, m_after[5][1])
      assert.same({ 1024, 4 * 32 }, { health:totable()[1], health:totable()[4] })
    end
  end)

  it("fits the grid anew at every refit_every-th step", function()
    local q = mpq.random(64, 32, { asym = false, dtype = "f32", residual_bits = 8 }):to(testing.device)
    local grad, scales = qm.zeros({ 64, 32 }), q.scales:bytes()
    local o = { lr = 0.1, grad = grad, grid = "refit", refit_every = 3 }
    q:pack(qm.randn({ 64, 32 }, nil, 0, 0.1))
    local before = q:dequantize("f32", "residual")
    qm.QParam.update(q, with(o, { step = 0 }))
    assert.equal(scales, q.scales:bytes())
    qm.QParam.update(q, with(o, { step = 2 }))
    assert.not_equal(scales, q.scales:bytes())
    -- The new unit is a residual step of a grid that spans about +-0.35 in 15 codes.
    testing.assert_close(before, q:dequantize("f32", "residual"), 0.05 / 256 / 0.3)
  end)

  it("runs Adam in a projector's subspace and rounds what comes back", function()
    local projector = {
      project = function(_, grad) return grad:view_rows("spec", 1, 32):clone() end,
      project_back = function(_, low)
        return qm.scope(function() return qm.concat({ low, low:zeros_like() }) end)
      end,
    }
    local q = mpq.random(64, 32, { dtype = "f32" }):to(testing.device)
    q.privileged_grad = qm.randn({ 64, 32 })
    local m, v = qm.zeros({ 32, 32 }), qm.zeros({ 32, 32 })
    local before = q:unpack():totable()
    collectgarbage()
    collectgarbage()
    local live = q.data.device:memory().live_bytes
    local step = qm.QParam.update(q, { step = 0, lr = 3, exp_avg_l = m, exp_avg_s = v, projector = projector })
    assert.equal(1, step)
    assert.equal(live, q.data.device:memory().live_bytes)
    local after, moved = q:unpack():totable(), 0
    for row = 33, 64 do assert.same(before[row], after[row]) end
    for row = 1, 32 do
      for n = 1, 32 do moved = moved + (before[row][n] ~= after[row][n] and 1 or 0) end
    end
    assert.is_true(moved > 100)
    testing.assert_close(q.privileged_grad:view_rows("spec", 1, 32) * 0.01, m, 1e-5)
  end)

  it("takes hundreds of steps in the same memory, the collector stopped", function()
    local projector = qm.projector.galore({ rank = 4, update_proj_gap = 20 })
    local device = qm.default_device()
    for _, options in ipairs({ { feedback = "momentum", grid = "refit", refit_every = 10 }, { projector = projector },
      { mode = "bie" } }) do
      local q = mpq.random(64, 32, { asym = false, residual_bits = options.projector and 8 or 0 }):to(device)
      local rows = options.projector and 4 or 64 -- K >= N projects on the right: [64, 4]
      local shape = rows == 64 and { 64, 32 } or { 64, rows }
      local m, v = qm.zeros(shape), qm.zeros(shape)
      local x = qm.randn({ 5, 64 })
      local live
      collectgarbage()
      collectgarbage("stop")
      for step = 0, 150 do
        local loss = qm.qlinear(x, q)
        local dout = qm.ones({ 5, 32 })
        loss:backward(dout)
        loss:free()
        dout:free()
        qm.QParam.update(q, with({ step = step, exp_avg_l = m, exp_avg_s = v, lr = 1e-3 }, options))
        if step == 1 then live = device:memory().live_bytes end
      end
      assert.equal(live, device:memory().live_bytes)
      collectgarbage("restart")
    end
  end)

  it("has the original's quirks only in its mode", function()
    local function parameter()
      local q = qm.QParam.quantize(qm.full({ 32, 32 }, 1), { asym = false, dtype = "f32" })
      q.scales:fill(0.1)
      q.zeros:fill(0.7)
      q:pack(qm.full({ 32, 32 }, 0.3))
      return q, { exp_avg_l = qm.zeros({ 32, 32 }), exp_avg_s = qm.zeros({ 32, 32 }), step = 4, lr = 0.01,
        weight_decay = 0.5, grad = qm.full({ 32, 32 }, -1), beta1 = 0.9, beta2 = 0.99 }
    end
    local q, o = parameter() -- u = -0.1 / (0.1 + 1e-6): codes stay, zeros move by a mean(u), decay is ignored
    qm.QParam.update(q, with(o, { mode = "bie" }))
    assert.near(0.7 - 0.01, q.zeros:at(1, 1), 1e-6)
    assert.equal(10, q:unpack():at(1, 1))
    q, o = parameter()
    qm.QParam.update(q, with(o, { rounding = "nearest" }))
    assert.near(0.7, q.zeros:at(1, 1), 1e-7)
    assert.equal(10, q:unpack():at(1, 1))
  end)

  it("refuses what cannot work, and says what would", function()
    local q = mpq.random(32, 32):to(testing.device)
    local grad = qm.zeros({ 32, 32 })
    local function refused(message, options, parameter)
      local data = q.data:bytes()
      assert.error_matches(function()
        qm.QParam.update(parameter or q, with({ step = 0, grad = grad }, options))
      end, message, 1, true)
      assert.equal(data, q.data:bytes())
    end
    local moments = { exp_avg_l = grad:clone(), exp_avg_s = grad:clone() }
    local projector = { project = function(_, x) return x end, project_back = function(_, x) return x end }
    refused("under a projector, for the moments lie in the subspace and hold only the projection of the rounding "
      .. "error: use 'residual'", with(moments, { feedback = "momentum", projector = projector }))
    refused("'momentum' needs rounding = 'stochastic'", with(moments, { feedback = "momentum", rounding = "nearest" }))
    refused("residual feedback needs a parameter with a residual", { feedback = "residual" })
    refused("momentum feedback needs the moments", { feedback = "momentum" })
    refused("momentum feedback needs beta1 above 0", with(moments, { feedback = "momentum", beta1 = 0 }))
    refused("the parameter has a residual", { feedback = "none" }, mpq.random(32, 32, { residual_bits = 4 })
      :to(testing.device))
    refused("unknown option 'weigth_decay', did you mean 'weight_decay'?", { weigth_decay = 1 })
    refused("argument 'exp_avg_s': expected both moments, or neither", { exp_avg_l = grad })
    refused("argument 'exp_avg': expected f32|bf16 [K=32, N=32], got f32 [32, 31]",
      { exp_avg_l = qm.zeros({ 32, 31 }), exp_avg_s = qm.zeros({ 32, 31 }) })
    refused("expected bf16 (dtype), got qm.Tensor f32 [32, 32]", with(moments, { dtype = "bf16" }))
  end)
end)
