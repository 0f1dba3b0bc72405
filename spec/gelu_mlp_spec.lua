local qm = require("quartermoon")
local testing = require("spec.support.testing")

local NAMES = { "x", "w1", "b1", "w2", "b2" }
---Rows, inputs, inner and outputs; the last are sizes that a GPU's products take whole.
local SIZES = { { 1, 1, 1, 1 }, { 3, 5, 7, 2 }, { 33, 17, 12, 9 }, { 0, 4, 8, 8 }, { 64, 24, 40, 16 } }

---Operands on the reference device: x of one type, weights and biases of others.
local function operands(size, dtype, weights, biases)
  local rows, inputs, inner, outputs = unpack(size)
  local function randn(shape, type_name)
    return qm.randn(shape, { device = "reference" }):to(type_name or "f32")
  end
  return { randn({ rows, inputs }, dtype), randn({ inputs, inner }, weights), randn({ inner }, biases),
    randn({ inner, outputs }, weights), randn({ outputs }, biases), randn({ rows, outputs }, dtype) }
end

---The layer of operations that each do one thing.
local function apart(x, w1, b1, w2, b2) return qm.linear(qm.gelu(qm.linear(x, w1, b1), "tanh"), w2, b2) end

---out and the five gradients, each on a copy.
local function run(form, options)
  return function(x, w1, b1, w2, b2, dout)
    local inputs = {}
    for i, input in ipairs({ x, w1, b1, w2, b2 }) do inputs[i] = input:clone():requires_gradient() end
    local out = form(inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], options)
    out:backward(dout)
    return out, inputs[1].grad, inputs[2].grad, inputs[3].grad, inputs[4].grad, inputs[5].grad
  end
end

describe("qm.gelu_mlp", function()
  it("is two linear layers with GELU between them, gradients too", function()
    local on_device = {}
    for i, input in ipairs(operands({ 9, 24, 40, 16 }, "f32")) do on_device[i] = input:to(testing.device) end
    local expected = { run(function(...) return apart(...) end)(unpack(on_device)) }
    for _, recompute in ipairs({ false, true }) do
      local actual = { run(qm.gelu_mlp, { recompute = recompute })(unpack(on_device)) }
      for i = 1, 6 do testing.assert_close(expected[i], actual[i], 1e-5, NAMES[i - 1] or "out") end
    end
  end)

  it("has the gradient that central differences show, with and without biases", function()
    local options = { device = "reference", requires_grad = true }
    local x, w1, w2 = qm.randn({ 3, 5 }, options), qm.randn({ 5, 7 }, options), qm.randn({ 7, 2 }, options)
    local b1, b2 = qm.randn({ 7 }, options), qm.randn({ 2 }, options)
    testing.check_gradients(qm.gelu_mlp, { x, w1, b1, w2, b2 })
    testing.check_gradients(function(a, b, c) return qm.gelu_mlp(a, b, nil, c, nil) end, { x, w1, w2 })
    testing.check_gradients(function(a, b, c, d)
      return qm.gelu_mlp(a, b, c, d, nil, { recompute = true })
    end, { x, w1, b1, w2 })
  end)

  -- Up to four values rounded to 16 bits behind each other, and the sums over them.
  for _, types in ipairs({ { "f32", "f32", "f32", 1e-5 }, { "bf16", "f32", "f32", 2 ^ -6 },
    { "bf16", "bf16", "bf16", 2 ^ -6 }, { "f16", "f16", "f32", 2 ^ -9 } }) do
    it(("and its gradients equal the reference: %s, weights %s, biases %s"):format(unpack(types)), function()
      for _, size in ipairs(SIZES) do
        local inputs = operands(size, types[1], types[2], types[3])
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both(inputs, run(qm.gelu_mlp), move)
          for i = 1, 6 do
            assert.equal(expected[i].dtype, actual[i].dtype)
            testing.assert_close(expected[i], actual[i], types[4], NAMES[i - 1] or "out", 1)
          end
        end
      end
    end)
  end

  it("makes again what it forgot, and under qm.checkpoint all of it, to the same bits", function()
    local on_device = {}
    for i, input in ipairs(operands({ 64, 24, 40, 16 }, "bf16")) do on_device[i] = input:to(testing.device) end
    local stored = { run(qm.gelu_mlp)(unpack(on_device)) }
    local again = { run(qm.gelu_mlp)(unpack(on_device)) }
    local checkpointed = { run(function(...) return qm.checkpoint(qm.gelu_mlp, ...) end)(unpack(on_device)) }
    for i = 1, 6 do
      testing.assert_equal(stored[i], again[i])
      -- What a checkpoint hands on to x is of x's type.
      testing.assert_equal(i == 2 and stored[i]:to("bf16"):to("f32") or stored[i], checkpointed[i])
    end
    -- The result is made from its rounded argument: out and what stands before it are the same.
    local recomputed = { run(qm.gelu_mlp, { recompute = true })(unpack(on_device)) }
    for i = 1, 6 do
      if i == 5 then testing.assert_close(stored[i], recomputed[i], 2 ^ -7) else
        testing.assert_equal(stored[i], recomputed[i])
      end
    end
  end)

  it("gathers gradients over parts, and in what holds some already", function()
    local x, w1, b1, w2, b2, dout = unpack(operands({ 6, 8, 16, 8 }, "f32"))
    local expected = { run(qm.gelu_mlp)(x, w1, b1, w2, b2, dout) }
    local leaves = {}
    for i, input in ipairs({ w1, b1, w2, b2 }) do leaves[i] = input:to(testing.device):requires_gradient() end
    for part = 0, 2 do
      local rows = x:narrow(2 * part + 1, 2):to(testing.device)
      qm.gelu_mlp(rows, unpack(leaves)):backward(dout:narrow(2 * part + 1, 2):to(testing.device))
    end
    for i = 1, 4 do testing.assert_close(expected[i + 2], leaves[i].grad, 1e-5, NAMES[i + 1]) end
    -- x is used twice: what has gathered for it takes the second gradient in.
    local both = x:to(testing.device):requires_gradient()
    local scaled = both * 1
    (qm.gelu_mlp(scaled, unpack(leaves)) + qm.gelu_mlp(scaled, unpack(leaves))):backward(dout:to(testing.device))
    testing.assert_close(expected[2] * 2, both.grad, 1e-5, "x")
  end)

  it("gives gradients to those alone that want one", function()
    local x, w1, b1, w2, b2, dout = unpack(operands({ 9, 24, 40, 16 }, "bf16"))
    local expected = { run(qm.gelu_mlp)(x, w1, b1, w2, b2, dout) }
    for i = 1, 5 do
      for _, recompute in ipairs({ false, true }) do
        local inputs = {}
        for j, input in ipairs({ x, w1, b1, w2, b2 }) do inputs[j] = input:to(testing.device) end
        inputs[i]:requires_gradient()
        qm.gelu_mlp(inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], { recompute = recompute })
          :backward(dout:to(testing.device))
        for j = 1, 5 do
          if i == j then testing.assert_close(expected[j + 1], inputs[j].grad, 2 ^ -6, NAMES[j]) else
            assert.is_nil(inputs[j].grad)
          end
        end
      end
    end
  end)

  it("keeps two tensors for backward, one with recompute, none under no_grad, and then gives all back", function()
    local device = assert(qm.device(testing.device))
    local inputs = {}
    for i, input in ipairs(operands({ 64, 24, 40, 16 }, "bf16")) do inputs[i] = input:to(device) end
    for _, case in ipairs({ { true, false, 2 }, { true, true, 1 }, { false, false, 0 } }) do
      inputs[1].requires_grad = case[1]
      local before = device:memory().live_bytes
      local out = qm.gelu_mlp(inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], { recompute = case[2] })
      local small = 64 * 16 * 2
      local kept = device:memory().live_bytes - before - small
      assert.is_true(kept >= case[3] * 64 * 40 * 2 and kept < (case[3] + 1) * 64 * 40 * 2, kept .. " bytes are kept")
      if case[1] then
        out:backward(inputs[6])
        inputs[1]:zero_grad()
      end
      out:free()
      assert.equal(before, device:memory().live_bytes)
    end
    inputs[1]:requires_gradient()
    local out = qm.no_grad(qm.gelu_mlp, unpack(inputs, 1, 5))
    assert.is_nil(out.node)
  end)

  it("is the same in a graph, step for step", function()
    local device = assert(qm.device(testing.device))
    local x, w1, b1, w2, b2, dout = unpack(operands({ 64, 24, 40, 16 }, "bf16"))
    x, dout = x:to(device), dout:to(device)
    local function leaves()
      local made = {}
      for i, input in ipairs({ w1, b1, w2, b2 }) do made[i] = input:to(device):requires_gradient() end
      return made
    end
    local plain, recorded = leaves(), leaves()
    local function step(params)
      return function(a, d)
        local out = qm.gelu_mlp(a, unpack(params))
        out:backward(d)
        return out
      end
    end
    local graph = qm.graph(step(recorded), { device = device })
    for call = 1, 5 do
      local expected, actual = step(plain)(x, dout), graph(x, dout)
      testing.assert_equal(expected, actual, "call " .. call)
      for i = 1, 4 do testing.assert_equal(plain[i].grad, recorded[i].grad, NAMES[i + 1]) end
    end
    graph:free()
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    local x, w1, w2 = qm.ones({ 2, 3 }), qm.ones({ 3, 4 }), qm.ones({ 4, 5 })
    local function refuses(sentence, ...)
      local arguments, count = { ... }, select("#", ...)
      assert.error_matches(function() qm.gelu_mlp(unpack(arguments, 1, count)) end, "qm.gelu_mlp: " .. sentence, 1,
        true)
    end
    refuses("argument 'x': expected a tensor, got number 3", 3, w1, nil, w2)
    refuses("argument 'x': expected float [R, K], got qm.Tensor f32 [3]", qm.ones({ 3 }), w1, nil, w2)
    refuses("argument 'x': expected float [M, K], got i32 [2, 3]", x:to("i32"), w1, nil, w2)
    refuses("argument 'w1': expected float [K=3, H], got qm.Tensor f32 [4, 5]", x, w2, nil, w2)
    refuses("argument 'w2': expected float [H=4, N], got qm.Tensor f32 [3, 4]", x, w1, nil, w1)
    refuses("argument 'b1': expected float [N=4], got qm.Tensor f32 [5]", x, w1, qm.ones({ 5 }), w2)
    refuses("argument 'b2': expected float [N=5], got qm.Tensor f32 [4]", x, w1, nil, w2, qm.ones({ 4 }))
    refuses("unknown option 'recompte', did you mean 'recompute'?", x, w1, nil, w2, nil, { recompte = true })
    refuses("argument 'recompute': expected a boolean, got number 1", x, w1, nil, w2, nil, { recompute = 1 })
  end)
end)
