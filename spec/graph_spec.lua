-- Recorded functions against the same functions run as they stand.
local qm = require("quartermoon")
local graphs = require("quartermoon.graph")
local testing = require("spec.support.testing")

describe("qm.graph", function()
  local device = assert(qm.device(testing.device))
  local function on(shape) return qm.randn(shape, { device = device }) end
  local function live() return device:memory().live_bytes end

  local function mixed(x, y)
    local sum = qm.swiglu(x, y)
    local product = qm.matmul(sum, y, { trans_b = true })
    sum:free()
    return product, product:sum()
  end

  it("gives the function's results, call for call, whatever the arguments hold", function()
    local g = qm.graph(mixed, { device = device })
    for call = 1, 5 do
      local x, y = on({ 7, 33 }), on({ 7, 33 })
      local product, sum = g(x, y)
      local expected, expected_sum = mixed(x, y)
      testing.assert_equal(expected, product, "call " .. call)
      testing.assert_equal(expected_sum, sum)
    end
    assert.matches("qm.Graph of 3 kernel calls", tostring(g))
    g:free()
    assert.error_matches(function() g() end, "this graph was freed")
  end)

  it("takes arguments from another device, and freeing results does no harm", function()
    local g = qm.graph(function(x) return x * 2 end, { warmup = 0, device = device })
    for call = 1, 3 do
      local y = g(qm.full({ 5 }, call, { device = "reference" }))
      assert.equal(2 * call, y:at(5))
      y:free()
    end
  end)

  it("keeps what the recorded calls use, though it was freed, and gives all of it back", function()
    collectgarbage()
    collectgarbage()
    local before, handles = live(), qm.handles_live()
    local weight, x = qm.full({ 100 }, 3, { device = device }), qm.full({ 100 }, 2, { device = device })
    local g = qm.graph(function(input)
      local a = input * weight
      local b = a * weight
      a:free()
      return b
    end, { warmup = 0, device = device })
    local y = g(x)
    weight:free()
    local other = {} -- would get the memory of weight, a and b
    for i = 1, 6 do other[i] = qm.full({ 100 }, 7, { device = device }) end
    y:free()
    y = g(x)
    assert.equal(18, y:at(100))
    for i = 1, 6 do
      assert.equal(7, other[i]:at(1))
      other[i]:free()
    end
    x:free()
    y:free()
    g:free()
    assert.equal(before, live())
    assert.equal(handles, qm.handles_live())
  end)

  it("reuses memory inside a recording", function()
    local function chain(x)
      for _ = 1, 50 do
        local y = x + 1
        x:free()
        x = y
      end
      return x
    end
    local g = qm.graph(function(x) return chain(x:share()) end, { warmup = 0, device = device })
    local y = g(on({ 1000 }))
    assert(tonumber(tostring(g):match("calls, ([%d.]+) MiB")) < 0.05, tostring(g))
    y:free()
    g:free()
  end)

  it("refuses to read, write or wait while recording, and goes on afterwards", function()
    local x = on({ 4 })
    for what, body in pairs({
      ["reading a value back"] = function(input) return input:sum():item() end,
      ["writing to it from the host"] = function() return qm.tensor({ 1, 2 }, { device = device }) end,
      ["waiting for it"] = function() device:sync() end,
      ["copying to another device"] = function(input) return input:to("reference"), device.name == "reference"
        and input:to("cpu") end,
      ["random numbers"] = function(input) return input + qm.randn({ 4 }, { device = device }) end,
    }) do
      collectgarbage()
      collectgarbage()
      local before = live()
      local g = qm.graph(body, { warmup = 1, device = device })
      g(x)
      assert.error_matches(function() g(x) end, what, 1, true)
      assert.is_nil(graphs.recording())
      assert.equal("number", type(x:sum():item()))
      g:free()
      collectgarbage()
      collectgarbage()
      assert.equal(before, live(), what)
    end
  end)

  it("names an argument that does not fit", function()
    local g = qm.graph(function(x) return x + 1 end, { device = device })
    g(on({ 3 }))
    assert.error_matches(function() g(on({ 4 })) end,
      "'argument 1': expected qm.Tensor f32 %[3%], as in the first call, got")
    assert.error_matches(function() g() end, "argument 'arguments'")
    assert.error_matches(function() g(5) end, "argument 'argument 1': expected a tensor")
    assert.error_matches(function() g(on({ 3 }):requires_gradient()) end, "no gradient flows to")
    assert.error_matches(function() qm.graph(5) end, "argument 'body'")
    local w = on({ 3 }):requires_gradient()
    local taped = qm.graph(function() return w * 2 end, { device = device })
    assert.error_matches(function() taped() end, "gradient tape")
  end)

  it("calls the hooks before every replay, the first included", function()
    local calls, number = 0, qm.zeros({}, { device = device })
    local g = qm.graph(function(x)
      local recording = graphs.recording()
      if recording then
        recording:before_replay(function()
          calls = calls + 1
          number:fill(calls)
        end)
      end
      return x + number
    end, { warmup = 1, device = device })
    local zero = qm.zeros({ 2 }, { device = device })
    for call = 0, 3 do assert.equal(call, g(zero):at(2)) end
    assert.equal(3, calls)
  end)

  it("runs inside another recording as part of it", function()
    local inner = qm.graph(function(x) return x * 3 end, { device = device })
    local outer = qm.graph(function(x) return inner(x) + 1 end, { device = device })
    for i = 1, 4 do assert.equal(3 * i + 1, outer(qm.full({ 2 }, i, { device = device })):at(1)) end
  end)

  it("records gradients", function()
    local w = on({ 8, 8 }):requires_gradient()
    local function body(x)
      local loss = qm.silu(qm.matmul(x, w)):sum()
      loss:backward()
      local grad = w.grad:clone()
      w:zero_grad()
      return grad
    end
    local g = qm.graph(body, { device = device })
    for _ = 1, 4 do
      local x = on({ 5, 8 })
      testing.assert_equal(body(x), g(x))
    end
  end)

  it("trains: 20 steps equal 20 steps run one by one, to the bit", function()
    local function train(options)
      qm.seed(3)
      local model = qm.models.llama.new({ vocab_size = 50, hidden_size = 64, intermediate_size = 96,
        num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 32 },
        { linear = { kind = "dense" }, device = device })
      local step = qm.graph(function(tokens, targets)
        local loss = model:loss(tokens, targets, { 0, 9, 16 })
        loss:backward()
        for _, entry in ipairs(model:named_parameters()) do
          entry.param:add_(entry.param.grad, -0.1)
          entry.param:zero_grad()
        end
        return loss
      end, options)
      local losses = {}
      for i = 1, 20 do
        local tokens, targets = {}, {}
        for j = 1, 16 do tokens[j], targets[j] = i * j % 50, (i * j + 7) % 50 end
        qm.scope(function()
          local later = step(qm.tensor(tokens, { dtype = "i32", device = device }),
            qm.tensor(targets, { dtype = "i32", device = device })):read_later()
          losses[i] = later:get()
        end)
      end
      local weights = model.model.layers[1].mlp.down_proj.weight:bytes()
      step:free()
      model:free()
      return losses, weights
    end
    local expected, expected_weights = train({ eager = true, device = device })
    local losses, weights = train({ device = device })
    assert.same(expected, losses)
    assert.equal(expected_weights, weights)
  end)
end)
