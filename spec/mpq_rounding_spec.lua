-- Stochastic rounding in the update step: what the random words must be good for.
local qm = require("quartermoon")

describe("qm.QParam.update, stochastic,", function()
  it("is unbiased: the mean step of equal weights is the exact one", function()
    local n, steps = 4096, 8
    for _, move in ipairs({ 0.3, -0.004, 1.6 }) do
      local q = qm.QParam.quantize(qm.zeros({ 32, n }), { w_bit = 8, dtype = "f32", asym = false })
      q.scales:fill(1)
      q:pack(qm.full({ 32, n }, 128))
      local sum = 0
      for step = 0, steps - 1 do
        q:pack(qm.full({ 32, n }, 128)) -- zeros are -0: code 128 is weight 128
        qm.QParam.update(q, { step = step, lr = 1, grad = qm.full({ 32, n }, -move), seed = 5 })
        local codes, count = q:unpack():host()
        for i = 0, count - 1 do sum = sum + codes[i] - 128 end
      end
      local count, fraction = 32 * n * steps, move % 1
      assert.near(move, sum / count, 4 * math.sqrt(fraction * (1 - fraction) / count))
    end
  end)

  it("rounds codes and both bf16 moments without bias, any two of them independently", function()
    -- All elements start alike. What is rounded one way or the other has a deviation of at most half a
    -- step; every tolerance is 5 standard errors.
    local k, n, b1, b2, lr, lr_next, g, unit = 64, 2048, 0.5, 0.75, 0.3, 100, 1.0058, 2 ^ -7
    for _, feedback in ipairs({ "none", "momentum" }) do
      local q = qm.QParam.quantize(qm.zeros({ k, n }), { w_bit = 4, asym = false, dtype = "f32", id = 3 })
      q.scales:fill(1)
      q.zeros:fill(0)
      q:pack(qm.full({ k, n }, 8))
      local m, v = qm.ones({ k, n }, { dtype = "bf16" }), qm.ones({ k, n }, { dtype = "bf16" })
      qm.QParam.update(q, { step = 2, lr = lr, lr_next = lr_next, grad = qm.full({ k, n }, g), exp_avg_l = m,
        exp_avg_s = v, beta1 = b1, beta2 = b2, eps = 0, correct_bias = false, feedback = feedback, seed = 11 })
      local exact_m, exact_v = b1 + (1 - b1) * g, b2 + (1 - b2) * g * g
      local move, inject = -lr * exact_m / math.sqrt(exact_v), (1 - b1) / b1 / lr_next
      local codes, count = q:unpack():host()
      local ms, vs = m:to("f32"):host(), v:to("f32"):host()
      local parts = { [7] = {}, [8] = {} } -- by what became of the code
      for code, part in pairs(parts) do
        part.count, part.m, part.v = 0, 0, 0
        local lost = move - (code - 8)
        part.exact = exact_m - (feedback == "momentum" and inject * math.sqrt(exact_v) * lost or 0)
      end
      local both = 0
      for i = 0, count - 1 do
        local part = parts[codes[i]]
        local off_m, off_v = ms[i] - part.exact, vs[i] - exact_v
        part.count, part.m, part.v = part.count + 1, part.m + off_m, part.v + off_v
        both = both + off_m * off_v
      end
      assert.near(-move, parts[7].count / count, 5 * 0.5 / math.sqrt(count))
      for _, part in pairs(parts) do
        assert.near(0, part.m / part.count, 5 * unit / 2 / math.sqrt(part.count))
        assert.near(0, part.v / part.count, 5 * unit / 2 / math.sqrt(part.count))
      end
      -- With feedback the fraction of exp_avg depends on the code's rounding: the three together are dependent.
      if feedback == "none" then assert.near(0, both / count, 5 * (unit / 2) ^ 2 / math.sqrt(count)) end
    end
  end)
end)
