local qm = require("quartermoon")
local testing = require("spec.support.testing")

---A gradient with singular values 2^-0.5, 2^-1, ...: the subspaces are well apart.
local function decaying(rows, columns, factor)
  local r = math.min(rows, columns)
  local u, v = qm.qr(qm.randn({ rows, r })), qm.qr(qm.randn({ columns, r }))
  local scales = {}
  for i = 1, r do scales[i] = (factor or 2 ^ -0.5) ^ i end
  return qm.matmul(u * qm.tensor(scales), v, { trans_b = true })
end

local function identity(n)
  local rows = {}
  for i = 1, n do
    rows[i] = {}
    for j = 1, n do rows[i][j] = i == j and 1 or 0 end
  end
  return qm.tensor(rows)
end

---The projection onto a projector's subspace: A A^T or B^T B.
local function onto(projector)
  if projector.left then return qm.matmul(projector.left, projector.left, { trans_b = true }) end
  return qm.matmul(projector.right, projector.right, { trans_a = true })
end

local SHAPES = { tall = { 29, 13 }, wide = { 11, 37 }, square = { 16, 16 } }
-- proj_type, shape, shape of the low-rank gradient at rank 4
local CASES = {
  { "std", "tall", { 29, 4 } }, { "std", "wide", { 4, 37 } }, { "std", "square", { 16, 4 } },
  { "reverse_std", "tall", { 4, 13 } }, { "reverse_std", "wide", { 11, 4 } }, { "reverse_std", "square", { 4, 16 } },
  { "right", "tall", { 29, 4 } }, { "right", "wide", { 11, 4 } },
  { "left", "tall", { 4, 13 } }, { "left", "wide", { 4, 37 } },
  { "full", "tall", { 4, 4 } }, { "full", "wide", { 4, 4 } },
}

describe("qm.projector.galore", function()
  for _, method in ipairs({ "svd", "randomized" }) do
    for _, case in ipairs(CASES) do
      local proj_type, shape, low_shape = case[1], SHAPES[case[2]], case[3]
      it(("projects %s gradients, type %s, method %s"):format(case[2], proj_type, method), function()
        local grad = decaying(shape[1], shape[2])
        local projector = qm.projector.galore({ rank = 4, proj_type = proj_type, method = method, scale = 0.5 })
        local low = projector:project(grad, 0)
        assert.same(low_shape, low.shape)
        if projector.left then
          testing.assert_close(identity(4), qm.matmul(projector.left, projector.left, { trans_a = true }), 2e-6)
        end
        if projector.right then
          testing.assert_close(identity(4), qm.matmul(projector.right, projector.right, { trans_b = true }), 2e-6)
        end
        local back = projector:project_back(low)
        assert.same(shape, back.shape)
        -- What the best rank-4 approximation leaves out is sum of sigma_i^2 over i > 4, here
        -- (2^-5 - 2^-(r + 1)) / (1 - 2^-1); the rest is kept, and scaled by a half.
        local kept = qm.sum_squares(back):item() * 4
        local total = qm.sum_squares(grad):item()
        local r = math.min(shape[1], shape[2])
        local lost = (2 ^ -5 - 2 ^ -(r + 1)) * 2
        assert.near(total - lost, kept, 1e-3 * total)
        testing.assert_close(back * 2, projector:project_back(projector:project(back * 2, 1)) * 2, 1e-5)
      end)
    end
  end

  it("finds by sketch the subspace that the SVD finds, in the same order", function()
    for _, shape in pairs(SHAPES) do
      local grad = decaying(shape[1], shape[2], 0.5)
      local options = { rank = 5, method = "svd" }
      local exact = qm.projector.galore(options)
      options.method = "randomized"
      local sketched = qm.projector.galore(options)
      local a, b = exact:project(grad, 0), sketched:project(grad, 0)
      testing.assert_close(onto(exact), onto(sketched), 1e-3)
      testing.assert_close(exact:project_back(a), sketched:project_back(b), 1e-4)
      -- Direction by direction, but for the sign.
      local one, other = exact.right or exact.left:transpose(), sketched.right or sketched.left:transpose()
      testing.assert_close(identity(5), qm.abs(qm.matmul(one, other, { trans_b = true })), 2e-3)
    end
  end)

  it("keeps everything at full rank", function()
    for _, proj_type in ipairs({ "std", "reverse_std", "right", "left", "full" }) do
      -- reverse_std at [5, 7] and rank 5 has a square low-rank gradient.
      for _, shape in ipairs({ { 5, 7 }, { 7, 5 }, { 6, 6 }, { 1, 4 } }) do
        local grad = qm.randn(shape)
        local projector = qm.projector.galore({ rank = 100, proj_type = proj_type })
        local r = math.min(shape[1], shape[2])
        local back = projector:project_back(projector:project(grad, 0))
        -- One side of a long matrix spans the short one's space, which holds the gradient.
        testing.assert_close(grad, back, 1e-5, proj_type .. " of rank " .. r)
      end
    end
  end)

  it("refreshes at steps 0, gap, 2 gap ... and when it has nothing yet", function()
    local projector = qm.projector.galore({ rank = 2, update_proj_gap = 3 })
    local counts = {}
    for step = 1, 7 do
      projector:project(qm.randn({ 6, 5 }), step):free()
      counts[step] = projector.refreshes
    end
    assert.same({ 1, 1, 2, 2, 2, 3, 3 }, counts)
  end)

  it("does not refresh from a gradient with NaN, but from the next one", function()
    local projector = qm.projector.galore({ rank = 2, update_proj_gap = 2 })
    local bad = qm.randn({ 6, 5 })
    bad:narrow(2, 1):fill(1 / 0)
    assert.error_matches(function() projector:project(bad, 0) end,
      "projector:project: argument 'grad': expected finite values in the first gradient", 1, true)
    projector:project(qm.randn({ 6, 5 }), 1)
    local before = projector.right:bytes()
    projector:project(bad, 2)
    assert.equal(before, projector.right:bytes())
    assert.equal(1, projector.refreshes)
    projector:project(qm.randn({ 6, 5 }), 3)
    assert.equal(2, projector.refreshes)
    projector:project(qm.randn({ 6, 5 }), 5)
    assert.equal(2, projector.refreshes)
  end)

  it("stores matrices in the gradient's type, and brings back the type it is given", function()
    local projector = qm.projector.galore({ rank = 3 })
    local grad = decaying(20, 9)
    local low = projector:project(grad:to("bf16"), 0)
    assert.equal("bf16", low.dtype)
    assert.equal("bf16", projector.right.dtype)
    local back = projector:project_back(low:to("f32"))
    assert.equal("f32", back.dtype)
    local exact = qm.projector.galore({ rank = 3, method = "svd" })
    testing.assert_close(exact:project_back(exact:project(grad, 0)), back, 0.03)
  end)

  it("projects with the matrices it is given, by hand", function()
    local grad = qm.tensor({ { 1, 2, 3 }, { 4, 5, 6 } })
    local right = qm.projector.galore({ rank = 1, proj_type = "right", scale = 2 })
    right:inject({ right = qm.tensor({ { 0, 0.6, 0.8 } }) })
    local low = right:project(grad, 0)
    testing.assert_close(qm.tensor({ { 3.6 }, { 7.8 } }), low, 1e-6)
    testing.assert_close(qm.tensor({ { 0, 4.32, 5.76 }, { 0, 9.36, 12.48 } }), right:project_back(low), 1e-6)
    local full = qm.projector.galore({ rank = 1, proj_type = "full" })
    full:inject({ left = qm.tensor({ { 1 }, { 0 } }), right = qm.tensor({ { 0, 1, 0 } }) })
    assert.same({ { 2 } }, full:project(grad, 200):totable())
    assert.same({ { 0, 3, 0 }, { 0, 0, 0 } }, full:project_back(qm.tensor({ { 3 } })):totable())
    assert.equal(0, full.refreshes)
  end)

  it("draws the same sketch again after a restart", function()
    local grads = {}
    for step = 1, 6 do grads[step] = qm.randn({ 19, 23 }) end
    local options = { rank = 4, update_proj_gap = 2, seed = 7, power_iterations = 0, proj_type = "full" }
    local whole = qm.projector.galore(options)
    for step = 1, 6 do whole:project(grads[step], step - 1) end
    local first = qm.projector.galore(options)
    for step = 1, 3 do first:project(grads[step], step - 1) end
    local state = first:state()
    local second = qm.projector.galore(options)
    second:load_state(state)
    first:free()
    local low
    for step = 4, 6 do low = second:project(grads[step], step - 1) end
    testing.assert_equal(whole.left, second.left)
    testing.assert_equal(whole.right, second.right)
    testing.assert_equal(whole:project_back(low), second:project_back(low))
    assert.equal(whole.refreshes, second.refreshes)
    local other = qm.projector.galore({ rank = 4, seed = 8, power_iterations = 0, proj_type = "full" })
    other:project(grads[5], 0)
    assert.not_equal(whole.left:bytes(), other.left:bytes())
  end)

  it("keeps no memory but its matrices", function()
    local device = qm.device(testing.device)
    local grad = qm.randn({ 31, 17 })
    collectgarbage() collectgarbage() collectgarbage("stop")
    local before = device:memory().live_count
    for _, proj_type in ipairs({ "std", "reverse_std", "left", "right", "full" }) do
      local projector = qm.projector.galore({ rank = 4, proj_type = proj_type, update_proj_gap = 2 })
      for step = 0, 5 do
        local low = projector:project(grad, step)
        projector:project_back(low):free()
        low:free()
      end
      assert.equal(before + (proj_type == "full" and 2 or 1), device:memory().live_count)
      projector:free()
      assert.equal(before, device:memory().live_count)
    end
    collectgarbage("restart")
  end)

  it("survives a scope that ends around it", function()
    local projector, grad = qm.projector.galore({ rank = 2 }), qm.randn({ 6, 5 })
    qm.scope(function() projector:project(grad, 0) end)
    assert.same({ 6, 5 }, projector:project_back(projector:project(grad, 1)).shape)
  end)

  it("says what is wrong", function()
    local function refuses(sentence, fn, ...)
      local arguments = { ... }
      assert.error_matches(function() fn(unpack(arguments)) end, sentence, 1, true)
    end
    refuses("qm.projector.galore: option 'rank' is needed", qm.projector.galore, {})
    refuses("argument 'rank': expected an integer of at least 1, got number 0", qm.projector.galore, { rank = 0 })
    refuses("unknown option 'proj_typ', did you mean 'proj_type'?", qm.projector.galore, { rank = 1, proj_typ = "std" })
    refuses("argument 'proj_type': expected one of 'std', 'reverse_std'", qm.projector.galore,
      { rank = 1, proj_type = "up" })
    local projector = qm.projector.galore({ rank = 2 })
    refuses("projector:project_back: there is no projection yet", projector.project_back, projector, qm.ones({ 2, 2 }))
    refuses("argument 'grad': expected float [K, N], got qm.Tensor f32 [3]", projector.project, projector,
      qm.ones({ 3 }), 0)
    refuses("argument 'step': expected an integer of at least 0, got number -1", projector.project, projector,
      qm.ones({ 3, 3 }), -1)
    projector:project(qm.randn({ 5, 4 }), 0)
    refuses("expected f32 [N, K=3], got f32 [2, 4]", projector.project, projector, qm.ones({ 3, 3 }), 1)
    refuses("projector:inject: expected a left or a right matrix", projector.inject, projector,
      { left = qm.ones({ 2, 2 }), right = qm.ones({ 2, 2 }) })
  end)
end)
