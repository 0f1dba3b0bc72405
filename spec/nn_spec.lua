local qm = require("quartermoon")
local testing = require("spec.support.testing")
local nn = qm.nn

describe("qm.nn modules", function()
  local Pair = nn.class("Pair")
  function Pair.new(shared)
    local self = nn.create(Pair)
    self:register("first", nn.Linear.new(2, 3))
    self:register("layers", nn.List.new({ nn.RMSNorm.new(3), nn.RMSNorm.new(3) }))
    self:register("gain", qm.ones({ 3 }, { requires_grad = true }))
    if shared then self:register("again", self.gain) end
    return self
  end
  function Pair:forward(x) return self.layers[2](self.layers[1](self.first(x))) * self.gain end

  local function names(module)
    local list = {}
    for i, entry in ipairs(module:named_parameters()) do list[i] = entry.name end
    return list
  end

  it("name their parameters in the order of registration, lists from 0", function()
    local pair = Pair.new()
    assert.same({ "first.weight", "layers.0.weight", "layers.1.weight", "gain" }, names(pair))
    assert.equal("layers.1.weight", pair.layers[2].weight.name)
    assert.equal(pair.gain, pair:parameters()[4])
  end)

  it("count a shared parameter once", function()
    assert.equal(4, #Pair.new(true):named_parameters())
    assert.equal(2 * 3 + 3 * 3, Pair.new(true):parameter_count())
  end)

  it("are called, freeze, and lose their gradients", function()
    local pair = Pair.new()
    pair.first:requires_gradient(false)
    pair(qm.randn({ 4, 2 })):sum():backward()
    assert.is_nil(pair.first.weight.grad)
    assert.is_truthy(pair.gain.grad)
    pair:zero_grad()
    assert.is_nil(pair.gain.grad)
  end)

  it("print as a tree, equal members of a list once", function()
    assert.equal("Pair(): 15 weights, 0.1 KiB\n  first: Linear(2 -> 3, f32)\n  layers: List()\n"
      .. "    0 - 1: RMSNorm(3, eps 1e-06)", tostring(Pair.new()))
  end)

  it("refuse what is no parameter, and calls without a forward", function()
    assert.error_matches(function() Pair.new():register("x", 3) end,
      "a tensor, a QParam or a module, got number 3", 1, true)
    assert.error_matches(function() nn.create(nn.class("Empty"))(1) end, "Empty: this class has no forward", 1, true)
  end)
end)

describe("qm.nn layers", function()
  it("Linear is x weight + bias, its weights as spread as asked", function()
    local layer = nn.Linear.new(64, 32, { bias = true, std = 0.5, generator = qm.generator(1) })
    layer.bias:fill(2)
    local x = qm.randn({ 5, 64 })
    testing.assert_close(qm.matmul(x, layer.weight) + 2, layer(x), 1e-5)
    -- The variance of 2048 draws is within 4 standard errors, 4 sqrt(2 / 2048), of 0.25.
    assert.near(0.25, (layer.weight * layer.weight):mean():item(), 0.25 * 4 * math.sqrt(2 / 2048))
    assert.equal(layer.weight:bytes(), nn.Linear.new(64, 32, { std = 0.5, generator = qm.generator(1) }).weight:bytes())
  end)

  it("QLinear is x W for its dequantized weight, and so are its gradients", function()
    local layer = nn.QLinear.new(64, 32, { w_bit = 4, group_size = 32, bias = true })
    local w = layer.weight:dequantize("f32"):requires_gradient()
    local x = qm.randn({ 5, 64 }):requires_gradient()
    local twin = x:clone():requires_gradient()
    local y, expected = layer(x), qm.matmul(twin, w)
    testing.assert_close(expected, y, 1e-5)
    local dy = qm.randn({ 5, 32 })
    y:backward(dy)
    expected:backward(dy)
    testing.assert_close(w.grad, layer.weight.privileged_grad, 1e-5)
    testing.assert_close(twin.grad, x.grad, 1e-5)
    testing.assert_close(dy:sum(1), layer.bias.grad, 1e-5)
  end)

  it("QLinear keeps no dense weight: 4 bits, scales and zero points", function()
    local device = qm.default_device()
    local before = device:memory().live_bytes
    local layer = nn.QLinear.new(128, 64, { w_bit = 4, group_size = 64 })
    -- The allocator hands out whole blocks; a dense weight would be 32 KiB.
    assert.equal(128 * 64 / 2 + 2 * 64 * 2 + 2 * 64 / 2, layer:weight_bytes())
    assert.is_true(device:memory().live_bytes - before < 2 * layer:weight_bytes())
  end)

  it("QLinear's grid spans `range` times its fresh weights", function()
    local function spread(range)
      local layer = nn.QLinear.new(64, 32, { group_size = 64, range = range, generator = qm.generator(2) })
      return layer.weight.scales:to("f32"):mean():item()
    end
    assert.near(2, spread(2) / spread(1), 0.01)
  end)

  it("Embedding gives rows in the activations' type", function()
    local layer = nn.Embedding.new(5, 3, { activations = "bf16" })
    local out = layer(qm.tensor({ 4, 0 }, { dtype = "i32" }))
    assert.equal("bf16", out.dtype)
    testing.assert_equal(layer.weight:narrow(5, 1):to("bf16"), out:narrow(1, 1))
  end)

  it("RMSNorm adds a residual when there is one", function()
    local layer = nn.RMSNorm.new(4)
    local x, residual = qm.randn({ 3, 4 }), qm.randn({ 3, 4 })
    local normed, sum = layer(x, residual)
    testing.assert_equal(x + residual, sum)
    testing.assert_close((layer(sum)), normed, 1e-6)
  end)

  it("Attention reads earlier keys and values from its cache", function()
    local heads, size = 4, 8
    local layer = nn.Attention.new({ hidden_size = 32, heads = heads, kv_heads = 2,
      linear = nn.linear_factory("dense"), qk_norm = true })
    local cos, sin = qm.rope_tables(size, 8)
    local function i32(values) return qm.tensor(values, { dtype = "i32" }) end
    local function context(first, last)
      return { cos = cos, sin = sin, positions = qm.arange(first - 1, last - 1, { dtype = "i32" }),
        cu_q = i32({ 0, last - first + 1 }), cu_k = i32({ 0, last }) }
    end
    local x = qm.randn({ 5, 32 })
    local whole = layer(x, context(1, 5))
    local kept = nn.key_values(5, 2, size, "f32", qm.default_device())
    qm.no_grad(function()
      testing.assert_close(whole:narrow(1, 3), layer(x:narrow(1, 3), context(1, 3), kept), 1e-5)
      testing.assert_close(whole:narrow(4, 2), layer(x:narrow(4, 2), context(4, 5), kept), 1e-5)
    end)
    assert.equal(5, kept.length)
  end)

  it("Block is norm, attention, norm, feed-forward, each added to the stream", function()
    local linear = nn.linear_factory("dense")
    local block = nn.Block.new({ hidden_size = 16, attention = { hidden_size = 16, heads = 2, linear = linear },
      mlp = { hidden_size = 16, intermediate_size = 24, linear = linear } })
    local cos, sin = qm.rope_tables(8, 4)
    local cu = qm.tensor({ 0, 4 }, { dtype = "i32" })
    local context = { cos = cos, sin = sin, positions = qm.arange(0, 3, { dtype = "i32" }), cu_q = cu, cu_k = cu }
    local x, before = qm.randn({ 4, 16 }), qm.randn({ 4, 16 })
    local out, stream = block(x, before, context)
    local first = x + before
    local second = first + block.self_attn((block.input_layernorm(first)), context)
    testing.assert_close(second, stream, 1e-5)
    testing.assert_close(block.mlp((block.post_attention_layernorm(second))), out, 1e-4)
  end)

  it("refuse sizes that make no sense", function()
    assert.error_matches(function() nn.Linear.new(0, 3) end, "qm.nn.Linear: argument 'inputs'", 1, true)
    assert.error_matches(function() nn.QLinear.new(33, 32) end, "K (rows) a multiple of 32", 1, true)
    assert.error_matches(function() nn.QLinear.new(64, 32, { wbit = 4 }) end, "did you mean 'w_bit'", 1, true)
    assert.error_matches(function() nn.linear_factory("sparse") end, "one of 'mpq', 'dense'", 1, true)
  end)
end)
