local qm = require("quartermoon")

local device = assert(qm.device(os.getenv("QM_DEVICE") or "cpu"))
local function live() return device:memory().live_bytes end
local function leaf(data) return qm.tensor(data, { requires_grad = true }) end

describe("backward", function()
  it("adds over the uses of a tensor", function()
    local x = leaf({ 2, 3 });
    (x * x + x):sum():backward()
    assert.same({ 5, 7 }, x.grad:totable())
  end)

  it("adds over the uses of an intermediate tensor, shared gradients included", function()
    local x = leaf({ 1, 2 })
    local y = x * 3
    -- y's three gradients arrive as shares of one tensor; adding must not spoil the others.
    local sum = (y + y) + y
    sum:backward(qm.tensor({ 1, 10 }))
    assert.same({ 9, 90 }, x.grad:totable())
  end)

  it("adds to the gradient of the last time, until zero_grad", function()
    local x = leaf({ 1 });
    (x * 2):sum():backward();
    (x * 3):sum():backward()
    assert.same({ 5 }, x.grad:totable())
    x:zero_grad()
    assert.is_nil(x.grad);
    (x * 3):sum():backward()
    assert.same({ 3 }, x.grad:totable())
  end)

  it("does not change the gradient it starts from", function()
    local x = leaf({ 1, 2 })
    local start = qm.tensor({ 1, 1 })
    local y = x:reshape(2)
    y:backward(start)
    local z = x:reshape(2)
    z:backward(start)
    assert.same({ 2, 2 }, x.grad:totable())
    assert.same({ 1, 1 }, start:totable())
  end)

  it("goes through a node with several outputs, used or not", function()
    local x = qm.tensor({ { 1, 2 }, { 3, 5 } }, { requires_grad = true })
    local residual = qm.tensor({ { 1, 1 }, { 1, 1 } }, { requires_grad = true })
    local weight = leaf({ 1, 1 })
    local out, sum = qm.add_rms_norm(x, residual, weight, 1e-6)
    local both = out:sum() + (sum * 2):sum()
    both:backward()
    local with_both = x.grad:totable()
    assert.same(with_both, residual.grad:totable())
    x:zero_grad()
    out = qm.add_rms_norm(x, residual, weight, 1e-6)
    out:sum():backward()
    local with_one = x.grad:totable()
    for i = 1, 2 do
      for j = 1, 2 do assert.near(with_one[i][j] + 2, with_both[i][j], 1e-5) end
    end
  end)

  it("keeps gradients of leaves in f32, whatever the leaf", function()
    local x = qm.ones({ 3 }, { dtype = "bf16", requires_grad = true });
    (x * 2):sum():backward()
    assert.equal("f32", x.grad.dtype)
    assert.same({ 2, 2, 2 }, x.grad:totable())
  end)

  it("stops at tensors that need no gradient", function()
    local x, constant = leaf({ 1, 2 }), qm.tensor({ 3, 4 });
    (x * constant):sum():backward()
    assert.is_nil(constant.grad)
    assert.same({ 3, 4 }, x.grad:totable())
  end)

  it("releases the intermediate tensors, but not the loss nor what was kept", function()
    local x = leaf({ 1, 2 })
    local y = x * 2
    local z = (y + 1):keep()
    local loss = (z * y):sum()
    loss:backward()
    assert.is_nil(y.storage)
    assert.same({ 3, 5 }, z:totable())
    assert.equal(3 * 2 + 5 * 4, loss:item())
  end)

  it("runs once, and says so", function()
    local loss = (leaf({ 1 }) * 2):sum()
    loss:backward()
    assert.error_matches(function() loss:backward() end, "backward() ran already", 1, true)
    assert.error_matches(function() qm.ones(1):backward() end,
      "this tensor depends on nothing that requires a gradient", 1, true)
    assert.error_matches(function() (leaf({ 1, 2 }) * 2):backward() end,
      "backward: argument 'grad': expected a gradient, for this is no single number", 1, true)
  end)

  it("flows past a freed tensor whose value it does not need, and raises where it does", function()
    local x = leaf({ 1, 2 })
    local y = x * 3
    local z = y + 1
    y:free()
    z:sum():backward()
    assert.same({ 3, 3 }, x.grad:totable())
    local loss = qm.scope(function() return (x * 3):square():sum() end)
    assert.error_matches(function() loss:backward() end, "not a tensor (or one that was freed)", 1, true)
  end)

  it("leaves the tape usable after an error in an operation", function()
    local x = leaf({ 1, 2 })
    assert.has_error(function() return qm.no_grad(function() return x + qm.ones(3) end) end);
    (x * 2):sum():backward()
    assert.same({ 2, 2 }, x.grad:totable())
  end)

  it("walks a chain of a thousand operations", function()
    local x = leaf({ 1 })
    local y = x
    for _ = 1, 1000 do y = y + x end
    y:sum():backward()
    assert.same({ 1001 }, x.grad:totable())
  end)
end)

describe("qm.no_grad", function()
  it("records nothing, and passes values through", function()
    local x = leaf({ 1, 2 })
    local y, word = qm.no_grad(function(suffix) return x * 2, "a" .. suffix end, "b")
    assert.is_nil(y.node)
    assert.equal("ab", word)
    assert.is_truthy((x * 2).node)
  end)
end)

describe("qm.checkpoint", function()
  local function block(x, w) return ((x * w):tanh() * w + x):square() end

  it("gives the same value and the same gradients", function()
    local results = {}
    for i, run in ipairs({ block, function(...) return qm.checkpoint(block, ...) end }) do
      local x, w = leaf({ 0.3, -0.7 }), leaf({ 1.5, 2.5 })
      local inner = x * 2
      local out = run(inner, w)
      local loss = (out * out):sum()
      loss:backward()
      results[i] = { loss:item(), x.grad:totable(), w.grad:totable() }
    end
    assert.same(results[1], results[2])
  end)

  it("reaches parameters that its function closes over", function()
    local x, w = leaf({ 2 }), leaf({ 3 })
    local out = qm.checkpoint(function(y) return y * w end, x)
    out:sum():backward()
    assert.same({ 3 }, x.grad:totable())
    assert.same({ 2 }, w.grad:totable())
  end)

  it("passes gradients through what its function hands on as it came", function()
    local x, untouched = leaf({ 1, 2 }), qm.tensor({ 5 })
    local same, double, given = qm.checkpoint(function(y, z) return y, y * 2, z end, x * 3, untouched)
    local sum = (same + double + given):sum()
    sum:backward()
    assert.same({ 9, 9 }, x.grad:totable())
    assert.same({ 5 }, untouched:totable()) -- the caller's, and alive
  end)

  it("holds less while the forward pass stands", function()
    local function deep(x)
      for _ = 1, 20 do x = x:tanh() end
      return x
    end
    local function held(run)
      local x = qm.ones({ 1000 }, { requires_grad = true })
      local before = live()
      local out = run(x):sum()
      local bytes = live() - before
      out:backward()
      x:zero_grad()
      return bytes
    end
    collectgarbage()
    collectgarbage("stop") -- what earlier specs dropped must not go while we count
    local plain = held(deep)
    local checkpointed = held(function(x) return qm.checkpoint(deep, x) end)
    collectgarbage("restart")
    assert.is_true(plain >= 20 * 4000)
    assert.is_true(checkpointed < plain / 5)
  end)
end)

describe("three hundred training steps with the collector stopped", function()
  it("do not hold more memory from step to step", function()
    local table_of_rows = qm.randn({ 11, 6 }, { requires_grad = true })
    local w, bias = qm.randn({ 6, 6 }, { requires_grad = true }), qm.zeros({ 6 }, { requires_grad = true })
    local index = qm.tensor({ 3, 1, 10, 0, 3 }, { dtype = "i32" })
    local function step()
      local x = qm.embedding(table_of_rows, index)
      local function layer(h)
        local y = qm.matmul(h, w) + bias
        y = y:silu() * y:sigmoid() + y:gelu():tanh() - y:abs():clamp(0, 3) / 7
        y = qm.maximum(y, 0.01) + qm.minimum(y, h) + (y:exp() + 1):log():sqrt() + (y:square() + 1):rsqrt()
        return y:reshape(6, 5):transpose():permute(1, 2)
      end
      local y = qm.checkpoint(layer, layer(x))
      y = qm.concat({ y:narrow(1, 2), y:narrow(3, 3) })
      y = qm.cast(qm.cast(y, "bf16"):relu(), "f32") * y:softmax() + y:pow(2):reciprocal()
      local loss = y:mean(1):max() + y:sum(2):min() + y:max(2):sum() * 0.1 + y:sum_squares() + y:cos():sin():mean()
      loss:backward()
      loss:free()
      qm.scope(function()
        for _, parameter in ipairs({ table_of_rows, w, bias }) do
          parameter:add_(parameter.grad, -1e-6)
          parameter:zero_grad()
        end
      end)
    end
    for _ = 1, 3 do step() end
    collectgarbage()
    collectgarbage()
    collectgarbage("stop")
    local before, handles = device:memory(), qm.handles_live()
    for _ = 1, 300 do step() end
    local after, handles_after = device:memory(), qm.handles_live()
    collectgarbage("restart")
    assert.equal(before.live_bytes, after.live_bytes)
    assert.equal(before.live_count, after.live_count)
    assert.equal(handles, handles_after)
  end)
end)
