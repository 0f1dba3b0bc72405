#!/usr/bin/env -S bin/quartermoon
-- Causal attention, forward and with its gradient, in TFLOP/s:
--
--   bin/quartermoon scripts/bench/attention.lua [--device cuda] [--tokens 16384] [--width 2048]
--
-- FLOPs are counted as 4 B H T T D / 2 forward (half of the square is masked) and 3.5 times that with
-- the gradient, as is usual. Beside them a matrix product of the same device in the same run.
local qm = require("quartermoon")

local o = qm.options.parse(arg, {
  { "device", "", "cpu, cuda ...; the default is $QM_DEVICE or cpu" },
  { "dtype", "bf16", "element type" },
  { "tokens", 16384, "rows in all: sequences times their length" },
  { "width", 2048, "heads times head size" },
  { "repeats", 10, "timed calls" },
})
if o.device ~= "" then qm.set_default_device(o.device) end
local device = qm.default_device()

local CALLS = device.name == "cuda" and 4 or 1

---Median seconds of one call, so many of which run as one graph: launches are not what is measured.
local function time(call)
  local graph = qm.graph(function()
    for _ = 1, CALLS do qm.scope(call) end
  end, { warmup = 1 })
  local seconds = {}
  for i = 1, o.repeats + 2 do
    device:sync()
    local start = qm.clock.now()
    graph()
    device:sync()
    if i > 2 then seconds[#seconds + 1] = (qm.clock.now() - start) / CALLS end
  end
  graph:free()
  table.sort(seconds)
  return seconds[math.ceil(#seconds / 2)]
end

local function ceiling()
  local n = device.name == "cuda" and 8192 or 1024
  local a, b = qm.randn({ n, n }, { dtype = o.dtype }), qm.randn({ n, n }, { dtype = o.dtype })
  local rate = 2 * n ^ 3 / time(function() qm.no_grad(qm.matmul, a, b):free() end)
  a:free()
  b:free()
  return rate
end

local rate = ceiling()
print(("matrix product: %.1f TFLOP/s"):format(rate / 1e12))
print("length  head  heads/kv   forward TFLOP/s      with gradient TFLOP/s")
for _, head in ipairs({ 128, 64 }) do
  for _, length in ipairs({ 1024, 2048, 4096, 8192 }) do
    local sequences = o.tokens / length
    for _, shared in ipairs({ 1, 4 }) do
      local heads = o.width / head
      if sequences < 1 or heads < shared then goto continue end
      local cu = {}
      for s = 0, sequences do cu[s + 1] = s * length end
      local offsets = qm.tensor(cu, { dtype = "i32" })
      local function leaf(h)
        return qm.randn({ o.tokens, h, head }, { dtype = o.dtype }):requires_gradient()
      end
      local q, k, v, dout = leaf(heads), leaf(heads / shared), leaf(heads / shared), leaf(heads)
      local flops = 4 * sequences * heads * length ^ 2 * head / 2
      local forward = time(function() qm.no_grad(qm.attention, q, k, v, offsets, offsets):free() end)
      local both = time(function()
        qm.attention(q, k, v, offsets, offsets):backward(dout)
        for _, x in ipairs({ q, k, v }) do x:zero_grad() end
      end)
      print(("%6d  %4d   %3d/%-3d   %7.1f (%2.0f %%)       %7.1f (%2.0f %%)"):format(length, head, heads,
        heads / shared, flops / forward / 1e12, 100 * flops / forward / rate, 3.5 * flops / both / 1e12,
        350 * flops / both / rate))
      for _, x in ipairs({ q, k, v, dout, offsets }) do x:free() end
      ::continue::
    end
  end
end
