local qm = require("quartermoon")

-- Nothing may depend on Lua's collector, which does not see device memory.
describe("training with the collector stopped", function()
  after_each(function() collectgarbage("restart") end)

  local function live() return qm.default_device():memory().live_bytes end

  ---Live bytes after each of `steps` steps.
  local function train(model_options, optim_options, steps)
    local config = { vocab_size = 64, hidden_size = 64, intermediate_size = 64, num_hidden_layers = 1,
      num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 32 }
    local model = qm.models.llama.new(config, model_options)
    local optim = qm.optim.new(model, optim_options)
    local series = {}
    collectgarbage()
    collectgarbage("stop")
    for step = 1, steps do
      local tokens, targets = {}, {}
      for i = 1, 16 do tokens[i], targets[i] = (step * i) % 64, (step * i + step) % 64 end
      tokens = qm.tensor(tokens, { dtype = "i32" })
      targets = qm.tensor(targets, { dtype = "i32" })
      local loss = model:loss(tokens, targets, { 0, 9, 16 })
      assert(loss:item() == loss:item(), "the loss is not a number")
      loss:backward()
      optim:clip_grad_norm(1)
      optim:step()
      optim:zero_grad()
      loss:free()
      tokens:free()
      targets:free()
      series[step] = live()
    end
    return series
  end

  local function assert_level(series)
    for step = 2, #series do
      assert.equal(series[1], series[step], ("live bytes after step %d against step 1"):format(step))
    end
  end

  it("keeps live bytes level over 300 steps in 4 bits", function()
    assert_level(train({ linear = { w_bit = 4 } }, { lr = 1e-3 }, 300))
  end)

  for what, options in pairs({
    ["with recomputation"] = { { linear = { w_bit = 4 }, checkpoint = true }, {} },
    ["with selective recomputation"] = { { linear = { w_bit = 4 }, checkpoint = "selective" }, {} },
    ["with bf16 activations"] = { { linear = { w_bit = 4 }, dtype = "bf16" }, { moments = "bf16" } },
    ["with a residual and refits"] = { { linear = { w_bit = 2 } }, { grid = "refit", refit_every = 3 } },
    ["dense"] = { { linear = { kind = "dense" } }, { weight_decay = 0.1 } },
  }) do
    it("keeps live bytes level " .. what, function() assert_level(train(options[1], options[2], 12)) end)
  end

  it("gives everything back in the end", function()
    local before = live()
    local model = qm.models.llama.new({ vocab_size = 64, hidden_size = 64, intermediate_size = 64,
      num_hidden_layers = 1, num_attention_heads = 2 })
    local optim = qm.optim.new(model)
    local tokens = qm.tensor({ 1, 2, 3 }, { dtype = "i32" })
    collectgarbage("stop")
    local loss = model:loss(tokens, tokens)
    loss:backward()
    optim:step()
    loss:free()
    tokens:free()
    optim:free()
    model:free()
    assert.equal(before, live())
  end)
end)
