-- gemm.lua - TFLOP/s of a linear layer's three matrix products, and of the loss with its output layer.
--
--   bin/quartermoon scripts/bench/gemm.lua [rows] [channels] [features] [classes]
--
-- Targets, on two cores with AMX, bf16: 2 TFLOP/s forward and to x, 1.7 to the weight.

local binding = require("quartermoon.ffi")
local qm = require("quartermoon")

local rows, channels = tonumber(arg[1]) or 4096, tonumber(arg[2]) or 256
local features, classes = tonumber(arg[3]) or 768, tonumber(arg[4]) or 32000

---The shortest of several runs, in seconds.
local function best(count, body)
  local shortest = math.huge
  for _ = 1, count do
    local started = qm.clock.now()
    body()
    qm.default_device():sync()
    shortest = math.min(shortest, qm.clock.now() - started)
  end
  return shortest
end

local function report(what, operations, seconds)
  print(("%-28s %10.3f ms  %6.3f TFLOP/s"):format(what, seconds * 1e3, operations / seconds * 1e-12))
end

local function product(what, a, b, out, trans_a, trans_b, beta)
  report(what, 2 * rows * channels * features, best(20, function()
    binding.check(binding.lib.qm_gemm(a.desc, b.desc, out.desc, trans_a, trans_b, 1, beta), what)
  end))
end

print(qm.default_device():info().description)
for _, dtype in ipairs({ "bf16", "f32" }) do
  qm.scope(function()
    local x, weight = qm.randn({ rows, channels }):to(dtype), qm.randn({ channels, features }):to(dtype)
    local y, gradient = qm.randn({ rows, features }):to(dtype), qm.zeros({ channels, features })
    print(("%s: x [%d, %d], weight [%d, %d]"):format(dtype, rows, channels, channels, features))
    product("  y = x w", x, weight, y, 0, 0, 0)
    product("  dx = dy w^T", y, weight, x, 0, 1, 0)
    product("  dw = dw + x^T dy, f32", x, y, gradient, 1, 0, 1)
  end)
end

local x = qm.randn({ rows, channels }):to("bf16"):requires_gradient()
local head = qm.randn({ channels, classes }, nil, 0, 0.02):requires_gradient()
local ids = {}
for i = 1, rows do ids[i] = i * 7919 % classes end
local targets = qm.tensor(ids, { dtype = "i32" })
print(("bf16: linear_cross_entropy, weight [%d, %d]"):format(channels, classes))
report("  loss", 2 * rows * channels * classes, best(3, function()
  qm.no_grad(qm.linear_cross_entropy, x, head, targets):free()
end))
report("  loss and gradients", 6 * rows * channels * classes, best(3, function()
  local loss = qm.linear_cross_entropy(x, head, targets)
  loss:backward()
  loss:free()
  x:zero_grad()
  head:zero_grad()
end))
