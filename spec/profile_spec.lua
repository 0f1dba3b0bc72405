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

  it("stops booking after an error in the body", function()
    assert.error(function() qm.profile(function() error("oops") end) end)
    qm.zeros({ 1 })
    local profile = qm.profile(function() end)
    assert.equal(0, #profile.kernels)
  end)
end)
