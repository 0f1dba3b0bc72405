local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }
local with_gradient = { device = "reference", requires_grad = true }

describe("qm.reshape", function()
  it("sees the same memory in another shape", function()
    local x = qm.arange(1, 6)
    local y = x:reshape(2, 3)
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, y:totable())
    y:fill(7)
    assert.equal(7, x:at(1))
    assert.same({ 3, 2 }, x:reshape({ 3, 2 }).shape)
    assert.same({ 3, 2 }, x:reshape(-1, 2).shape)
    assert.same({}, qm.ones({ 1 }):reshape().shape)
    assert.same({}, qm.ones({ 1 }):reshape({}).shape)
  end)

  it("passes the gradient", function()
    testing.check_gradients(function(x) return x:reshape(5, 3) end, { qm.randn({ 3, 5 }, with_gradient) })
  end)

  it("refuses another number of elements", function()
    assert.error_matches(function() qm.ones(6):reshape(4, 2) end,
      "qm.reshape: argument 'shape': expected a shape of 6 elements, got number 8", 1, true)
    assert.error_matches(function() qm.ones(6):reshape(-1, 4) end,
      "qm.reshape: argument 'shape': expected extents that divide 6 elements, got number 4", 1, true)
  end)
end)

describe("qm.narrow", function()
  it("is a run of rows on the same memory", function()
    local x = qm.tensor({ { 1, 2 }, { 3, 4 }, { 5, 6 } })
    assert.same({ { 3, 4 }, { 5, 6 } }, x:narrow(2, 2):totable())
    x:narrow(1, 1):fill(0)
    assert.same({ { 0, 0 }, { 3, 4 }, { 5, 6 } }, x:totable())
    assert.same({ 0, 2 }, x:narrow(4, 0).shape)
  end)

  it("passes the gradient to its rows, nothing to the others", function()
    local x = qm.ones({ 3, 2 }, { requires_grad = true });
    (x:narrow(2, 1) * 5):sum():backward()
    assert.same({ { 0, 0 }, { 5, 5 }, { 0, 0 } }, x.grad:totable())
  end)

  it("refuses rows that are not there", function()
    assert.error_matches(function() qm.ones({ 3, 2 }):narrow(2, 3) end,
      "qm.narrow: argument 'length': expected an integer from 0 to 2, got number 3", 1, true)
  end)
end)

describe("qm.permute and qm.transpose", function()
  it("exchange dimensions", function()
    local x = qm.tensor({ { 1, 2, 3 }, { 4, 5, 6 } })
    assert.same({ { 1, 4 }, { 2, 5 }, { 3, 6 } }, x:transpose():totable())
    assert.same({ { 1, 4 }, { 2, 5 }, { 3, 6 } }, x:permute(2, 1):totable())
    local y = qm.arange(1, 24):reshape(2, 3, 4)
    local z = y:permute({ 3, 1, 2 })
    assert.same({ 4, 2, 3 }, z.shape)
    for i = 1, 2 do
      for j = 1, 3 do
        for k = 1, 4 do assert.equal(y:at(i, j, k), z:at(k, i, j)) end
      end
    end
    assert.same({ 2, 4, 3 }, y:transpose().shape)
    assert.same({ 4, 3, 2 }, y:transpose(1, 3).shape)
  end)

  it("equal the reference in every type, on odd sizes", function()
    for _, dtype in ipairs({ "f32", "bf16", "i8", "i32", "i64" }) do
      for _, case in ipairs({ { { 3, 5 }, { 2, 1 } }, { { 67, 130 }, { 2, 1 } }, { { 5, 33, 70 }, { 1, 3, 2 } },
        { { 9, 4, 17 }, { 2, 1, 3 } }, { { 2, 3, 4, 5 }, { 4, 2, 1, 3 } }, { { 7 }, { 1 } },
        { { 6, 10, 64 }, { 2, 1, 3 } }, { { 128, 192 }, { 2, 1 } }, { { 3, 128, 66 }, { 1, 3, 2 } },
        { { 3, 5, 7, 9 }, { 3, 1, 4, 2 } }, { { 3, 1, 5 }, { 3, 2, 1 } },
        { { 0, 3 }, { 2, 1 } } }) do
        local x = qm.randn(case[1], reference, 0, 50):to(dtype)
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both({ x }, function(y) return y:permute(case[2]) end, move)
          testing.assert_equal(expected[1], actual[1])
        end
      end
    end
  end)

  it("have the gradients that central differences show", function()
    testing.check_gradients(function(x) return x:permute(3, 1, 2) end, { qm.randn({ 2, 3, 5 }, with_gradient) })
    testing.check_gradients(function(x) return x:transpose(1, 3) end, { qm.randn({ 2, 3, 5 }, with_gradient) })
  end)

  it("refuse what is no permutation", function()
    assert.error_matches(function() qm.ones({ 2, 3 }):permute(1, 1) end,
      "qm.permute: argument 'dims': expected each of 0 to 1 once, got 0 at 1", 1, true)
    assert.error_matches(function() qm.ones({ 2, 3 }):permute(1) end,
      "qm.permute: argument 'dims': expected 2 dimensions, got number 1", 1, true)
    assert.error_matches(function() qm.ones({ 2 }):transpose() end, "expected at least two dimensions", 1, true)
  end)
end)

describe("qm.concat", function()
  it("puts rows under each other", function()
    local out = qm.concat({ qm.tensor({ { 1, 2 } }), qm.tensor({ { 3, 4 }, { 5, 6 } }) })
    assert.same({ { 1, 2 }, { 3, 4 }, { 5, 6 } }, out:totable())
    assert.same({ 1, 2 }, qm.concat({ qm.tensor({ 1, 2 }, { dtype = "i32" }) }):totable())
  end)

  it("splits the gradient, and adds up where one tensor stands twice", function()
    local a = qm.ones({ 1, 2 }, { requires_grad = true })
    local b = qm.ones({ 2, 2 }, { requires_grad = true })
    qm.concat({ a, b, a }):backward(qm.tensor({ { 1, 2 }, { 3, 4 }, { 5, 6 }, { 10, 20 } }))
    assert.same({ { 11, 22 } }, a.grad:totable())
    assert.same({ { 3, 4 }, { 5, 6 } }, b.grad:totable())
  end)

  it("says which tensor does not fit", function()
    assert.error_matches(function() qm.concat({ qm.ones({ 1, 2 }), qm.ones({ 1, 3 }) }) end,
      "qm.concat: argument 'list[2]': expected f32 [R, 2] on " .. testing.device .. ", got qm.Tensor f32 [1, 3]",
      1, true)
    assert.error_matches(function() qm.concat({}) end, "argument 'list[1]': expected a tensor, got nothing", 1, true)
  end)
end)
