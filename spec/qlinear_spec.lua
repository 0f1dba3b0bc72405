local qm = require("quartermoon")
local binding = require("quartermoon.ffi")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

local function parameter(k, n, options)
  return qm.QParam.quantize(qm.randn({ k, n }, { device = "reference" }), options)
end

describe("qm.qlinear", function()
  it("multiplies by the dequantized weight and adds the bias", function()
    local q = parameter(32, 64):to(testing.device)
    local x, bias = qm.randn({ 3, 32 }), qm.randn({ 64 })
    local out, w, xs, b = qm.qlinear(x, q, bias):totable(), q:dequantize("f32"):totable(), x:totable(), bias:totable()
    for row = 1, 3 do
      for n = 1, 64 do
        local sum = b[n]
        for k = 1, 32 do sum = sum + xs[row][k] * w[k][n] end
        assert.near(sum, out[row][n], 1e-4)
      end
    end
  end)

  for _, dtype in ipairs({ "f32", "bf16" }) do
    it("equals the reference in " .. dtype .. ", gradients too", function()
      for _, options in ipairs({ { asym = false, w_bit = 2 }, { w_bit = 8, group_size = -1 } }) do
        local q = parameter(96, 32, options)
        local r = q:to(testing.device)
        local x = qm.randn({ 5, 96 }, { device = "reference" }):to(dtype):requires_gradient()
        local y = x:to(testing.device):requires_gradient()
        local a, b = qm.qlinear(x, q), qm.qlinear(y, r)
        local dout = qm.randn({ 5, 32 }, { device = "reference" }):to(dtype)
        local tolerance = dtype == "f32" and 1e-5 or 2e-2
        testing.assert_close(a, b, tolerance, "out")
        a:backward(dout)
        b:backward(dout:to(testing.device))
        testing.assert_close(x.grad, y.grad, tolerance, "dx")
        testing.assert_close(q.privileged_grad, r.privileged_grad, tolerance, "privileged_grad")
        assert.equal("f32", r.privileged_grad.dtype)
      end
    end)
  end

  it("is the same layer on either side of the rule for few rows", function()
    local q = parameter(64, 32, { group_size = 32 }):to(testing.device)
    local rows = qm.default_device():info().fused_rows + 1
    local x, dout = qm.randn({ rows, 64 }):requires_gradient(), qm.randn({ rows, 32 })
    local many = qm.qlinear(x, q)
    many:backward(dout)
    for first = 1, rows, 13 do
      local count = math.min(13, rows - first + 1)
      local few_x = x:to("f32"):narrow(first, count):clone():requires_gradient()
      local few = qm.qlinear(few_x, q)
      testing.assert_close(many:narrow(first, count), few, 1e-5)
      few:backward(dout:narrow(first, count))
      testing.assert_close(x.grad:narrow(first, count), few_x.grad, 1e-5)
    end
  end)

  it("gathers its gradient in bf16 where the parameter says so", function()
    local q = parameter(32, 32, { grad_dtype = "bf16" }):to(testing.device)
    local x, dout = qm.randn({ 4, 32 }), qm.randn({ 4, 32 })
    for _ = 1, 2 do qm.qlinear(x, q):backward(dout) end
    assert.equal("bf16", q.privileged_grad.dtype)
    testing.assert_close(qm.matmul(x, dout, { trans_a = true }) * 2, q.privileged_grad, 1e-2)
    assert.error_matches(function() parameter(32, 32, { grad_dtype = "i8" }) end, "argument 'grad_dtype'", 1, true)
  end)

  it("has the gradients that central differences show", function()
    local q = parameter(32, 32)
    local options = { device = "reference", requires_grad = true }
    local function layer(x, bias) return qm.qlinear(x, q, bias) end
    testing.check_gradients(layer, { qm.randn({ 3, 32 }, options), qm.randn({ 32 }, options) })
  end)

  it("adds up privileged_grad = x^T dy over backward passes, also where x needs no gradient", function()
    local q = parameter(32, 32):to(testing.device)
    local x, dout = qm.randn({ 4, 32 }), qm.randn({ 4, 32 })
    for _ = 1, 2 do qm.qlinear(x, q):backward(dout) end
    local expected = qm.matmul(x, dout, { trans_a = true }) * 2
    testing.assert_close(expected, q.privileged_grad, 1e-5)
    q:zero_grad()
    assert.is_nil(q.privileged_grad)
    q.requires_grad = false
    assert.is_nil(qm.qlinear(x, q).node)
  end)

  it("keeps no dense weight between passes", function()
    local q = parameter(64, 64):to(testing.device)
    local x, device = qm.randn({ 2, 64 }), q.data.device
    collectgarbage()
    collectgarbage()
    local before = device:memory().live_bytes
    local out = qm.qlinear(x, q)
    assert.equal(before + 2 * 64 * 4, device:memory().live_bytes)
    out:backward(qm.ones({ 2, 64 }))
    out:free()
    assert.is_true(device:memory().live_bytes <= before + 64 * 64 * 4 + 2 * 64 * 4) -- the gradient (and the ones)
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    local q = parameter(32, 32):to(testing.device)
    assert.error_matches(function() qm.qlinear(qm.ones({ 2, 31 }), q) end, "qm.qlinear: argument 'x': expected a "
      .. "matrix of K=32 columns, for qm.QParam 32 x 32, 4 bit asym, group 64, got qm.Tensor f32 [2, 31]", 1, true)
    assert.error_matches(function() qm.qlinear(qm.ones({ 2, 32 }), qm.ones({ 32, 32 })) end,
      "argument 'q': expected a qm.QParam", 1, true)
  end)
end)

describe("qm.qlinear_group", function()
  local function layers()
    return { parameter(96, 64, { group_size = 32 }):to(testing.device), parameter(96, 32):to(testing.device),
      parameter(96, 32, { w_bit = 8, asym = false, group_size = 32 }):to(testing.device) }
  end

  for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
    it("equals the layers one by one, in " .. dtype, function()
      local weights, biases = layers(), { nil, qm.randn({ 32 }), nil }
      for _, rows in ipairs({ 0, 1, 3, 12, 40, 70 }) do
        local x = qm.randn({ rows, 96 }):to(dtype)
        local outs = { qm.no_grad(qm.qlinear_group, x, weights, biases) }
        assert.equal(3, #outs)
        for i, out in ipairs(outs) do
          local one = qm.no_grad(qm.qlinear, x, weights[i], biases[i])
          assert.same(one.shape, out.shape)
          testing.assert_close(one, out, dtype == "f32" and 1e-5 or 1e-2)
        end
      end
    end)
  end

  it("has its layers' gradients", function()
    local x, weights = qm.randn({ 3, 96 }):requires_gradient(), layers()
    local a, b = qm.qlinear_group(x, { weights[1], weights[1] })
    local both = a + b
    both:sum():backward()
    local dx, dw = x.grad:clone(), weights[1].privileged_grad:clone()
    x.grad = nil
    weights[1].privileged_grad = nil
    local twice = qm.qlinear(x, weights[1]) * 2
    twice:sum():backward()
    testing.assert_close(x.grad, dx, 1e-5)
    testing.assert_close(weights[1].privileged_grad, dw, 1e-5)
  end)

  it("says what does not fit", function()
    local weights = layers()
    assert.error_matches(function() qm.qlinear_group(qm.ones({ 2, 95 }), weights) end,
      "qm.qlinear_group: argument 'x': expected a matrix of K=96 columns", 1, true)
    assert.error_matches(function() qm.qlinear_group(qm.ones({ 2, 96 }), { 1 }) end, "argument 'q'", 1, true)
    assert.error_matches(function() qm.qlinear_group(qm.ones({ 2, 96 }), weights, { qm.ones({ 3 }) }) end,
      "argument 'bias'", 1, true)
  end)
end)

describe("qm_mpq_linear", function()
  local FUSED = { f32 = 1e-5, f16 = 4e-3, bf16 = 3e-2 } -- W may be rounded to x's type, out is

  ---x W or x W^T, from x on any device; with `skip`, x and out begin so many elements into their memory.
  local function product(x, q, transposed, skip)
    skip = skip or 0
    local device, m, columns = q.data.device, x.shape[1], q.shape[transposed and 1 or 2]
    local memory = qm.zeros({ skip + m * x.shape[2] }, { dtype = x.dtype, device = device })
    local from = memory:narrow(skip + 1, m * x.shape[2]):reshape(unpack(x.shape))
    from:copy(x:to(device))
    local out = qm.full({ skip + m * columns }, 0 / 0, { dtype = x.dtype, device = device })
      :narrow(skip + 1, m * columns):reshape(m, columns)
    binding.check(binding.lib.qm_mpq_linear(from.desc, q:descriptor("product"), out.desc,
      transposed and 1 or 0), "product")
    return out
  end

  local function parity(q, dtype, rows, skip)
    local there = q:to(testing.device)
    for _, transposed in ipairs({ false, true }) do
      local x = qm.randn({ rows, q.shape[transposed and 2 or 1] }, { device = "reference" }):to(dtype)
      local what = ("%s, %d rows of %s, transposed %s, skip %d"):format(tostring(q), rows, dtype, tostring(transposed),
        skip or 0)
      testing.assert_close(product(x, q, transposed), product(x, there, transposed, skip), FUSED[dtype], what)
    end
    there:free()
  end

  it("is the product with the dequantized weight", function()
    local q = mpq.random(64, 32, { w_bit = 4, group_size = 32 })
    local w = q:dequantize("f32")
    local x, dy = qm.randn({ 3, 64 }, { device = "reference" }), qm.randn({ 3, 32 }, { device = "reference" })
    local there = q:to(testing.device)
    testing.assert_close(qm.matmul(x, w), product(x, there, false), 1e-5)
    testing.assert_close(qm.matmul(dy, w, { trans_b = true }), product(dy, there, true), 1e-5)
  end)

  for _, w_bit in ipairs({ 1, 2, 4, 8 }) do
    it("equals the reference with codes of " .. w_bit .. " bits", function()
      for _, asym in ipairs({ true, false }) do
        for _, dtype in ipairs({ "f32", "f16", "bf16" }) do
          local rows = ({ f32 = 3, f16 = 5, bf16 = 9 })[dtype]
          parity(mpq.random(160, 96, { w_bit = w_bit, asym = asym, group_size = 32, dtype = "f16" }), dtype, rows)
          parity(mpq.random(96, 160, { w_bit = w_bit, asym = asym, group_size = -1, dtype = dtype }), dtype, 2)
        end
      end
    end)
  end

  it("takes sums that are cut into parts", function()
    for i, rows in ipairs({ 3, 12, 17, 40, 64 }) do
      local dtype = i % 2 == 0 and "bf16" or "f16"
      parity(mpq.random(1056, 224, { group_size = 96, asym = i % 3 > 0, dtype = dtype }), dtype, rows)
      parity(mpq.random(608, 544, { group_size = 32, dtype = "f16" }), dtype, rows)
    end
  end)

  it("takes any number of rows, and shapes that fill no block", function()
    for _, rows in ipairs({ 0, 1, 7, 8, 16, 17, 31, 33, 64, 65 }) do
      parity(mpq.random(288, 224, { group_size = 64, dtype = "bf16" }), "bf16", rows)
    end
    for _, n in ipairs({ 1, 3, 37, 131 }) do
      parity(mpq.random(32 + 64 * (n % 3), n, { asym = false, group_size = 48 }), "bf16", n % 19 + 1)
    end
    parity(mpq.random(544, 352, { group_size = 128 }), "f16", 11)
    -- Enough for blocks of 128 columns on the four multiprocessors that are emulated, and a last one cut short.
    parity(mpq.random(96, 552, { asym = false, group_size = 32 }), "f16", 3)
  end)

  -- Sums in f32 of W as its codes and grid have it, or rounded to x's type: 2^-12 or 2^-9 of a weight, which
  -- sums of random signs do not add up, and as much for the result. spread: x is bf16, and every third of it is
  -- larger or smaller by up to 2^spread.
  local exact, turn = { f16 = 2 ^ -10, bf16 = 2 ^ -7 }, 0
  local function few(k, n, group_size, rows, asym, spread)
    turn = turn + 1
    local dtype, scales = turn % 2 == 0 and "f16" or "bf16", math.floor(turn / 2) % 2 == 0 and "f16" or "bf16"
    local q = mpq.random(k, n, { group_size = group_size, asym = asym, dtype = scales })
    local x, there = qm.randn({ rows, k }, { device = "reference" }), q:to(testing.device)
    if spread then
      dtype = "bf16"
      local values = x:totable()
      for _, row in ipairs(values) do
        for i = 1, k, 3 do row[i] = row[i] * 2 ^ math.random(-spread, spread) end
      end
      x = qm.tensor(values, { device = "reference" })
    end
    x = x:to(dtype)
    local expected = qm.matmul(x:to("f32"), q:dequantize("f32"))
    testing.assert_close(expected, product(x, there, false):to("f32"), exact[dtype],
      ("%s, %d rows of %s, scales %s"):format(tostring(q), rows, dtype, scales))
    there:free()
  end

  it("sums few rows as exactly as their type allows, whatever the groups", function()
    for _, rows in ipairs({ 1, 2, 7, 8, 9, 15, 16, 17 }) do
      few(32, 8, 32, rows, false)
      for _, group_size in ipairs({ 32, 64, 128 }) do
        few(96, 40, group_size, rows, false)
        few(160, 64, group_size, rows, true)
      end
    end
    few(4128, 1056, 128, 1, true)
    few(4128, 1048, 64, 16, false)
    few(4128, 64, 32, 2, true)
    few(2080, 160, 32, 9, true)
    for i, rows in ipairs({ 39, 64 }) do
      local asym = i % 2 == 0
      few(2080, 160, 64, rows, asym)
      few(1056, 320, 96, rows, not asym)
      few(5152, 32, 32, rows, asym)
      few(5120, 288, 128, rows, not asym)
      few(1024, 320, -1, rows, asym)
    end
    if testing.device == "cpu" then return end -- where more columns take no other path
    for _, rows in ipairs({ 3, 8, 12 }) do -- columns for one, two and more blocks on each multiprocessor of a GPU
      for i, n in ipairs({ 4288, 8512, 17024 }) do few(160, n, 32, rows, i % 2 == 0) end
    end
    few(160, 17024, 64, 17, false) -- there a block's sum, a cluster's, and those that a kernel behind adds
    few(96, 17024, 32, 18, true)
  end)

  -- Hopper's GPUs have their own way, where tiles of 32 columns are enough for the multiprocessors and features come
  -- in units of 128. x is laid out by groups, so that rows of larger span than f16's must lose nothing.
  it("multiplies one row", function()
    -- Columns for 4 multiprocessors, as are emulated, or for a GPU's; then more than its blocks take at once.
    local emulated = testing.device == "cpu" or qm.default_device():info().description:find("no GPU", 1, true)
    local wide, several = emulated and 96 or 4256, emulated and 1120 or 34304
    for i, group_size in ipairs({ 32, 64, 128, 256, -1 }) do
      few(384, wide, group_size, 1, i % 2 == 0)
      few(128 * math.random(8), wide + 32 * math.random(4), group_size, 1, i % 2 == 1)
    end
    few(4096 + 128 * math.random(3), wide, 128, 1, true, 60)
    few(2176, wide, 64, 1, false, 100)
    few(128, several, 32, 1, true)
    few(2176, emulated and 288 or wide, 4096, 1, true)
  end)

  it("has no number where one row has none", function()
    local q = mpq.random(256, 4256, { group_size = 128, dtype = "bf16" }):to(testing.device)
    for _, value in ipairs({ 0 / 0, 1 / 0 }) do
      local values = { {} }
      for i = 1, 256 do values[1][i] = i == 77 and value or 1 end
      local out = product(qm.tensor(values, { device = "reference" }):to("bf16"), q, false):to("f32"):totable()[1]
      for i = 1, 4256, 997 do assert.is_true(out[i] ~= out[i] or math.abs(out[i]) == 1 / 0) end
    end
    q:free()
  end)

  it("follows g_idx and q_perm", function()
    for _, dtype in ipairs({ "f32", "bf16" }) do
      parity(mpq.random(96, 64, { group_size = 32, g_idx = mpq.random_groups(96, 3) }), dtype, 4)
      parity(mpq.random(96, 64, { group_size = 32, asym = false, q_perm = mpq.permutation(96) }), dtype, 4)
    end
  end)

  it("takes operands that begin anywhere", function()
    for _, dtype in ipairs({ "f32", "f16", "bf16" }) do
      parity(mpq.random(128, 96, { group_size = 64 }), dtype, 6, 1)
      parity(mpq.random(128, 96, { group_size = 64 }), dtype, 6, 3)
    end
  end)

  it("gives the same bits every time", function()
    local q = mpq.random(512, 256, { group_size = 128 }):to(testing.device)
    for _, transposed in ipairs({ false, true }) do
      for _, rows in ipairs({ 1, 16, 40 }) do
        local x = qm.randn({ rows, q.shape[transposed and 2 or 1] }):to("bf16")
        local first = product(x, q, transposed)
        for _ = 1, 5 do testing.assert_equal(first, product(x, q, transposed)) end
      end
    end
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    local q = mpq.random(64, 32):to(testing.device)
    local x, out = qm.ones({ 3, 64 }, { device = testing.device }), qm.ones({ 3, 31 }, { device = testing.device })
    assert.error_matches(function()
      binding.check(binding.lib.qm_mpq_linear(x.desc, q:descriptor("x"), out.desc, 0), "product")
    end, "argument 'out': expected f32 [M=3, N=32], got f32 [3, 31]", 1, true)
    assert.error_matches(function()
      binding.check(binding.lib.qm_mpq_linear(x.desc, q:descriptor("x"), out.desc, 1), "product")
    end, "argument 'x': expected float [M, N=32], got f32 [3, 64]", 1, true)
  end)
end)
