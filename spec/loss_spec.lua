local qm = require("quartermoon")
local binding = require("quartermoon.ffi")
local testing = require("spec.support.testing")

---Random classes, with some ignored.
local function random_targets(rows, classes, ignore_index, share)
  local targets = {}
  for i = 1, rows do
    targets[i] = math.random() < (share or 0.2) and ignore_index or math.random(0, classes - 1)
  end
  return qm.tensor(targets, { dtype = "i32", device = "reference" })
end

local function i32(values, device) return qm.tensor(values, { dtype = "i32", device = device }) end

describe("qm.cross_entropy", function()
  it("is the negative log of the target's share, by hand", function()
    local logits = qm.tensor({ { 0, 0, 0, 0 }, { math.log(1), math.log(2), math.log(5), math.log(8) } })
    assert.near(math.log(4), qm.cross_entropy(logits, i32({ 3, -100 })):item(), 1e-6)
    assert.near(math.log(16 / 5), qm.cross_entropy(logits, i32({ -100, 2 })):item(), 1e-6)
    assert.near((math.log(4) + math.log(2)) / 2, qm.cross_entropy(logits, i32({ 0, 3 })):item(), 1e-6)
    assert.near(math.log(4), qm.cross_entropy(logits, i32({ 0, 3 }), { ignore_index = 3 }):item(), 1e-6)
  end)

  it("is 0 with a gradient of 0 when no target counts", function()
    local logits = qm.randn({ 2, 3 }, { requires_grad = true })
    local loss = qm.cross_entropy(logits, i32({ -100, -100 }))
    assert.equal(0, loss:item())
    loss:backward()
    assert.same({ { 0, 0, 0 }, { 0, 0, 0 } }, logits.grad:totable())
  end)

  for dtype, tolerance in pairs({ f32 = 2e-6, bf16 = 2 ^ -8, f16 = 2 ^ -10 }) do
    it("equals the reference in " .. dtype .. ", on odd sizes, with its gradient", function()
      for _, shape in ipairs({ { 1, 1 }, { 3, 5 }, { 17, 512 }, { 5, 1025 }, { 2, 40001 } }) do
        local logits = qm.randn(shape, { device = "reference" }, 0, 5):to(dtype)
        local targets = random_targets(shape[1], shape[2], -7)
        for _, move in ipairs({ false, testing.shifted }) do
          local function losses_and_gradient(x, y)
            -- Sums of rows that lie otherwise may round otherwise.
            local function copy() return move and x.device ~= targets.device and move(x) or x:clone() end
            local losses, dx = qm.empty({ shape[1] }, { device = x.device }), copy()
            local function run(from, out, gradient)
              binding.check(binding.lib.qm_cross_entropy(from.desc, y.desc, nil, out.desc, gradient and gradient.desc,
                0.5, -7, shape[2]), "loss")
            end
            run(x, losses, dx)
            local losses_alone, in_place = qm.empty({ shape[1] }, { device = x.device }), copy()
            run(in_place, losses_alone)
            testing.assert_equal(losses, losses_alone, "with and without the gradient")
            run(in_place, losses_alone, in_place)
            testing.assert_equal(dx, in_place, "the gradient in place of the logits")
            return losses, dx
          end
          local expected, actual = testing.both({ logits, targets }, losses_and_gradient, move)
          testing.assert_close(expected[1], actual[1], 2e-6, "losses")
          testing.assert_close(expected[2], actual[2], tolerance, "gradients")
        end
      end
    end)
  end

  it("multiplies the gradient by a factor that lies on the device", function()
    for _, device in ipairs({ "reference", testing.device }) do
      local logits, targets = qm.randn({ 3, 7 }, { device = device }), i32({ 6, -100, 0 }, device)
      local losses, once, thrice = qm.empty({ 3 }, { device = device }), logits:clone(), logits:clone()
      local factor = qm.full({}, 3, { device = device })
      local run = binding.lib.qm_cross_entropy
      binding.check(run(once.desc, targets.desc, nil, losses.desc, once.desc, 1.5, -100, 7), "loss")
      binding.check(run(thrice.desc, targets.desc, factor.desc, losses.desc, thrice.desc, 0.5, -100, 7), "loss")
      testing.assert_close(once, thrice, 1e-6)
    end
  end)

  it("stands logits of hundreds, and classes that are ruled out by minus infinity", function()
    local low = -1 / 0
    local rows = { { 500, 400, low }, { low, low, 3 }, { -900, -901, low } }
    for _, device in ipairs({ "reference", testing.device }) do
      local logits = qm.tensor(rows, { device = device }):requires_gradient()
      local loss = qm.cross_entropy(logits, i32({ 0, 2, 1 }, device))
      assert.near((1 + math.log(1 + math.exp(-1))) / 3, loss:item(), 1e-5)
      loss:backward()
      local share = 1 / (1 + math.exp(1))
      assert.near((share - 1) / 3, logits.grad:at(3, 2), 1e-6)
      assert.equal(0, logits.grad:at(3, 3))
    end
  end)

  it("shows NaN among the logits as a loss of NaN, wherever it stands", function()
    for _, device in ipairs({ "reference", testing.device }) do
      for _, at in ipairs({ 1, 600, 1200 }) do
        local row = {}
        for i = 1, 1200 do row[i] = i == at and 0 / 0 or (at == 600 and i < 600 and -1 / 0) or 1 end
        local loss = qm.cross_entropy(qm.tensor({ row }, { device = device }), i32({ 1100 }, device)):item()
        assert.is_true(loss ~= loss)
      end
    end
  end)

  it("has the gradient that central differences show", function()
    local logits = qm.randn({ 3, 5 }, { device = "reference", requires_grad = true })
    local targets = i32({ 4, -100, 0 }, "reference")
    testing.check_gradients(function(x) return qm.cross_entropy(x, targets) end, { logits })
  end)

  it("says what is wrong", function()
    local logits = qm.ones({ 2, 3 })
    for _, class in ipairs({ 3, -1 }) do
      testing.assert_refused_late(function() qm.cross_entropy(logits, i32({ 0, class })) end,
        "qm.cross_entropy: argument 'targets': expected classes from 0 to 2, or -100, got " .. class .. " at 1",
        ("cross_entropy: index %d is outside 0 .. 2"):format(class))
    end
    assert.error_matches(function() qm.cross_entropy(logits, i32({ 0 })) end,
      "argument 'targets': expected i32 [R=2], got qm.Tensor i32 [1]", 1, true)
    assert.error_matches(function() qm.cross_entropy(logits, qm.ones({ 2 })) end,
      "argument 'targets': expected i32 [R=2], got qm.Tensor f32 [2]", 1, true)
    assert.error_matches(function() qm.cross_entropy(logits, i32({ 0, 1 }), { ignore = 1 }) end,
      "unknown option 'ignore'", 1, true)
  end)
end)

describe("qm.linear_cross_entropy", function()
  ---Loss and gradients by way of all logits.
  local function unfused(x, weight, targets, transposed)
    return qm.cross_entropy(qm.matmul(x, weight, { trans_b = transposed }), targets)
  end

  for _, transposed in ipairs({ false, true }) do
    local form = transposed and "[V, C]" or "[C, V]"

    it("equals cross_entropy of linear at every chunk size, weight " .. form, function()
      local rows, channels, classes = 13, 7, 37
      local weight_shape = transposed and { classes, channels } or { channels, classes }
      local x, weight = qm.randn({ rows, channels }), qm.randn(weight_shape)
      local targets = random_targets(rows, classes, -100):to(testing.device)
      local plain_x, plain_weight = x:clone():requires_gradient(), weight:clone():requires_gradient()
      local plain = unfused(plain_x, plain_weight, targets, transposed)
      plain:backward(qm.full({}, 3))
      for _, chunk_rows in ipairs({ 1, 4, 6, 12, 13, 14, 1000 }) do
        local own_x, own_weight = x:clone():requires_gradient(), weight:clone():requires_gradient()
        local loss = qm.linear_cross_entropy(own_x, own_weight, targets,
          { chunk_rows = chunk_rows, transposed = transposed })
        assert.near(plain:item(), loss:item(), 1e-5)
        loss:backward(qm.full({}, 3))
        testing.assert_close(plain_x.grad, own_x.grad, 1e-5)
        testing.assert_close(plain_weight.grad, own_weight.grad, 1e-5)
      end
    end)

    it("has the gradient that central differences show, weight " .. form, function()
      local options = { device = "reference", requires_grad = true }
      local x, weight = qm.randn({ 5, 3 }, options), qm.randn(transposed and { 7, 3 } or { 3, 7 }, options)
      local targets = i32({ 6, 2, -100, 0, 2 }, "reference")
      testing.check_gradients(function(a, b)
        return qm.linear_cross_entropy(a, b, targets, { chunk_rows = 2, transposed = transposed })
      end, { x, weight })
    end)
  end

  for _, types in ipairs({ { "f32", "f32", 1e-5 }, { "bf16", "f32", 2 ^ -7 }, { "bf16", "bf16", 2 ^ -6 } }) do
    it(("counts odd numbers of classes only, %s with %s weights"):format(types[1], types[2]), function()
      local rows, channels, classes = 21, 16, 259 -- rows of logits are made longer
      local x, weight = qm.randn({ rows, channels }):to(types[1]), qm.randn({ classes, channels }):to(types[2])
      local targets = random_targets(rows, classes, -100):to(testing.device)
      local plain_x, plain_weight = x:clone():requires_gradient(), weight:to(types[1]):requires_gradient()
      local own_x, own_weight = x:clone():requires_gradient(), weight:clone():requires_gradient()
      local plain = unfused(plain_x, plain_weight, targets, true)
      local own = qm.linear_cross_entropy(own_x, own_weight, targets, { chunk_rows = 8, transposed = true })
      assert.near(plain:item(), own:item(), types[3] * plain:item())
      plain:backward()
      own:backward()
      assert.same({ classes, channels }, own_weight.grad.shape)
      testing.assert_close(plain_x.grad, own_x.grad, types[3])
      testing.assert_close(plain_weight.grad, own_weight.grad, types[3])
      testing.assert_refused_late(function()
        qm.linear_cross_entropy(own_x, own_weight, qm.full({ rows }, classes, { dtype = "i32" }), { transposed = true })
      end, "expected classes from 0 to 258, or -100, got 259 at 0", "cross_entropy: index 259 is outside 0 .. 258")
    end)
  end

  it("takes bf16 activations with f32 weights, whose gradient sums in f32", function()
    local x, weight = qm.randn({ 33, 16 }):to("bf16"), qm.randn({ 16, 50 }, nil, 0, 0.3)
    local targets = random_targets(33, 50, -100):to(testing.device)
    local plain_x, plain_weight = x:to("f32"):requires_gradient(), weight:to("bf16"):to("f32"):requires_gradient()
    local plain = unfused(plain_x, plain_weight, targets)
    plain:backward()
    local own_x, own_weight = x:clone():requires_gradient(), weight:clone():requires_gradient()
    local loss = qm.linear_cross_entropy(own_x, own_weight, targets, { chunk_rows = 10 })
    -- Logits and their gradients are rounded to bf16: 2^-9 of each.
    assert.near(plain:item(), loss:item(), 2 ^ -8 * plain:item())
    loss:backward()
    assert.equal("f32", own_weight.grad.dtype)
    testing.assert_close(plain_weight.grad, own_weight.grad, 0.02)
    testing.assert_close(plain_x.grad, own_x.grad, 0.02)
  end)

  it("hands gradients on to what x and the weight came from, and adds to those that are there", function()
    local x, inner, weight = qm.randn({ 4, 3 }), qm.randn({ 3, 3 }), qm.randn({ 3, 6 })
    local targets = i32({ 5, 0, 1, 2 })
    local plain, fused = inner:clone():requires_gradient(), inner:clone():requires_gradient()
    local plain_weight, fused_weight = weight:clone():requires_gradient(), weight:clone():requires_gradient()
    for _ = 1, 2 do
      unfused(qm.matmul(x, plain), qm.matmul(plain, plain_weight), targets):backward()
      qm.linear_cross_entropy(qm.matmul(x, fused), qm.matmul(fused, fused_weight), targets):backward()
    end
    testing.assert_close(plain.grad, fused.grad, 1e-5)
    testing.assert_close(plain_weight.grad, fused_weight.grad, 1e-5)
  end)

  it("computes no gradient that nobody needs, and keeps no memory", function()
    local device = qm.device(testing.device)
    local x, weight, targets = qm.randn({ 64, 8 }), qm.randn({ 8, 100 }):requires_gradient(), i32((function()
      local classes = {}
      for i = 1, 64 do classes[i] = i end
      return classes
    end)())
    collectgarbage() collectgarbage() collectgarbage("stop")
    local before = device:memory().live_bytes
    qm.no_grad(qm.linear_cross_entropy, x, weight, targets):free()
    assert.equal(before, device:memory().live_bytes)
    local loss = qm.linear_cross_entropy(x, weight, targets)
    -- The loss and the weight's gradient, and none for x.
    local kept = device:memory().live_bytes - before
    assert.is_true(kept >= 8 * 100 * 4 and kept < 8 * 100 * 4 + 64 * 8 * 4, tostring(kept))
    loss:backward()
    loss:free()
    assert.is_nil(x.grad)
    weight:zero_grad()
    assert.equal(before, device:memory().live_bytes)
    collectgarbage("restart")
  end)

  it("takes no rows, and rows that do not count", function()
    local x, weight = qm.randn({ 0, 3 }):requires_gradient(), qm.randn({ 3, 4 }):requires_gradient()
    local loss = qm.linear_cross_entropy(x, weight, qm.empty({ 0 }, { dtype = "i32" }))
    assert.equal(0, loss:item())
    loss:backward()
    assert.same({ 0, 3 }, x.grad.shape)
    for _, row in ipairs(weight.grad:totable()) do assert.same({ 0, 0, 0, 0 }, row) end
    local idle = qm.linear_cross_entropy(qm.randn({ 2, 3 }), weight, i32({ -100, -100 }))
    assert.equal(0, idle:item())
  end)

  it("says what is wrong", function()
    local x, weight, targets = qm.ones({ 2, 3 }), qm.ones({ 3, 4 }), i32({ 0, 1 })
    local function refuses(sentence, ...)
      local arguments = { ... }
      assert.error_matches(function() qm.linear_cross_entropy(unpack(arguments, 1, 4)) end,
        "qm.linear_cross_entropy: " .. sentence, 1, true)
    end
    refuses("argument 'weight': expected float [V, C=3], got qm.Tensor f32 [3, 4]", x, weight, targets,
      { transposed = true })
    refuses("argument 'weight': expected float [C=3, V], got qm.Tensor f32 [3]", x, qm.ones({ 3 }), targets)
    refuses("argument 'x': expected float [R, C], got qm.Tensor f32 [2]", qm.ones({ 2 }), weight, targets)
    testing.assert_refused_late(function() qm.linear_cross_entropy(x, weight, i32({ 0, 4 })) end,
      "qm.linear_cross_entropy: argument 'targets': expected classes from 0 to 3, or -100, got 4 at 1",
      "cross_entropy: index 4 is outside 0 .. 3")
    refuses("argument 'targets': expected a tensor, got nothing", x, weight, nil)
    refuses("argument 'chunk_rows': expected an integer of at least 1, got number 0", x, weight, targets,
      { chunk_rows = 0 })
  end)
end)
