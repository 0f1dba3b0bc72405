local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }

local function i32(values, device)
  return qm.tensor(values, { dtype = "i32", device = device or "reference" })
end

---Offsets of sequences from their lengths.
local function offsets(lengths, device)
  local cu = { 0 }
  for i, length in ipairs(lengths) do cu[i + 1] = cu[i] + length end
  return i32(cu, device), cu[#cu]
end

---Forward and backward on one device: out, dq, dk, dv.
local function run(options)
  return function(q, k, v, dout, cu_q, cu_k)
    q:requires_gradient()
    k:requires_gradient()
    v:requires_gradient()
    local out = qm.attention(q, k, v, cu_q, cu_k, options)
    out:backward(dout)
    return out, q.grad, k.grad, v.grad
  end
end

-- Lengths of queries and keys per sequence, heads, key heads, head size, options.
local CASES = {
  { q = { 1 }, k = { 1 }, h = 1, hk = 1, d = 1 },
  { q = { 5, 0, 9 }, k = { 5, 0, 9 }, h = 2, hk = 2, d = 3 },
  { q = { 70, 3, 129 }, k = { 70, 3, 129 }, h = 4, hk = 2, d = 32 },
  { q = { 33, 64 }, k = { 65, 200 }, h = 3, hk = 1, d = 64 },
  { q = { 1, 1, 1 }, k = { 300, 1, 64 }, h = 8, hk = 2, d = 80 }, -- decoding
  { q = { 20, 40 }, k = { 4, 130 }, h = 2, hk = 1, d = 17 }, -- more queries than keys: some see none
  { q = { 20, 40, 7 }, k = { 30, 70, 0 }, h = 2, hk = 2, d = 96, options = { causal = false, scale = 0.3 } },
  { q = { 150 }, k = { 150 }, h = 2, hk = 1, d = 64, options = { window = 37 } },
  { q = { 150 }, k = { 170 }, h = 1, hk = 1, d = 128, options = { window = 3 } },
  { q = { 1, 130, 257, 64 }, k = { 1, 130, 300, 64 }, h = 4, hk = 2, d = 128, options = { window = 100 } },
  { q = { 200, 65 }, k = { 260, 65 }, h = 6, hk = 2, d = 64, options = { causal = false } },
  { q = { 1, 0, 1, 0, 3 }, k = { 300, 212, 5, 0, 413 }, h = 8, hk = 2, d = 128 }, -- decoding with a cache
  { q = { 1 }, k = { 520 }, h = 8, hk = 2, d = 128 }, -- keys split over blocks
  { q = { 1, 0 }, k = { 130, 70 }, h = 4, hk = 1, d = 64, options = { window = 129 } },
  { q = { 2, 5 }, k = { 500, 3 }, h = 16, hk = 1, d = 64, options = { window = 300 } },
  { q = { 5 }, k = { 260 }, h = 6, hk = 2, d = 128, options = { causal = false, scale = 0.2 } },
  { q = { 90 }, k = { 99 }, h = 1, hk = 1, d = 130, options = { window = 64, causal = false } },
}

describe("qm.attention", function()
  it("averages the values with softmax weights", function()
    local q, k = qm.tensor({ { { 1, 0 } }, { { 0, 2 } } }), qm.tensor({ { { 1, 1 } }, { { 3, 0 } } })
    local v = qm.tensor({ { { 10, 0 } }, { { 20, 1 } } })
    local cu = i32({ 0, 2 }, testing.device)
    local out = qm.attention(q, k, v, cu, cu, { scale = 0.5 }):totable()
    assert.same({ 10, 0 }, out[1][1]) -- the first query sees the first key only
    local a, b = math.exp(0.5 * 2), math.exp(0.5 * 0)
    assert.near((10 * a + 20 * b) / (a + b), out[2][1][1], 1e-5)
    assert.near(b / (a + b), out[2][1][2], 1e-6)
  end)

  it("scales by 1 / sqrt(D) unless told otherwise", function()
    local q, k = qm.tensor({ { { 1, 1, 1, 1 } } }), qm.tensor({ { { 1, 0, 0, 0 } }, { { 0, 0, 0, 0 } } })
    local v = qm.tensor({ { { 1, 0, 0, 0 } }, { { 0, 0, 0, 0 } } })
    local out = qm.attention(q, k, v, i32({ 0, 1 }, testing.device), i32({ 0, 2 }, testing.device)):totable()
    assert.near(math.exp(0.5) / (math.exp(0.5) + 1), out[1][1][1], 1e-6)
  end)

  it("lets query heads share key heads, neighbours together", function()
    local q, k = qm.zeros({ 1, 4, 1 }), qm.zeros({ 1, 2, 1 })
    local v = qm.tensor({ { { 7 }, { 8 } } })
    local cu = i32({ 0, 1 }, testing.device)
    assert.same({ { { 7 }, { 7 }, { 8 }, { 8 } } }, qm.attention(q, k, v, cu, cu):totable())
  end)

  it("keeps packed sequences apart, and looks back only through the window", function()
    local q, v = qm.zeros({ 5, 1, 1 }), qm.tensor({ { { 1 } }, { { 3 } }, { { 5 } }, { { 100 } }, { { 200 } } })
    local cu = i32({ 0, 3, 5 }, testing.device)
    assert.same({ { { 1 } }, { { 2 } }, { { 3 } }, { { 100 } }, { { 150 } } },
      qm.attention(q, q, v, cu, cu):totable())
    assert.same({ { { 1 } }, { { 2 } }, { { 4 } }, { { 100 } }, { { 150 } } },
      qm.attention(q, q, v, cu, cu, { window = 2 }):totable())
    assert.same({ { { 3 } }, { { 3 } }, { { 3 } }, { { 150 } }, { { 150 } } },
      qm.attention(q, q, v, cu, cu, { causal = false }):totable())
  end)

  it("gives 0 to a query that sees no key", function()
    local q = qm.ones({ 2, 1, 3 })
    local k = qm.ones({ 1, 1, 3 })
    local out = qm.attention(q, k, k, i32({ 0, 2 }, testing.device), i32({ 0, 1 }, testing.device)):totable()
    assert.same({ { { 0, 0, 0 } }, { { 1, 1, 1 } } }, out)
  end)

  -- 16-bit types: the outputs' own rounding, and in the gradients that of out, from which delta comes.
  local tolerance = { f32 = 1e-5, bf16 = 1.5e-2, f16 = 2e-3 }
  for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
    it("and its gradient equal the reference in " .. dtype .. ", on odd sizes", function()
      for index, case in ipairs(CASES) do
        local cu_q, rows_q = offsets(case.q)
        local cu_k, rows_k = offsets(case.k)
        local q = qm.randn({ rows_q, case.h, case.d }, reference, 0, 2):to(dtype)
        local k = qm.randn({ rows_k, case.hk, case.d }, reference):to(dtype)
        local v = qm.randn({ rows_k, case.hk, case.d }, reference):to(dtype)
        local dout = qm.randn({ rows_q, case.h, case.d }, reference):to(dtype)
        local expected, actual = testing.both({ q, k, v, dout, cu_q, cu_k }, run(case.options))
        for i, name in ipairs({ "out", "dq", "dk", "dv" }) do
          testing.assert_close(expected[i], actual[i], tolerance[dtype], ("case %d, %s"):format(index, name))
        end
      end
    end)
  end

  it("of few queries splits the keys for heads in groups of any size, and finds any number of sequences", function()
    local one, five = {}, {}
    for s = 1, 33 do one[s], five[s] = 1, 5 end
    for index, case in ipairs({
      { q = { 1 }, k = { 700 }, h = 3, hk = 1, d = 128 },
      { q = { 0, 1 }, k = { 1, 900 }, h = 12, hk = 1, d = 128 },
      { q = { 1 }, k = { 1100 }, h = 5, hk = 1, d = 64 },
      { q = one, k = five, h = 2, hk = 2, d = 64 },
    }) do
      local cu_q, rows_q = offsets(case.q)
      local cu_k, rows_k = offsets(case.k)
      local dtype = index % 2 == 0 and "f16" or "bf16"
      local q = qm.randn({ rows_q, case.h, case.d }, reference, 0, 2):to(dtype)
      local k = qm.randn({ rows_k, case.hk, case.d }, reference):to(dtype)
      local v = qm.randn({ rows_k, case.hk, case.d }, reference):to(dtype)
      local expected, actual = testing.both({ q, k, v, cu_q, cu_k }, function(...)
        return qm.no_grad(qm.attention, ...)
      end)
      testing.assert_close(expected[1], actual[1], tolerance[dtype], ("case %d"):format(index))
    end
  end)

  for index, options in ipairs({ {}, { causal = false }, { window = 2 } }) do
    it("has the gradient that central differences show, variant " .. index, function()
      local cu_q, rows_q = offsets({ 2, 4 })
      local cu_k, rows_k = offsets({ 3, 5 })
      local leaf = { device = "reference", requires_grad = true }
      testing.check_gradients(function(q, k, v) return qm.attention(q, k, v, cu_q, cu_k, options) end,
        { qm.randn({ rows_q, 4, 3 }, leaf), qm.randn({ rows_k, 2, 3 }, leaf), qm.randn({ rows_k, 2, 3 }, leaf) },
        { tolerance = 5e-3 })
    end)
  end

  for _, dtype in ipairs({ "f32", "bf16" }) do
    it("keeps a NaN in its own row, in " .. dtype, function()
      for _, size in ipairs({ { 40, 2 }, { 40, 64 }, { 150, 128 } }) do
        local rows, d = unpack(size)
        local values = {}
        for r = 1, rows do
          values[r] = { {} }
          for i = 1, d do values[r][1][i] = r == 7 and 0 / 0 or r / rows end
        end
        local q, k = qm.tensor(values, { dtype = dtype }), qm.ones({ rows, 1, d }, { dtype = dtype })
        local cu = i32({ 0, rows }, testing.device)
        for r, row in ipairs(qm.attention(q, k, k, cu, cu):totable()) do
          assert.equal(r == 7, row[1][1] ~= row[1][1])
        end
      end
    end)
  end

  it("takes tensors without rows", function()
    local q, cu = qm.ones({ 0, 4, 8 }):requires_gradient(), i32({ 0, 0 }, testing.device)
    local out = qm.attention(q, q, q, cu, cu)
    assert.same({ 0, 4, 8 }, out.shape)
    out:backward(qm.ones(out.shape))
  end)

  it("survives scores beyond the range of exp", function()
    local q, k = qm.tensor({ { { 300 } }, { { -300 } } }), qm.tensor({ { { 1 } }, { { 0.5 } } })
    local cu = i32({ 0, 2 }, testing.device)
    local out = qm.attention(q, k, k, cu, cu, { causal = false, scale = 10 }):totable()
    assert.same({ { { 1 } }, { { 0.5 } } }, out)
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    local LATE = "attention: expected offsets ascending from 0 to the number of rows"
    local cu = i32({ 0, 2 }, testing.device)
    local function attention(h, hk, cu_q, cu_k, options)
      return function()
        local q, k = qm.ones({ 2, h, 3 }), qm.ones({ 2, hk, 3 })
        qm.attention(q, k, k, cu_q or cu, cu_k or cu, options)
      end
    end
    assert.error_matches(attention(3, 2), "qm.attention: argument 'k': expected HK to divide H=3, got HK=2", 1, true)
    assert.error_matches(attention(0, 0), "argument 'k': expected HK to divide H=0, got HK=0", 1, true)
    assert.error_matches(attention(1, 1, nil, i32({ 0, 1, 2 }, testing.device)),
      "argument 'cu_k': expected i32 [S+1=2], got i32 [3]", 1, true)
    assert.error_matches(attention(1, 1, nil, nil, { windw = 3 }),
      "unknown option 'windw', did you mean 'window'?", 1, true)
    assert.error_matches(attention(1, 1, nil, nil, { window = -1 }), "argument 'window': expected an integer", 1, true)
    for _, wrong in ipairs({ { 0, 1 }, { 0, 3 }, { 1, 2 }, { -1, 2 } }) do
      testing.assert_refused_late(attention(1, 1, i32(wrong, testing.device)),
        "argument 'cu_q': expected offsets ascending from 0 to 2, got", LATE)
      testing.assert_refused_late(attention(1, 1, nil, i32(wrong, testing.device)),
        "argument 'cu_k': expected offsets ascending from 0 to 2, got", LATE)
    end
    local back = i32({ 0, 2, 1, 2 }, testing.device)
    testing.assert_refused_late(attention(1, 1, back, back), "ascending from 0 to 2, got 1 at 2", LATE)
  end)
end)
