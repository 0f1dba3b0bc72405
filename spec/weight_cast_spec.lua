-- f32 weights under 16-bit activations: the copy that products run on follows every change of the weight.
local qm = require("quartermoon")
local testing = require("spec.support.testing")

local function random(...) return qm.randn({ ... }, { device = testing.device }) end

---What qm.linear gives with a copy of the weight that is made on the spot.
local function expected(x, w) return qm.no_grad(function() return qm.matmul(x, w:to("bf16")) end) end

describe("the 16-bit copy of a parameter", function()
  local changes = {
    fill = function(w) w:fill(2) end,
    ["add_"] = function(w) w:add_(w:clone(), 0.5) end,
    ["mul_"] = function(w) w:mul_(3) end,
    copy = function(w) w:copy(random(8, 6)) end,
    ["a view's copy"] = function(w) qm.no_grad(function() w:narrow(3, 2):copy(random(2, 6)) end) end,
    ["another tensor on its memory"] = function(w) w:share():mul_(-1) end,
    ["qm.adamw"] = function(w) qm.adamw(w, random(8, 6), w:zeros_like(), w:zeros_like(), { step = 1, lr = 1 }) end,
    ["another device's copy"] = function(w) w:copy(qm.randn({ 8, 6 }, { device = "reference" })) end,
  }
  for name, change in pairs(changes) do
    it("follows " .. name, function()
      local w, x = random(8, 6):requires_gradient(), random(4, 8):to("bf16")
      testing.assert_equal(expected(x, w), qm.linear(x, w))
      local before = w:bytes()
      change(w)
      assert.not_equal(before, w:bytes())
      testing.assert_equal(expected(x, w), qm.linear(x, w))
    end)
  end

  it("is made once for forward, backward and whatever comes before the next change", function()
    local w, x = random(8, 6):requires_gradient(), random(4, 8):to("bf16"):requires_gradient()
    local function copies(body)
      for _, kernel in ipairs(qm.profile(body).kernels) do
        if kernel.name == "copy" then return kernel.calls end
      end
      return 0
    end
    local dout = random(4, 6):to("bf16")
    assert.equal(1, copies(function()
      qm.linear(x, w):backward(dout)
      qm.no_grad(qm.linear, x, w)
    end))
    w:mul_(2)
    assert.equal(1, copies(function() qm.linear(x, w):backward(dout) end))
  end)

  it("goes with its parameter, and a weight that is none keeps no copy", function()
    local x = random(4, 8):to("bf16")
    collectgarbage()
    collectgarbage()
    local live = x.device:memory().live_bytes
    local w = random(8, 6):requires_gradient()
    qm.linear(x, w):free()
    w:free()
    assert.equal(live, x.device:memory().live_bytes)
    local plain = random(8, 6)
    qm.linear(x, plain):free()
    assert.is_nil(plain.casts)
  end)

  it("follows replayed graphs, and graphs follow plain changes", function()
    local w, x = random(8, 6):requires_gradient(), random(4, 8):to("bf16")
    local delta = random(8, 6)
    local step = qm.graph(function()
      local y = qm.no_grad(qm.linear, x, w)
      w:add_(delta)
      return y
    end, { device = testing.device })
    for i = 1, 8 do
      local before = expected(x, w)
      testing.assert_equal(before, step(), "call " .. i)
      if i % 2 == 0 then testing.assert_equal(expected(x, w), qm.no_grad(qm.linear, x, w), "after call " .. i) end
      if i == 5 then w:mul_(0.5) end
    end
    step:free()
  end)
end)
