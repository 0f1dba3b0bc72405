-- Quantized parameters on the device under test against the reference, on many random shapes: what
-- kernels that work on several columns and whole words may get wrong.
local qm = require("quartermoon")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

local REFERENCE = { device = "reference" }
local function one_of(list) return list[math.random(#list)] end

---Values of every magnitude, the awkward ones among them; `sign`: negative ones too.
local function awkward(k, n, sign)
  local special = { 0, 0, 1e-45, 1e-38, 1e-30, 1e-18, 1e18, 1e30, 3e38, math.huge, -math.huge, 0 / 0 }
  local rows = {}
  for row = 1, k do
    rows[row] = {}
    for column = 1, n do
      local x = (math.random() + 0.5) * 10 ^ (math.random(16) - 14)
      if row > 8 and math.random(12) == 1 then x = one_of(special) end -- 8 rows are a word without any
      if sign then
        x = x * (math.random(2) * 2 - 3)
      elseif x == -math.huge then
        x = 0
      end
      rows[row][column] = x
    end
  end
  return qm.tensor(rows, REFERENCE)
end

local function moments_of(dtype, k, n)
  if dtype == "none" then return end
  local m, v = awkward(k, n, true), awkward(k, n, false)
  return m:to(dtype), v:to(dtype)
end

local MODES = { { "none", "stochastic" }, { "none", "nearest" }, { "momentum", "stochastic" },
  { "residual", "stochastic", 4 }, { "residual", "stochastic", 8 }, { "residual", "nearest", 8 } }

local function compare_steps(w_bit, moment_dtype, case, rows, columns)
  local k, n, mode = rows or 64 * math.random(2), columns or 32 * math.random(3), MODES[case % #MODES + 1]
  local feedback, rounding, rb = mode[1], mode[2], mode[3] or 0
  local q = mpq.random(k, n, { w_bit = w_bit, asym = math.random(2) == 1, group_size = one_of({ 32, 64, 24, 12 }),
    residual_bits = rb, dtype = one_of({ "f32", "f16", "bf16" }),
    q_perm = math.random(4) == 1 and mpq.permutation(k) or nil })
  local r = q:to(testing.device)
  local m, v = moments_of(moment_dtype, k, n)
  if feedback == "momentum" and not m then feedback = "none" end
  local grad = awkward(k, n, true):to(one_of({ "f32", "bf16" }))
  local there = { grad:to(testing.device), m and m:to(testing.device), v and v:to(testing.device) }
  local health = qm.zeros({ 4 }, { dtype = "i64", device = "reference" })
  local health_there = health:to(testing.device)
  for step = 0, 1 do
    local o = { step = step, lr = 10 ^ (math.random(6) - 5), weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99,
      correct_bias = true, rounding = rounding, feedback = feedback, seed = 17 }
    local function update(parameter, gradient, first, second, counts)
      o.grad, o.exp_avg_l, o.exp_avg_s, o.health = gradient, first, second, counts
      qm.QParam.update(parameter, o)
    end
    update(q, grad, m, v, health)
    update(r, there[1], there[2], there[3], health_there)
    local what = ("case %d, step %d, %s: "):format(case, step, feedback)
    testing.assert_equal(q.data, r.data, what .. "codes")
    if rb > 0 then testing.assert_equal(q.residual, r.residual, what .. "residual") end
    for i, moment in ipairs({ m, v }) do
      assert.is_true(mpq.canonical(moment) == mpq.canonical(there[i + 1]), what .. "moment " .. i)
    end
    testing.assert_equal(health, health_there, what .. "health")
  end
end

describe("qm.QParam.update on " .. testing.device .. " gives the reference's bits", function()
  for _, w_bit in ipairs({ 4, 8, 2 }) do
    for _, moment_dtype in ipairs({ "f32", "bf16", "none" }) do
      it(("at %d bits with %s moments, in every mode, awkward numbers among the gradients"):format(w_bit,
        moment_dtype), function()
        for case = 1, 2 * #MODES do compare_steps(w_bit, moment_dtype, case) end
      end)
    end
  end

  it("where a column has so many words that the device's threads walk several", function()
    local rows = testing.device:match("^cuda") and 64 * math.random(180, 200) or 256
    for case = 1, #MODES do compare_steps(4, case % 2 == 0 and "f32" or "bf16", case, rows, 32) end
  end)
end)

describe("QParam:dequantize on " .. testing.device .. " gives the reference's bits", function()
  for _, asym in ipairs({ true, false }) do
    it(asym and "asym" or "sym", function()
      for _ = 1, 60 do
        local k, n = 32 * math.random(4), asym and 32 * math.random(3) or one_of({ 8, 16, 40, 7, 12, 33 })
        local group_size = one_of({ 32, 64, 12, 5, 8, k })
        local q = mpq.random(k, n, { w_bit = one_of({ 1, 2, 4, 8 }), asym = asym, group_size = group_size,
          dtype = one_of({ "f16", "bf16", "f32" }), residual_bits = one_of({ 0, 0, 4, 8 }),
          q_perm = math.random(2) == 1 and mpq.permutation(k) or nil,
          g_idx = math.random(2) == 1 and mpq.random_groups(k, math.ceil(k / group_size)) or nil })
        local r = q:to(testing.device)
        local dtype, form = one_of({ "f32", "f16", "bf16" }), one_of({ "codes", "codes", "residual", "bie" })
        testing.assert_equal(q:dequantize(dtype, form), r:dequantize(dtype, form), dtype .. ", " .. form)
      end
    end)
  end
end)
