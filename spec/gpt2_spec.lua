local qm = require("quartermoon")
local files = require("quartermoon.files")
local testing = require("spec.support.testing")
local gpt2 = qm.models.gpt2

local function tiny(changes, options)
  local config = { vocab_size = 11, n_embd = 8, n_layer = 2, n_head = 2, n_positions = 8 }
  for key, value in pairs(changes or {}) do config[key] = value end
  return gpt2.new(config, options or { dtype = "f32", linear = { kind = "dense" } })
end

local function ids(values, device) return qm.tensor(values, { dtype = "i32", device = device }) end

local folder = (os.getenv("QM_GOLDEN") or "../shared/golden") .. "/hf/tiny-gpt2"

describe("qm.models.gpt2", function()
  it("gives the logits, loss and gradients of transformers' GPT-2", function()
    local config = files.read_json(folder .. "/config.json")
    if not config then return pending("no golden files in " .. folder .. "; QM_GOLDEN says where they are") end
    local model = gpt2.new({ vocab_size = config.vocab_size, n_embd = config.n_embd, n_layer = config.n_layer,
      n_head = config.n_head, n_positions = config.n_positions, layer_norm_epsilon = config.layer_norm_epsilon,
      activation_function = config.activation_function }, { dtype = "f32", linear = { kind = "dense" } })
    local entries = model:named_parameters()
    qm.safetensors.with(folder .. "/model.safetensors", function(file)
      assert.equal(#file:names(), #entries)
      for _, entry in ipairs(entries) do entry.param:copy(file:tensor(entry.name)) end
    end)
    qm.safetensors.with(folder .. "/reference.safetensors", function(file)
      local input, labels = file:tensor("input_ids"):totable(), file:tensor("labels"):totable()
      local tokens, targets, offsets = {}, {}, { 0 }
      for s, sequence in ipairs(input) do
        for i, token in ipairs(sequence) do
          tokens[#tokens + 1] = token
          targets[#targets + 1] = labels[s][i + 1] or -100 -- their labels are shifted inside the model
        end
        offsets[s + 1] = #tokens
      end
      local logits = qm.no_grad(model.logits, model, ids(tokens), offsets)
      testing.assert_close(file:tensor("logits"):reshape(#tokens, config.vocab_size), logits, 1e-4, "logits")
      local loss = model:loss(ids(tokens), ids(targets), offsets)
      assert.near(file:tensor("loss"):item(), loss:item(), 1e-5)
      loss:backward()
      for _, entry in ipairs(entries) do
        testing.assert_close(file:tensor("grad." .. entry.name), entry.param.grad, 1e-4, entry.name)
      end
    end)
  end)

  it("has the gradient that central differences show", function()
    local options = { dtype = "f32", linear = { kind = "dense" }, device = "reference" }
    local model = tiny({ initializer_range = 0.5 }, options)
    for _, param in ipairs(model:parameters()) do
      if #param.shape == 1 then param:copy(qm.rand(param.shape, { device = "reference" }, 0.5, 1.5)) end
    end
    local tokens = ids({ 3, 1, 4, 1, 5, 9, 2 }, "reference")
    testing.check_gradients(function() return model:logits(tokens, { 0, 3, 7 }) end, model:parameters(),
      { step = 4e-3, tolerance = 1e-2 })
  end)

  for _, checkpoint in ipairs({ true, "selective" }) do
    it("recomputes to the same loss and gradients: " .. tostring(checkpoint), function()
      local stored, recomputed = tiny(), tiny(nil, { dtype = "f32", linear = { kind = "dense" },
        checkpoint = checkpoint })
      local twins, losses = recomputed:parameters(), {}
      for i, param in ipairs(stored:parameters()) do twins[i]:copy(param) end
      for i, model in ipairs({ stored, recomputed }) do
        local loss = model:loss(ids({ 1, 2, 3, 4 }), ids({ 2, 3, 4, 5 }))
        losses[i] = loss:item()
        loss:backward()
      end
      assert.equal(losses[1], losses[2])
      for i, param in ipairs(stored:parameters()) do testing.assert_equal(param.grad, twins[i].grad, param.name) end
    end)
  end

  it("takes its feed-forward layers whole where both halves are plain dense layers", function()
    local model = tiny({ n_embd = 16, initializer_range = 0.3 }, { dtype = "bf16", linear = { kind = "dense" } })
    local tokens, targets = ids({ 1, 2, 3, 4, 5, 6, 7, 8 }), ids({ 2, 3, 4, 5, 6, 7, 8, 9 })
    local mlp, x = model.transformer.h[1].mlp, qm.randn({ 2, 16 }, { dtype = "bf16" }):requires_gradient()
    assert.equal("gelu_mlp", mlp(x).node.name)
    local loss = model:loss(tokens, targets)
    local whole = loss:item()
    loss:backward()
    local grads = {}
    for i, param in ipairs(model:parameters()) do
      grads[i] = param.grad:clone()
      param:zero_grad()
    end
    -- A layer whose forward somebody replaced is called, as quantizing a model needs it.
    local calls = 0
    for _, block in ipairs(model.transformer.h) do
      block.mlp.c_fc.forward = function(layer, input)
        calls = calls + 1
        return qm.linear(input, layer.weight, layer.bias)
      end
    end
    assert.equal("linear", mlp(x).node.name)
    loss = model:loss(tokens, targets)
    assert.equal(3, calls)
    assert.near(whole, loss:item(), 0.01)
    loss:backward()
    for i, param in ipairs(model:parameters()) do testing.assert_close(grads[i], param.grad, 2 ^ -4, param.name) end
    local exact = tiny({ activation_function = "gelu" })
    assert.equal("linear", exact.transformer.h[1].mlp(qm.randn({ 2, 8 }):requires_gradient()).node.name)
  end)

  it("generates with its cache what it would say without", function()
    local model = tiny({ initializer_range = 0.5 }, { dtype = "f32", linear = { kind = "dense" }, vocab_multiple = 16 })
    local made = model:generate({ 3, 1 }, { max_tokens = 6, temperature = 0 })
    local text = { 3, 1 }
    for _, token in ipairs(made) do
      local logits = qm.no_grad(model.logits, model, ids(text))
      assert.equal(11, logits.shape[2])
      assert.equal(logits:argmax(2):totable()[#text], token)
      text[#text + 1] = token
    end
    assert.equal(8, #text) -- as many as there are positions
  end)

  it("rounds its vocabulary up on request, and its weights count", function()
    local model = tiny(nil, { linear = { kind = "dense" }, vocab_multiple = 16 })
    assert.same({ 16, 8 }, model.transformer.wte.weight.shape)
    local block = 4 * 8 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    assert.equal(16 * 8 + 8 * 8 + 2 * block + 2 * 8, model:parameter_count())
  end)

  it("learns in 4 bits: a short text by heart", function()
    qm.seed(3)
    local model = gpt2.new({ vocab_size = 16, n_embd = 64, n_layer = 1, n_head = 2, n_positions = 32,
      initializer_range = 0.1 }, { dtype = "f32", linear = { group_size = 32 } })
    local optim = qm.optim.new(model, { lr = 1e-2 })
    local text = { 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9 }
    local tokens, targets = ids({ unpack(text, 1, 14) }), ids({ unpack(text, 2) })
    local last
    for _ = 1, 60 do
      local loss = model:loss(tokens, targets)
      last = loss:item()
      loss:backward()
      optim:step()
      optim:zero_grad()
    end
    assert.is_true(last < 0.2, "loss " .. last)
  end)

  it("refuses what does not fit", function()
    assert.error_matches(function() tiny({ n_head = 3 }) end, "a divisor of n_embd=8, got number 3", 1, true)
    assert.error_matches(function() tiny({ activation_function = "relu" }) end,
      "expected one of 'gelu_new', 'gelu', 'gelu_pytorch_tanh', 'gelu_fast', got string 'relu'", 1, true)
    local nine = ids({ 1, 1, 1, 1, 1, 1, 1, 1, 1 })
    assert.error_matches(function() tiny():loss(nine, nine) end, "sequences of at most 8 tokens, got number 9", 1, true)
  end)
end)
