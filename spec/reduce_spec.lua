local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }
local with_gradient = { device = "reference", requires_grad = true }
local nan = 0 / 0

-- Shapes and dimensions that put the reduced dimension last, first, in the middle; long and short.
local CASES = { { { 3, 5 }, 1 }, { { 3, 5 }, 2 }, { { 2, 3, 4 }, 2 }, { { 7, 515 }, 1 }, { { 7, 515 }, 2 },
  { { 2, 1030, 3 }, 2 }, { { 1 }, 1 }, { { 4099 }, 1 }, { { 3, 5 } }, { {} }, { { 70001 } }, { { 1500, 33 }, 1 },
  { { 1500, 264 }, 1 }, { { 3, 700, 72 }, 2 }, { { 1200, 65 }, 2 }, { { 3, 20003 }, 2 } }

describe("reductions", function()
  local x = qm.tensor({ { 1, -2, 3 }, { 4, 5, -6 } })

  it("have their values, along each dimension and over everything", function()
    assert.same({ 5, 3, -3 }, x:sum(1):totable())
    assert.same({ 2, 3 }, x:sum(2):totable())
    assert.equal(5, x:sum():item())
    assert.same({ 2.5, 1.5, -1.5 }, x:mean(1):totable())
    assert.near(5 / 6, x:mean():item(), 1e-7)
    assert.same({ 4, 5, 3 }, x:max(1):totable())
    assert.same({ -2, -6 }, x:min(2):totable())
    assert.equal(5, x:max():item())
    assert.equal(-6, qm.min(x):item())
    assert.same({ 1, 1, 0 }, x:argmax(1):totable())
    assert.same({ 2, 1 }, x:argmax(2):totable())
    assert.equal(4, x:argmax():item())
    assert.equal("i32", x:argmax(1).dtype)
  end)

  it("drop the dimension", function()
    assert.same({ 2, 4 }, qm.ones({ 2, 3, 4 }):sum(2).shape)
    assert.same({}, qm.ones({ 2, 3, 4 }):mean().shape)
  end)

  it("sum nothing to 0, and refuse the largest of nothing", function()
    assert.same({ 0, 0 }, qm.zeros({ 2, 0 }):sum(2):totable())
    assert.equal(0, qm.zeros({ 0 }):sum():item())
    assert.error_matches(function() qm.zeros({ 2, 0 }):max(2) end,
      "qm.max: argument 'x': expected at least one element along dimension 1, got f32 [2, 0]", 1, true)
  end)

  it("find NaN", function()
    local y = qm.tensor({ { 1, nan, 3 }, { nan, 5, nan } })
    local largest, smallest = y:max(2):totable(), y:min(2):totable()
    for i = 1, 2 do assert.is_true(largest[i] ~= largest[i] and smallest[i] ~= smallest[i]) end
    assert.same({ 1, 0 }, y:argmax(2):totable())
    assert.same({ 1, 0, 1 }, y:argmax(1):totable())
    assert.is_true(y:sum():item() ~= y:sum():item())
  end)

  it("take the first of equals", function()
    assert.same({ 1 }, qm.tensor({ { 0, 7, 7, 1, 7 } }):argmax(2):totable())
    local long = qm.zeros({ 1000 })
    long:narrow(500, 3):fill(2)
    assert.equal(499, long:argmax():item())
  end)

  it("sum many bf16 numbers without losing the small ones", function()
    -- 4096 ones: a running bf16 sum would stop at 256.
    assert.equal(4096, qm.ones({ 4096 }, { dtype = "bf16" }):sum():item())
    assert.equal(2 ^ 24 + 2 ^ 20, qm.ones({ 2 ^ 24 + 2 ^ 20 }):sum():item())
  end)

  for _, name in ipairs({ "sum", "mean", "max", "min", "argmax" }) do
    for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
      it(name .. " equals the reference in " .. dtype, function()
        for _, case in ipairs(CASES) do
          local input, move = qm.randn(case[1], reference):to(dtype), math.random() < 0.5 and testing.shifted or nil
          local expected, actual = testing.both({ input }, function(y) return y[name](y, case[2]) end, move)
          local what = name .. " of " .. tostring(#case[1]) .. " dimensions, along " .. tostring(case[2])
          if name == "sum" or name == "mean" then
            -- Signs cancel, so the bound is against the sum of magnitudes.
            local size = qm[name](qm.abs(input), case[2]):max():item()
            local a, b = expected[1]:to("f32"), actual[1]:to("reference"):to("f32")
            local unit = dtype == "f32" and 1e-6 or dtype == "f16" and 1e-3 or 8e-3
            assert.is_true((a - b):abs():max():item() <= unit * size, what)
          else
            testing.assert_equal(expected[1], actual[1], what)
          end
        end
      end)
    end
  end

  it("are the same bits whatever the number of threads", function()
    local ffi = require("ffi")
    pcall(ffi.cdef, "void omp_set_num_threads(int);")
    local threads = ffi.load("gomp.so.1")
    local input = qm.randn({ 50021 })
    local matrix = qm.randn({ 1031, 67 })
    local function all()
      return table.concat({ input:sum():bytes(), matrix:sum(1):bytes(), matrix:mean(2):bytes(),
        input:sum_squares():bytes(), input:argmax():bytes() })
    end
    local before = all()
    for _, count in ipairs({ 1, 3, 2 }) do
      threads.omp_set_num_threads(count)
      assert.equal(before, all())
    end
  end)

  it("have the gradients that central differences show", function()
    for _, case in ipairs({ { { 3, 5 }, 1 }, { { 3, 5 }, 2 }, { { 2, 3, 4 }, 2 }, { { 3, 5 } } }) do
      for _, name in ipairs({ "sum", "mean", "max", "min" }) do
        -- Distinct values, further apart than the step, so that the largest stays the largest.
        local count = qm.ones(case[1]):count()
        local values = qm.arange(1, count)
        local order = (qm.rand(count) * 0.5 + values * 2):to("reference"):reshape(case[1]):requires_gradient()
        testing.check_gradients(function(y) return qm[name](y, case[2]) end, { order }, { step = 0.1 })
      end
    end
  end)

  it("share the gradient among equals", function()
    local y = qm.tensor({ { 2, 2, 1 }, { 0, 1, 3 } }, { requires_grad = true })
    y:max(2):sum():backward()
    assert.same({ { 0.5, 0.5, 0 }, { 0, 0, 1 } }, y.grad:totable())
  end)

  it("refuse what they cannot take", function()
    assert.error_matches(function() x:sum(3) end,
      "qm.sum: argument 'dim': expected an integer from 1 to 2, got number 3", 1, true)
    assert.error_matches(function() qm.argmax(qm.ones(2, { dtype = "i32" })) end,
      "qm.argmax: argument 'x': expected float [...], got i32 [2]", 1, true)
  end)
end)

describe("qm.sum_squares", function()
  it("sums squares in f32, and adds to a total", function()
    local total = qm.sum_squares(qm.tensor({ { 1, -2 }, { 3, 0.5 } }))
    assert.equal(14.25, total:item())
    assert.equal(total, qm.sum_squares(qm.tensor({ 2 }, { dtype = "bf16" }), total))
    assert.equal(18.25, total:item())
  end)

  it("is not finite where x is not", function()
    for _, bad in ipairs({ nan, math.huge, -math.huge }) do
      local x = qm.ones({ 5000 })
      x:narrow(4097, 1):fill(bad)
      local sum = x:sum_squares():item()
      assert.is_true(sum ~= sum or sum == math.huge)
    end
  end)

  it("equals the reference", function()
    for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
      for _, shape in ipairs({ {}, { 3, 5 }, { 7, 515 }, { 70001 }, { 0 } }) do
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both({ qm.randn(shape, reference):to(dtype) }, qm.sum_squares, move)
          testing.assert_close(expected[1], actual[1], 1e-6)
        end
      end
    end
  end)

  -- Sizes about where the kernels cut, more tensors than one launch takes; every type, and empty ones.
  local function mixed(fill)
    local list = {}
    for _, count in ipairs({ 1, 0, 16383, 16384, 16385, 32768, 65537, 7 }) do
      for _, dtype in ipairs({ "f32", "bf16", "f16" }) do list[#list + 1] = fill({ count }, reference):to(dtype) end
    end
    for i = #list + 1, 400 do list[i] = fill({ i % 5, i % 7 }, reference):to(i % 2 == 0 and "f32" or "bf16") end
    return list
  end
  local function on_device(list, move)
    local moved = {}
    for i, tensor in ipairs(list) do moved[i] = move and move(tensor) or tensor:to(testing.device) end
    return moved
  end

  it("takes a list, whose sum is exact where no rounding comes in", function()
    local list, expected = mixed(function(...) return (qm.rand(...) * 7):floor() - 3 end), 0
    for _, tensor in ipairs(list) do
      for _, value in ipairs(tensor:reshape(tensor:count()):totable()) do expected = expected + value * value end
    end
    assert.is_true(expected > 1e6 and expected < 2 ^ 24)
    for _, move in ipairs({ false, testing.shifted }) do
      assert.equal(expected, qm.sum_squares(on_device(list, move)):item())
    end
    assert.equal(expected, qm.sum_squares(list):item())
    local total = qm.full({}, 3, { device = testing.device })
    assert.equal(total, qm.sum_squares({}, total))
    assert.equal(3, total:item())
    assert.equal(5, qm.sum_squares({ qm.ones({ 2 }, { device = testing.device }) }, total):item())
    assert.equal(0, qm.sum_squares({ qm.ones({ 0 }, { device = testing.device }) }):item())
  end)

  it("gives the same bits again, and wherever the tensors lie; close to the reference", function()
    local list = mixed(qm.randn)
    local expected, moved = qm.sum_squares(list), on_device(list)
    local once = qm.sum_squares(moved)
    testing.assert_close(expected, once, 1e-6)
    testing.assert_equal(once, qm.sum_squares(moved), "again")
    testing.assert_equal(once, qm.sum_squares(on_device(list, testing.shifted)), "shifted")
  end)

  it("of a list is not finite where one value is not", function()
    local list = on_device(mixed(qm.randn))
    list[303]:fill(nan)
    local sum = qm.sum_squares(list):item()
    assert.is_true(sum ~= sum)
  end)

  it("is recorded with its list", function()
    local step = qm.graph(function(a, b)
      local list = { a, b, qm.ones({ 3 }, { device = testing.device }) }
      for i = 4, 200 do list[i] = list[3] end
      local out = qm.sum_squares(list)
      list[1] = nil
      return out
    end, { device = testing.device })
    for i = 1, 5 do
      local a = qm.full({ 3 }, i, { device = testing.device })
      collectgarbage()
      assert.equal(3 * i * i + 4 + 3 * 198, step(a, qm.full({}, 2, { device = testing.device, dtype = "bf16" })):item())
    end
    step:free()
  end)

  it("has the gradient that central differences show", function()
    testing.check_gradients(qm.sum_squares, { qm.randn({ 3, 5 }, with_gradient) })
    local constant = qm.randn({ 4 }, reference)
    testing.check_gradients(function(a, b) return qm.sum_squares({ a, constant, b }) end,
      { qm.randn({ 3, 5 }, with_gradient), qm.randn({ 2 }, with_gradient) })
  end)

  it("says what of a list it cannot take", function()
    local x, list = qm.ones({ 2, 3 }), {}
    local other_device = { device = testing.device == "reference" and "cpu" or "reference" }
    for i = 1, 90 do list[i] = x:narrow(1, 1) end
    local function refused(message, items, total)
      assert.error_matches(function() qm.sum_squares(items, total) end, "qm.sum_squares: argument " .. message, 1, true)
    end
    refused("'x': expected a tensor or a list of them, got nothing", nil, x)
    refused("'x': expected a tensor or a list of them, got a table", {})
    refused("'x[2]': expected a tensor, got number 3", { x, 3 })
    refused("'x[2]': expected float [...], got i32 [2]", { x, qm.ones({ 2 }, { dtype = "i32" }) })
    refused("'x[3]': expected a tensor on " .. testing.device, { x, x, qm.ones({ 2 }, other_device) })
    list[77] = qm.ones({ 2 })
    refused("'out': overlaps argument 'x'", list, list[77]:narrow(2, 1):reshape({}))
  end)
end)

describe("qm.softmax", function()
  it("is e^x over its sum, however large x", function()
    local out = qm.softmax(qm.tensor({ { 0, math.log(3) }, { 1000, 1000 } })):totable()
    assert.near(0.25, out[1][1], 1e-6)
    assert.near(0.75, out[1][2], 1e-6)
    assert.same({ 0.5, 0.5 }, out[2])
  end)

  it("gives masked elements nothing", function()
    assert.same({ 0, 1 }, qm.softmax(qm.tensor({ -math.huge, 3 })):totable())
  end)

  it("equals the reference", function()
    for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
      for _, shape in ipairs({ { 1 }, { 3, 5 }, { 7, 515 }, { 2, 3, 1031 }, { 3, 0 } }) do
        local x = qm.randn(shape, reference, 0, 5):to(dtype)
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both({ x }, qm.softmax, move)
          testing.assert_close(expected[1], actual[1], dtype == "f32" and 2e-6 or 8e-3)
        end
      end
    end
  end)

  it("has the gradient that central differences show", function()
    testing.check_gradients(qm.softmax, { qm.randn({ 3, 5 }, with_gradient) }, { step = 5e-3 })
  end)

  it("refuses a tensor without dimensions", function()
    assert.error_matches(function() qm.softmax(qm.tensor(1)) end,
      "qm.softmax: argument 'x': expected at least one dimension, got a scalar", 1, true)
  end)
end)
