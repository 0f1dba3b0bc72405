-- The update step of rows wide enough for the vectorized loops: whole pieces of columns, a second block
-- of them, a remainder, rows that begin inside a block of random words.
local qm = require("quartermoon")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

local K = 32
local REFERENCE = { device = "reference" }

---Random gradients, some of them zeros of either sign or what an update must leave out.
local function gradients(n)
  local special = { 0 / 0, 1 / 0, -1 / 0, 1e30, 0, -1 / math.huge }
  local values = qm.randn({ K, n }, REFERENCE, 0, 0.3):totable()
  for i = 1, 60 do values[math.random(K)][math.random(n)] = special[i % #special + 1] end
  return qm.tensor(values, REFERENCE)
end

local function steps(n, feedback, rounding, dtype)
  local q = mpq.random(K, n, { w_bit = 4, asym = false, group_size = 16, dtype = "f32",
    residual_bits = feedback == "residual" and 8 or 0 })
  local r, grad = q:to(testing.device), gradients(n)
  local grad_there = grad:to(testing.device)
  local health = qm.zeros({ 4 }, { dtype = "i64", device = "reference" })
  local health_there = health:to(testing.device)
  local m, v, m_there, v_there
  if dtype ~= "none" then
    m, v = qm.randn({ K, n }, REFERENCE, 0, 0.1):to(dtype), qm.rand({ K, n }, REFERENCE):to(dtype)
    m:view_rows("spec", 1, 4):fill(0)
    m_there, v_there = m:to(testing.device), v:to(testing.device)
  end
  for step, lr in ipairs({ 0.3, 0.01, 1e20 }) do
    local function update(parameter, g, first, second, counts)
      qm.QParam.update(parameter, { step = step, lr = lr, lr_next = lr, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99,
        eps = 1e-6, correct_bias = true, seed = 17, grad_scale = 0.7, rounding = rounding, feedback = feedback,
        grad = g, exp_avg_l = first, exp_avg_s = second, health = counts })
    end
    update(q, grad, m, v, health)
    update(r, grad_there, m_there, v_there, health_there)
    local what = ("n %d, lr %g: "):format(n, lr)
    testing.assert_equal(q.data, r.data, what .. "codes")
    if q.residual then testing.assert_equal(q.residual, r.residual, what .. "residual") end
    if m then
      testing.assert_equal(m, m_there, what .. "exp_avg_l")
      testing.assert_equal(v, v_there, what .. "exp_avg_s")
    end
    testing.assert_equal(health, health_there, what .. "health")
  end
  local counts = health:totable()
  assert.is_true(counts[2] > 0 and counts[3] > 0 and counts[4] > 0)
end

describe("qm.QParam.update gives the reference's bits in wide rows:", function()
  for _, dtype in ipairs({ "f32", "bf16", "none" }) do
    for _, case in ipairs({ "none nearest", "none stochastic", "momentum stochastic", "residual nearest",
      "residual stochastic" }) do
      local feedback, rounding = case:match("(%w+) (%w+)")
      if dtype ~= "none" or feedback ~= "momentum" then
        it(("%s, moments %s"):format(case, dtype), function()
          for _, n in ipairs({ 1300, 259 }) do steps(n, feedback, rounding, dtype) end
        end)
      end
    end
  end
end)
