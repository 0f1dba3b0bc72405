local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }
local function indices(list, options)
  return qm.tensor(list, { dtype = "i32", device = options and options.device })
end

describe("qm.gather", function()
  it("picks rows of any type", function()
    local x = qm.tensor({ { 1, 2 }, { 3, 4 }, { 5, 6 } }, { dtype = "i64" })
    assert.same({ { 5, 6 }, { 1, 2 }, { 5, 6 } }, qm.gather(x, indices({ 2, 0, 2 })):totable())
    assert.same({ 30, 10 }, qm.tensor({ 10, 20, 30 }):gather(indices({ 2, 0 })):totable())
    assert.same({ 0, 2 }, qm.gather(x, indices({})).shape)
  end)

  it("adds the gradients of one row's uses", function()
    local x = qm.ones({ 3 }, { requires_grad = true })
    qm.gather(x, indices({ 2, 0, 2 })):backward(qm.tensor({ 1, 10, 100 }))
    assert.same({ 10, 0, 101 }, x.grad:totable())
  end)

  it("refuses a number outside, before it writes anything", function()
    for _, bad in ipairs({ -1, 3, 2147483647 }) do
      testing.assert_refused_late(function() qm.gather(qm.ones({ 3, 2 }), indices({ 0, bad })) end,
        ("qm.gather: argument 'index': expected numbers from 0 to 2, got %d at 1"):format(bad),
        ("gather: index %d is outside 0 .. 2"):format(bad))
    end
    assert.error_matches(function() qm.gather(qm.ones({ 3, 2 }), qm.ones({ 2 })) end,
      "argument 'index': expected i32 [R], got f32 [2]", 1, true)
  end)
end)

describe("qm.embedding", function()
  it("gives rows in the activations' type", function()
    local weight = qm.tensor({ { 1, 2 }, { 3.14159, -4 } })
    local out = qm.embedding(weight, indices({ 1, 0 }), { dtype = "bf16" })
    assert.equal("bf16", out.dtype)
    assert.same({ { 3.140625, -4 }, { 1, 2 } }, out:totable())
  end)

  it("equals the reference, forward and backward, in every pair of types", function()
    for _, types in ipairs({ { "f32", "f32" }, { "f32", "bf16" }, { "bf16", "bf16" }, { "f16", "f32" },
      { "f32", "f16" } }) do
      -- The last: a hundred uses of each row.
      for _, size in ipairs({ { 5, 3, 7 }, { 33, 515, 70 }, { 100, 64, 513 }, { 7, 132, 700 } }) do
        local weight = qm.randn({ size[1], size[2] }, reference):to(types[1])
        local index = qm.rand({ size[3] }, reference, 0, size[1]):to("i32")
        local dout = qm.randn({ size[3], size[2] }, reference):to(types[2])
        local expected, actual = testing.both({ weight, index, dout }, function(w, i, d)
          w:requires_gradient()
          local out = qm.embedding(w, i, { dtype = types[2] })
          local copy = out:clone()
          out:backward(d)
          return copy, w.grad
        end, size[1] == 33 and testing.shifted or nil)
        testing.assert_equal(expected[1], actual[1])
        testing.assert_equal(expected[2], actual[2])
      end
    end
  end)

  it("has the gradient that central differences show, for leaves and what was computed", function()
    local index = indices({ 2, 0, 2, 1 }, reference)
    local weight = qm.randn({ 4, 3 }, { device = "reference", requires_grad = true })
    testing.check_gradients(function(w) return qm.embedding(w, index) end, { weight })
    testing.check_gradients(function(w) return qm.embedding(w * 2, index) end, { weight })
  end)

  it("adds to a gradient that is there", function()
    local weight = qm.zeros({ 2, 1 }, { requires_grad = true })
    for _ = 1, 2 do qm.embedding(weight, indices({ 1 })):sum():backward() end
    assert.same({ { 0 }, { 2 } }, weight.grad:totable())
  end)

  it("says what is wrong", function()
    assert.error_matches(function() qm.embedding(qm.ones({ 4 }), indices({ 1 })) end,
      "qm.embedding: argument 'weight': expected float [V, C], got qm.Tensor f32 [4]", 1, true)
    assert.error_matches(function() qm.embedding(qm.ones({ 4, 2 }), indices({ 1 }), { type = "bf16" }) end,
      "qm.embedding: unknown option 'type', did you mean 'dtype'?", 1, true)
    testing.assert_refused_late(function() qm.embedding(qm.ones({ 4, 2 }), indices({ 4 })) end,
      "argument 'index': expected numbers from 0 to 3, got 4 at 0", "gather: index 4 is outside 0 .. 3")
  end)
end)

describe("qm.scatter", function()
  it("puts rows of any type into their places and leaves the others", function()
    local out = qm.tensor({ { 1, 2 }, { 3, 4 }, { 5, 6 } }, { dtype = "i64" })
    assert.equal(out, qm.scatter(qm.tensor({ { 7, 8 }, { 9, 0 } }, { dtype = "i64" }), indices({ 2, 0 }), out))
    assert.same({ { 9, 0 }, { 3, 4 }, { 7, 8 } }, out:totable())
    assert.same({ 1, 30 }, qm.scatter(qm.tensor({ 30 }), indices({ 1 }), qm.tensor({ 1, 2 })):totable())
  end)

  it("equals the reference", function()
    for _, size in ipairs({ { 5, 3, 7 }, { 300, 515, 700 } }) do
      local places = {}
      for i = 1, size[1] do places[i] = (i * 3 + 2) % size[3] end -- 3 divides neither 7 nor 700: all different
      local x, out = qm.randn({ size[1], size[2] }, reference):to("bf16"), qm.zeros({ size[3], size[2] }, reference)
      local expected, actual = testing.both({ x, indices(places, reference), out:to("bf16") }, qm.scatter)
      testing.assert_equal(expected[1], actual[1])
    end
  end)

  it("refuses a number outside, and what gradients flow through", function()
    testing.assert_refused_late(function() qm.scatter(qm.ones({ 1, 2 }), indices({ 3 }), qm.ones({ 3, 2 })) end,
      "qm.scatter: argument 'index': expected numbers from 0 to 2, got 3 at 0", "scatter: index 3 is outside 0 .. 2")
    local leaf = qm.ones({ 1, 2 }, { requires_grad = true })
    assert.error_matches(function() qm.scatter(leaf, indices({ 0 }), qm.ones({ 3, 2 })) end,
      "argument 'x': expected a tensor that needs no gradient", 1, true)
    assert.error_matches(function() qm.scatter(qm.ones({ 1, 2 }), indices({ 0 }), leaf * 2) end, "on the gradient tape",
      1, true)
  end)
end)
