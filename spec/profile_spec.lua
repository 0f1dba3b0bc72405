local qm = require("quartermoon")

describe("qm.profile", function()
  it("books every kernel with its calls, and returns what the body returns", function()
    local profile, value = qm.profile(function()
      for _ = 1, 3 do qm.zeros({ 5 }) end
      return "done"
    end)
    assert.equal("done", value)
    assert.equal("fill", profile.kernels[1].name)
    assert.equal(3, profile.kernels[1].calls)
    assert.is_true(profile:share({ "fill" }) > 0 and profile:share({ "fill" }) <= 1)
    assert.equal(0, profile:share({ "gemm" }))
    assert.matches("outside kernels", tostring(profile))
  end)

  it("knows what must be moved and computed", function()
    local a, b = qm.randn({ 40, 30 }), qm.randn({ 30, 20 })
    local index, out = qm.tensor({ 1, 1, 3 }, { dtype = "i32" }), qm.zeros({ 40, 20 })
    local profile = qm.profile(function()
      for _ = 1, 2 do qm.matmul(a, b) end
      qm.gather(a, index)
      out:add_(out:clone(), 2)
    end)
    local found = {}
    for _, kernel in ipairs(profile.kernels) do found[kernel.name] = kernel end
    assert.equal(2 * 2 * 40 * 30 * 20, found.gemm.flops)
    assert.equal(2 * 4 * (40 * 30 + 30 * 20 + 40 * 20), found.gemm.bytes)
    assert.equal(4 * (2 * 3 * 30 + 3), found.gather.bytes)
    assert.equal(0, found.gather.flops)
    assert.equal(4 * 3 * 800, found.accumulate.bytes)
    assert.matches("gemm +2 .*%%", tostring(profile))
  end)

  it("books a replayed graph as one operation, with the work of its calls", function()
    local g = qm.graph(function(x) return qm.matmul(x, x) + x end, { warmup = 0 })
    local x = qm.randn({ 16, 16 })
    g(x)
    local profile = qm.profile(function() g(x) end)
    local found
    for _, kernel in ipairs(profile.kernels) do if kernel.name == "graph" then found = kernel end end
    assert.equal(1, found.calls)
    assert.equal(2 * 16 ^ 3, found.flops)
    assert.equal(2 * 3 * 4 * 256, found.bytes)
  end)

  it("stops booking after an error in the body", function()
    assert.error(function() qm.profile(function() error("oops") end) end)
    qm.zeros({ 1 })
    local profile = qm.profile(function() end)
    assert.equal(0, #profile.kernels)
  end)
end)
