local qm = require("quartermoon")
local files = require("quartermoon.files")
local testing = require("spec.support.testing")
local llama = qm.models.llama

local TINY = { vocab_size = 11, hidden_size = 8, intermediate_size = 12, num_hidden_layers = 2, num_attention_heads = 2,
  num_key_value_heads = 1, max_position_embeddings = 8 }

local function tiny(changes, options)
  local config = {}
  for key, value in pairs(TINY) do config[key] = value end
  for key, value in pairs(changes or {}) do config[key] = value end
  options = options or { dtype = "f32", linear = { kind = "dense" } }
  return llama.new(config, options)
end

local function ids(values, device) return qm.tensor(values, { dtype = "i32", device = device }) end

local golden = os.getenv("QM_GOLDEN") or "../shared/golden"
local folder = golden .. "/hf/tiny-llama"

---A published tensor in our layout: linear weights are transposed.
local function ours(name, tensor)
  if #tensor.shape ~= 2 or name:match("embed_tokens") then return tensor end
  return tensor:transpose()
end

describe("qm.models.llama", function()
  it("gives the logits, loss and gradients of transformers' Llama", function()
    local config = files.read_json(folder .. "/config.json")
    if not config then return pending("no golden files in " .. folder .. "; QM_GOLDEN says where they are") end
    local model = llama.new({ vocab_size = config.vocab_size, hidden_size = config.hidden_size,
      intermediate_size = config.intermediate_size, num_hidden_layers = config.num_hidden_layers,
      num_attention_heads = config.num_attention_heads, num_key_value_heads = config.num_key_value_heads,
      head_dim = config.head_dim, rms_norm_eps = config.rms_norm_eps, rope_theta = config.rope_parameters.rope_theta,
      max_position_embeddings = config.max_position_embeddings }, { dtype = "f32", linear = { kind = "dense" } })
    local entries = model:named_parameters()
    qm.safetensors.with(folder .. "/model.safetensors", function(file)
      assert.equal(#file:names(), #entries)
      for _, entry in ipairs(entries) do entry.param:copy(ours(entry.name, file:tensor(entry.name))) end
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
        testing.assert_close(ours(entry.name, file:tensor("grad." .. entry.name)), entry.param.grad, 1e-4, entry.name)
      end
    end)
  end)

  for what, changes in pairs({ plain = {}, tied = { tie_word_embeddings = true },
    ["biased, with normed heads"] = { attention_bias = true, qk_norm = true } }) do
    it("has the gradient that central differences show: " .. what, function()
      changes.initializer_range = 0.5 -- gradients too small drown in the loss's last bits
      local model = tiny(changes, { dtype = "f32", linear = { kind = "dense", std = 0.3 }, device = "reference" })
      for _, param in ipairs(model:parameters()) do
        if #param.shape == 1 then param:copy(qm.rand(param.shape, { device = "reference" }, 0.5, 1.5)) end
      end
      local tokens, targets = ids({ 3, 1, 4, 1, 5, 9, 2 }, "reference"), ids({ 1, 4, 1, -100, 9, 2, 6 }, "reference")
      local parameters = model:parameters()
      testing.check_gradients(function()
        -- A key's bias hardly changes the loss, too little for differences in f32; it does the scores.
        if changes.attention_bias then return model:logits(tokens, { 0, 3, 7 }) end
        return model:loss(tokens, targets, { 0, 3, 7 })
      end, parameters, { step = 4e-3, tolerance = 1e-2 })
    end)
  end

  for _, checkpoint in ipairs({ true, "selective" }) do
    it("recomputes to the same loss and gradients, holding less: " .. tostring(checkpoint), function()
      local stored, recomputed = tiny(), tiny(nil, { dtype = "f32", linear = { kind = "dense" },
        checkpoint = checkpoint })
      local twins = recomputed:parameters()
      for i, param in ipairs(stored:parameters()) do twins[i]:copy(param) end
      local losses, held = {}, {}
      local function live_bytes(device)
        for _ = 1, 2 do collectgarbage() end -- whose turn it is would decide otherwise
        return device:memory().live_bytes
      end
      for i, model in ipairs({ stored, recomputed }) do
        local before = live_bytes(model.device)
        local loss = model:loss(ids({ 1, 2, 3, 4 }), ids({ 2, 3, 4, 5 }))
        held[i] = live_bytes(model.device) - before
        losses[i] = loss:item()
        loss:backward()
      end
      assert.equal(losses[1], losses[2])
      assert.is_true(held[2] < held[1])
      for i, param in ipairs(stored:parameters()) do testing.assert_equal(param.grad, twins[i].grad, param.name) end
    end)
  end

  it("rotates with scaled positions where its configuration says so", function()
    local model = tiny({ rope_scaling = { rope_type = "linear", factor = 2 } })
    local cos = qm.rope_tables(4, 8, 10000, { scaling = { rope_type = "linear", factor = 2 } })
    testing.assert_equal(cos, model.cos)
  end)

  it("treats packed sequences as if each were alone", function()
    local model = tiny()
    local both = qm.no_grad(model.logits, model, ids({ 3, 1, 4, 1, 5 }), { 0, 2, 5 })
    local alone = qm.no_grad(model.logits, model, ids({ 4, 1, 5 }))
    testing.assert_close(alone, both:narrow(3, 3), 1e-5)
    testing.assert_equal(both, qm.no_grad(model.logits, model, ids({ 3, 1, 4, 1, 5 }), ids({ 0, 2, 5 })))
  end)

  it("generates with its cache what it would say without", function()
    local model = tiny({ initializer_range = 0.5 })
    local made = model:generate({ 3, 1 }, { max_tokens = 6, temperature = 0 })
    local text = { 3, 1 }
    for _, token in ipairs(made) do
      local logits = qm.no_grad(model.logits, model, ids(text))
      assert.equal(logits:argmax(2):totable()[#text], token)
      text[#text + 1] = token
    end
    assert.equal(8, #text) -- as many as there are positions
    assert.same(made, model:generate(ids({ 3, 1 }), { temperature = 0 }))
  end)

  it("draws with a seed, from the likeliest few, and stops where told", function()
    local model = tiny({ initializer_range = 0.5 })
    local function draw(options) return model:generate({ 3 }, options) end
    assert.same(draw({ seed = 5 }), draw({ seed = 5 }))
    assert.same(draw({ temperature = 0 }), draw({ top_k = 1, seed = 7 }))
    local all = draw({ temperature = 0 })
    local stop, expected = all[3], {}
    for _, token in ipairs(all) do
      if token == stop then break end
      expected[#expected + 1] = token
    end
    assert.same(expected, draw({ temperature = 0, stop = stop }))
  end)

  it("leaves nothing behind when it generates", function()
    local model = tiny()
    model:generate({ 1 }, { max_tokens = 4 })
    local before = qm.handles_live()
    collectgarbage("stop")
    for _ = 1, 3 do model:generate({ 1 }, { max_tokens = 4 }) end
    local after = qm.handles_live()
    collectgarbage("restart")
    assert.equal(before, after)
  end)

  it("counts weights, bytes and bits", function()
    local model = llama.new({ vocab_size = 16, hidden_size = 64, intermediate_size = 128, num_hidden_layers = 1,
      num_attention_heads = 4 }, { linear = { kind = "mpq", w_bit = 4, group_size = 64 } })
    local quantized, dense = 4 * 64 * 64 + 3 * 64 * 128, 2 * 16 * 64 + 3 * 64
    assert.equal(quantized + dense, model:parameter_count())
    -- 4 bits, and for every 64 a scale of 16 bits and a zero point of 4.
    local bits = 4 + 20 / 64
    assert.equal(quantized * bits / 8 + 4 * dense, model:weight_bytes())
    assert.near(bits, (model:bits_per_weight()), 1e-12)
  end)

  it("learns in 4 bits: a short text by heart", function()
    qm.seed(3)
    local model = llama.new({ vocab_size = 16, hidden_size = 64, intermediate_size = 64, num_hidden_layers = 1,
      num_attention_heads = 2, max_position_embeddings = 32 }, { dtype = "f32", linear = { group_size = 32 } })
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
    local prompt, rest = { unpack(text, 1, 4) }, { unpack(text, 5, 14) }
    assert.same(rest, { unpack(model:generate(prompt, { temperature = 0, max_tokens = 10 }), 1, 10) })
  end)

  it("refuses what does not fit", function()
    assert.error_matches(function() llama.new({ vocab_size = 3 }) end, "option '.*' is needed")
    assert.error_matches(function() tiny({ num_key_value_heads = 3 }) end,
      "a divisor of heads=2, got number 3", 1, true)
    local model = tiny()
    local nine = ids({ 1, 1, 1, 1, 1, 1, 1, 1, 1 })
    assert.error_matches(function() model:loss(nine, nine) end, "sequences of at most 8 tokens, got number 9", 1, true)
    assert.error_matches(function() model:loss(nine, nine, { 0, 5 }) end, "offsets from 0 to the number of tokens, 9",
      1, true)
    testing.assert_refused_late(function() model:loss(ids({ 11 }), ids({ 1 })) end, "11", "gather: index 11 is outside")
    assert.error_matches(function() model:generate({}) end, "at least one token", 1, true)
  end)
end)
