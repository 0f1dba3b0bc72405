local qm = require("quartermoon")
local binding = require("quartermoon.ffi")
local testing = require("spec.support.testing")

local FLAGS = { { false, false }, { true, false }, { false, true }, { true, true } }

---Random operands whose op(a) op(b) is [m, k] x [k, n], in a batch if one is given.
local function operands(m, k, n, trans_a, trans_b, batch, options)
  local a = trans_a and { k, m } or { m, k }
  local b = trans_b and { n, k } or { k, n }
  if batch then
    table.insert(a, 1, batch)
    table.insert(b, 1, batch)
  end
  options = options or { device = "reference" }
  return qm.randn(a, options), qm.randn(b, options)
end

describe("qm.matmul", function()
  it("multiplies by hand, transposed either way", function()
    local a, b = qm.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }), qm.tensor({ { 1, 0 }, { 2, -1 }, { 0, 3 } })
    local at, bt = qm.tensor({ { 1, 4 }, { 2, 5 }, { 3, 6 } }), qm.tensor({ { 1, 2, 0 }, { 0, -1, 3 } })
    local expected = { { 5, 7 }, { 14, 13 } }
    assert.same(expected, qm.matmul(a, b):totable())
    assert.same(expected, qm.matmul(at, b, { trans_a = true }):totable())
    assert.same(expected, qm.matmul(a, bt, { trans_b = true }):totable())
    assert.same(expected, qm.matmul(at, bt, { trans_a = true, trans_b = true }):totable())
  end)

  it("multiplies batches one by one", function()
    local a = qm.tensor({ { { 1, 2 } }, { { 3, 4 } } })
    local b = qm.tensor({ { { 1 }, { 1 } }, { { 2 }, { 0 } } })
    assert.same({ { { 3 } }, { { 6 } } }, qm.matmul(a, b):totable())
  end)

  -- 16-bit outputs are rounded once from an f32 sum: half an ulp is 2^-9 or 2^-12, and the sums
  -- themselves differ by their order.
  for dtype, tolerance in pairs({ f32 = 1e-5, bf16 = 2 ^ -8, f16 = 2 ^ -10 }) do
    it("equals the reference in " .. dtype .. ", on odd sizes", function()
      for _, size in ipairs({ { 1, 1, 1 }, { 1, 5, 3 }, { 3, 1, 5 }, { 7, 13, 1 }, { 33, 65, 17 }, { 5, 300, 70 } }) do
        for _, flags in ipairs(FLAGS) do
          for batch = 0, 3, 3 do
            local a, b = operands(size[1], size[2], size[3], flags[1], flags[2], batch > 0 and batch or nil)
            local expected, actual = testing.both({ a:to(dtype), b:to(dtype) }, function(x, y)
              return qm.matmul(x, y, { trans_a = flags[1], trans_b = flags[2] })
            end)
            testing.assert_close(expected[1], actual[1], tolerance)
          end
        end
      end
    end)
  end

  it("equals the reference on unaligned operands, and in many batches", function()
    for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
      for _, flags in ipairs(FLAGS) do
        local a, b = operands(17, 72, 33, flags[1], flags[2])
        local expected, actual = testing.both({ a:to(dtype), b:to(dtype) }, function(x, y)
          return qm.matmul(x, y, { trans_a = flags[1], trans_b = flags[2] })
        end, testing.shifted)
        testing.assert_close(expected[1], actual[1], dtype == "f32" and 1e-5 or 2 ^ -8)
      end
    end
    local a, b = operands(1, 5, 2, false, false, 70000) -- more than a grid has layers
    local expected, actual = testing.both({ a, b }, qm.matmul)
    testing.assert_close(expected[1], actual[1], 1e-5)
  end)

  it("equals the reference where many rows meet one weight", function()
    for _, size in ipairs({ { 2048, 64, 48 }, { 2051, 7, 33 }, { 3000, 1, 1 } }) do
      for _, flags in ipairs({ { false, false }, { false, true } }) do
        local a, b = operands(size[1], size[2], size[3], flags[1], flags[2])
        local expected, actual = testing.both({ a:to("bf16"), b:to("bf16") }, function(x, y)
          return qm.matmul(x, y, { trans_b = flags[2] })
        end)
        testing.assert_close(expected[1], actual[1], 2 ^ -8)
      end
    end
  end)

  it("takes empty operands: a sum over nothing is 0", function()
    for _, dtype in ipairs({ "f32", "bf16" }) do
      local options = { dtype = dtype }
      local zeros = qm.matmul(qm.empty({ 2, 0 }, options), qm.empty({ 0, 3 }, options))
      assert.same({ { 0, 0, 0 }, { 0, 0, 0 } }, zeros:totable())
      assert.same({ 0, 3 }, qm.matmul(qm.empty({ 0, 5 }, options), qm.ones({ 5, 3 }, options)).shape)
      assert.same({ 2, 0 }, qm.matmul(qm.ones({ 2, 5 }, options), qm.empty({ 5, 0 }, options)).shape)
      assert.same({ 0, 2, 3 }, qm.matmul(qm.empty({ 0, 2, 5 }, options), qm.empty({ 0, 5, 3 }, options)).shape)
    end
  end)

  for _, flags in ipairs(FLAGS) do
    it(("has the gradient that central differences show, transposing %s, %s"):format(tostring(flags[1]),
      tostring(flags[2])), function()
      local function product(a, b) return qm.matmul(a, b, { trans_a = flags[1], trans_b = flags[2] }) end
      local options = { device = "reference", requires_grad = true }
      testing.check_gradients(product, { operands(3, 5, 4, flags[1], flags[2], nil, options) })
      testing.check_gradients(product, { operands(3, 2, 1, flags[1], flags[2], 2, options) })
    end)
  end

  it("hands gradients on through a chain, and gathers them in leaves", function()
    local a, b = qm.randn({ 2, 3 }, { requires_grad = true }), qm.randn({ 3, 3 }, { requires_grad = true })
    local seed = qm.randn({ 2, 3 })
    qm.matmul(qm.matmul(a, b), b):backward(seed)
    -- d(a b b) = da b b + a db b + a b db
    local bb, ab = qm.matmul(b:to("f32"), b), qm.matmul(a:to("f32"), b)
    testing.assert_close(qm.matmul(seed, bb, { trans_b = true }), a.grad, 1e-5)
    local inner = qm.matmul(seed, b, { trans_b = true })
    local first, second = qm.matmul(a, inner, { trans_a = true }), qm.matmul(ab, seed, { trans_a = true })
    local sum = first:totable()
    for i, row in ipairs(second:totable()) do for j, value in ipairs(row) do sum[i][j] = sum[i][j] + value end end
    testing.assert_close(qm.tensor(sum), b.grad, 1e-5)
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    assert.error_matches(function() qm.matmul(qm.ones({ 2, 3 }), qm.ones({ 2, 3 })) end,
      "qm.matmul: argument 'b': expected f32 [K=3, N], got f32 [2, 3]", 1, true)
    assert.error_matches(function() qm.matmul(qm.ones({ 2, 3 }), qm.ones({ 3, 2 }, { dtype = "bf16" })) end,
      "argument 'b': expected f32 [K=3, N], got bf16 [3, 2]", 1, true)
    assert.error_matches(function() qm.matmul(qm.ones({ 3 }), qm.ones({ 3, 2 })) end,
      "argument 'a': expected float [M, K], got f32 [3]", 1, true)
    assert.error_matches(function() qm.matmul(qm.ones({ 2, 3, 3 }), qm.ones({ 3, 3 })) end,
      "argument 'b': expected f32 [B=2, K=3, N], got f32 [3, 3]", 1, true)
    assert.error_matches(function() qm.matmul(qm.ones({ 3, 3 }), qm.ones({ 3, 3 }), { trans_a = 1 }) end,
      "argument 'trans_a': expected a boolean, got number 1", 1, true)
    assert.error_matches(function() qm.matmul(qm.ones({ 3, 3 }), qm.ones({ 3, 3 }), { transb = true }) end,
      "unknown option 'transb', did you mean 'trans_b'?", 1, true)
  end)
end)

describe("qm_gemm", function()
  local function gemm(a, b, out, alpha, beta)
    binding.check(binding.lib.qm_gemm(a.desc, b.desc, out.desc, 1, 0, alpha, beta), "qm_gemm")
    return out
  end

  -- The weight gradient's product: 16-bit operands, f32 sums.
  for _, types in ipairs({ { "f32", "f32" }, { "bf16", "f32" }, { "bf16", "bf16" }, { "f16", "f32" }, { "f16", "f16" },
    { "f32", "bf16" }, { "f32", "f16" }, { "bf16", "f16" }, { "f16", "bf16" } }) do
    it(("scales and accumulates %s products into %s"):format(types[1], types[2]), function()
      local a, b = operands(9, 31, 6, true, false)
      local out = qm.randn({ 9, 6 }, { device = "reference" })
      for _, scales in ipairs({ { 1, 1 }, { 0.5, -2 }, { 0, 1 }, { 2, 0 } }) do
        local expected, actual = testing.both({ a:to(types[1]), b:to(types[1]), out:to(types[2]) }, function(x, y, z)
          return gemm(x, y, z:clone(), scales[1], scales[2])
        end)
        testing.assert_close(expected[1], actual[1], types[2] == "f32" and 1e-5 or 2 ^ -7)
      end
    end)
  end

  it("with beta 0 does not read what it overwrites", function()
    for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
      local out = qm.full({ 2, 2 }, 0 / 0):to(dtype)
      local a, b = qm.ones({ 3, 2 }, { dtype = dtype }), qm.ones({ 3, 2 }, { dtype = dtype })
      assert.same({ { 3, 3 }, { 3, 3 } }, gemm(a, b, out, 1, 0):totable())
      assert.same({ { 3, 3 }, { 3, 3 } }, gemm(qm.empty({ 0, 2 }, { dtype = dtype }),
        qm.empty({ 0, 2 }, { dtype = dtype }), out, 1, 1):totable())
    end
  end)

  it("gives the same bits every time", function()
    for _, dtype in ipairs({ "f32", "bf16" }) do
      local a, b = operands(70, 515, 130, true, false, nil, {})
      local x, y = a:to(dtype), b:to(dtype)
      local first = gemm(x, y, qm.empty({ 70, 130 }), 1, 0)
      for _ = 1, 5 do testing.assert_equal(first, gemm(x, y, qm.empty({ 70, 130 }), 1, 0)) end
    end
  end)
end)

-- Decompositions run in f32 or better: a dozen ulps of the largest value.
local TOLERANCE = 2e-6

---A random matrix of a given rank.
local function matrix_of_rank(m, n, rank)
  local options = { device = "reference" }
  return qm.matmul(qm.randn({ m, rank }, options), qm.randn({ rank, n }, options))
end

---The identity, f32 [n, n].
local function identity(n, device)
  local rows = {}
  for i = 1, n do
    rows[i] = {}
    for j = 1, n do rows[i][j] = i == j and 1 or 0 end
  end
  return qm.tensor(rows, { device = device })
end

for _, device in ipairs({ "reference", testing.device }) do
  describe("qm.svd on " .. device, function()
    it("decomposes by hand", function()
      local u, s, vt = qm.svd(qm.tensor({ { 0, -3 }, { 2, 0 }, { 0, 4 } }, { device = device }))
      assert.same({ { 3, 2 }, { 2 }, { 2, 2 } }, { u.shape, s.shape, vt.shape })
      assert.near(5, s:at(1), 1e-5)
      assert.near(2, s:at(2), 1e-5)
      assert.near(1, math.abs(vt:at(1, 2)), 1e-6)
      assert.near(-0.6, u:at(1, 1) * vt:at(1, 2), 1e-6)
      assert.near(0.8, u:at(3, 1) * vt:at(1, 2), 1e-6)
      assert.near(1, u:at(2, 2) * vt:at(2, 1), 1e-6)
    end)

    it("gives orthonormal factors whose product is the matrix, whatever its shape and rank", function()
      for _, size in ipairs({ { 1, 1, 1 }, { 5, 1, 1 }, { 1, 4, 1 }, { 7, 7, 7 }, { 23, 9, 9 }, { 8, 31, 8 },
        { 9, 9, 4 }, { 20, 6, 3 }, { 5, 12, 2 } }) do
        local a = matrix_of_rank(size[1], size[2], size[3]):to(device)
        local u, s, vt = qm.svd(a)
        local r = s.shape[1]
        testing.assert_close(identity(r, device), qm.matmul(u, u, { trans_a = true }), TOLERANCE, "u")
        testing.assert_close(identity(r, device), qm.matmul(vt, vt, { trans_b = true }), TOLERANCE, "vt")
        local values, diagonal = s:totable(), identity(r):totable()
        for i = 1, r do
          diagonal[i][i] = values[i]
          assert.is_true(values[i] >= 0 and values[i] <= (values[i - 1] or math.huge))
        end
        testing.assert_close(a, qm.matmul(qm.matmul(u, qm.tensor(diagonal, { device = device })), vt), TOLERANCE * 2)
      end
    end)

    it("takes the zero matrix and empty ones", function()
      local u, s, vt = qm.svd(qm.zeros({ 4, 3 }, { device = device }))
      assert.same({ 0, 0, 0 }, s:totable())
      testing.assert_close(identity(3, device), qm.matmul(u, u, { trans_a = true }), TOLERANCE)
      testing.assert_close(identity(3, device), qm.matmul(vt, vt, { trans_b = true }), TOLERANCE)
      assert.same({ 0 }, select(2, qm.svd(qm.empty({ 0, 3 }, { device = device }))).shape)
    end)

    it("refuses what it cannot decompose", function()
      for _, value in ipairs({ 0 / 0, 1 / 0, -1 / 0 }) do
        assert.error_matches(function() qm.svd(qm.tensor({ { 1, 2 }, { value, 3 } }, { device = device })) end,
          "qm.svd: argument 'a': expected finite values, got [-%w]+ at 2")
      end
      assert.error_matches(function() qm.svd(qm.ones({ 3 }, { device = device })) end,
        "qm.svd: argument 'a': expected f32 [M, N], got f32 [3]", 1, true)
      assert.error_matches(function() qm.svd(qm.ones({ 3, 3 }, { device = device, dtype = "bf16" })) end,
        "qm.svd: argument 'a': expected f32 [M, N], got bf16 [3, 3]", 1, true)
    end)
  end)

  describe("qm.cholesky_inverse on " .. device, function()
    it("factors an inverse by hand", function()
      -- a = diag(4, 16) has the inverse diag(1/4, 1/16).
      local a = qm.tensor({ { 4, 0 }, { 0, 16 } }, { device = device })
      assert.same({ { 0.5, 0 }, { 0, 0.25 } }, qm.cholesky_inverse(a):totable())
      -- Damped by 0.6 of the mean 10: diag(10, 22).
      testing.assert_close(qm.tensor({ { 1 / 10 ^ 0.5, 0 }, { 0, 1 / 22 ^ 0.5 } }, { device = device }),
        qm.cholesky_inverse(a, 0.6), 1e-6)
    end)

    it("gives an upper triangle whose square is the inverse", function()
      for _, n in ipairs({ 1, 2, 7, 33, 70 }) do
        local x = qm.randn({ 3 * n, n }, { device = device })
        local a = qm.matmul(x, x, { trans_a = true })
        local u = qm.cholesky_inverse(a)
        testing.assert_close(identity(n, device), qm.matmul(qm.matmul(u, u, { trans_a = true }), a), 1e-4)
        local rows = u:totable()
        for i = 1, n do
          assert.is_true(rows[i][i] > 0)
          for j = 1, i - 1 do assert.equal(0, rows[i][j]) end
        end
      end
      assert.same({ 0, 0 }, qm.cholesky_inverse(qm.empty({ 0, 0 }, { device = device })).shape)
    end)

    it("refuses what is not positive definite", function()
      local singular = qm.ones({ 3, 3 }, { device = device })
      assert.error_matches(function() qm.cholesky_inverse(singular) end, "expected a positive definite matrix", 1, true)
      qm.cholesky_inverse(singular, 0.01)
      assert.error_matches(function() qm.cholesky_inverse(qm.ones({ 2, 3 }, { device = device })) end,
        "expected f32 [N, N], got f32 [2, 3]", 1, true)
      assert.error_matches(function() qm.cholesky_inverse(qm.full({ 2, 2 }, 0 / 0, { device = device })) end,
        "expected finite values", 1, true)
      assert.error_matches(function() qm.cholesky_inverse(singular, -1) end, "damping", 1, true)
    end)
  end)

  describe("qm.qr on " .. device, function()
    it("gives an orthonormal basis of the columns, whatever their rank", function()
      for _, size in ipairs({ { 1, 1, 1 }, { 6, 1, 1 }, { 5, 5, 5 }, { 67, 13, 13 }, { 20, 6, 3 } }) do
        local a = matrix_of_rank(size[1], size[2], size[3]):to(device)
        local q = qm.qr(a)
        testing.assert_close(identity(size[2], device), qm.matmul(q, q, { trans_a = true }), TOLERANCE)
        -- Projecting a onto the basis changes nothing.
        testing.assert_close(a, qm.matmul(q, qm.matmul(q, a, { trans_a = true })), TOLERANCE * 2)
        -- Each column adds itself: r is upper triangular.
        local r = qm.matmul(q, a, { trans_a = true }):totable()
        for i = 1, size[2] do
          for j = 1, i - 1 do assert.near(0, r[i][j], 1e-4) end
        end
      end
    end)

    it("takes zeros and empty matrices, and refuses wide ones and NaN", function()
      local q = qm.qr(qm.zeros({ 4, 2 }, { device = device }))
      testing.assert_close(identity(2, device), qm.matmul(q, q, { trans_a = true }), TOLERANCE)
      assert.same({ 3, 0 }, qm.qr(qm.empty({ 3, 0 }, { device = device })).shape)
      assert.error_matches(function() qm.qr(qm.ones({ 2, 3 }, { device = device })) end,
        "qm.qr: argument 'a': expected at least as many rows as columns, got f32 [2, 3]", 1, true)
      assert.error_matches(function() qm.qr(qm.full({ 2, 2 }, 0 / 0, { device = device })) end,
        "qm.qr: argument 'a': expected finite values, got %-?nan at 0")
    end)
  end)
end

describe("the decompositions", function()
  it("equal the reference: singular values, and the basis with its signs", function()
    for _, size in ipairs({ { 1, 1 }, { 9, 4 }, { 33, 33 }, { 70, 20 } }) do
      local a = qm.randn(size, { device = "reference" })
      local expected, actual = testing.both({ a }, function(x) return select(2, qm.svd(x)), qm.qr(x) end)
      testing.assert_close(expected[1], actual[1], TOLERANCE)
      -- The last columns of a nearly singular basis are the least certain.
      testing.assert_close(expected[2], actual[2], 1e-4)
    end
  end)

  it("adds the gradients of products that share an input, without a tensor for each", function()
    local options = { device = "reference", requires_grad = true }
    local x, a, b = qm.randn({ 5, 3 }, options), qm.randn({ 3, 4 }, options), qm.randn({ 3, 4 }, options)
    testing.check_gradients(function(input, first, second)
      local shared = qm.tanh(input) -- not a leaf: its gradient gathers in a tensor of the tape's
      return qm.linear(shared, first) * qm.linear(shared, second) + qm.linear(shared, first)
    end, { x, a, b }, { tolerance = 5e-3 })
  end)
end)
