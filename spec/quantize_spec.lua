local qm = require("quartermoon")

local LLAMA = { vocab_size = 64, hidden_size = 64, intermediate_size = 96, num_hidden_layers = 2,
  num_attention_heads = 4, num_key_value_heads = 2, attention_bias = true }
local GPT2 = { vocab_size = 64, n_embd = 64, n_layer = 2, n_head = 4 }

local function fresh(kind)
  local options = { linear = { kind = "dense" }, dtype = "f32", generator = qm.generator(1) }
  if kind == "llama" then return qm.models.llama.new(LLAMA, options) end
  return qm.models.gpt2.new(GPT2, options)
end

local function batches(count)
  local generator, list = qm.generator(2), {}
  for i = 1, count do
    list[i] = { generator:randn({ 96 }):abs():mul_(20):clamp(0, 63):to("i32"), { 0, 32, 96 } }
  end
  return list
end

describe("qm.models.quantize", function()
  for kind, count in pairs({ llama = 14, gpt2 = 8 }) do
    it("quantizes every linear layer of " .. kind .. "'s blocks, better than rounding", function()
      local gap = {}
      for _, method in ipairs({ "gptq", "rtn" }) do
        local model, calibration, seen = fresh(kind), batches(3), {}
        local function logits() return qm.no_grad(model.logits, model, calibration[1][1], calibration[1][2]) end
        local before = logits()
        local report = qm.models.quantize(model, { method = method, w_bit = 4, group_size = 32,
          on_layer = function(line) seen[#seen + 1] = line.name end }, calibration)
        assert.equal(count, #report)
        for i, line in ipairs(report) do
          assert.equal(seen[i], line.name)
          assert.is_true(line.output > 0 and line.output < 0.02)
        end
        local quantized = 0
        for _, entry in ipairs(model:named_parameters()) do
          if entry.param.w_bit then quantized = quantized + 1 end
        end
        assert.equal(count, quantized)
        gap[method] = (logits() - before):square():sum():item()
        model:free()
      end
      assert.is_true(gap.gptq > 0 and gap.gptq < gap.rtn)
    end)
  end

  it("rounds without calibration, and leaves no tensor behind", function()
    local model, calibration = fresh("llama"), batches(2)
    local report = qm.models.quantize(model, { method = "rtn", group_size = 32 })
    assert.equal(14, #report)
    assert.is_nil(report[1].output)
    local other = fresh("llama")
    qm.no_grad(model.logits, other, calibration[1][1], calibration[1][2]):free()
    local parameters = #other:named_parameters()
    collectgarbage()
    collectgarbage("stop")
    local before = qm.default_device():memory().live_count
    qm.models.quantize(other, { group_size = 32, grid = "float" }, calibration)
    collectgarbage("restart")
    -- Each of the 14 dense weights has become data, scales and zeros.
    assert.equal(before + 14 * 2, qm.default_device():memory().live_count)
    assert.equal(parameters, #other:named_parameters())
  end)

  it("says what is wrong", function()
    local model = fresh("llama")
    assert.error_matches(function() qm.models.quantize(model, {}) end, "'batches': expected what calibrates", 1, true)
    assert.error_matches(function() qm.models.quantize(model, { method = "awq" }) end, "one of 'gptq', 'rtn'", 1, true)
    assert.error_matches(function() qm.models.quantize(3) end, "'model': expected a model", 1, true)
    assert.error_matches(function() qm.models.quantize(model, { group_size = 33, method = "rtn" }) end,
      "qm.models.quantize: model.layers.0.self_attn.q_proj: qm.gptq.quantize: argument 'group_size': expected a "
        .. "multiple of 32", 1, true)
    -- What fails on the way leaves the layers callable.
    qm.no_grad(model.logits, model, batches(1)[1][1])
  end)
end)

describe("qm.models.perplexity", function()
  it("is exp of the mean loss, weighted by length", function()
    local model, list, at = fresh("llama"), batches(2), 0
    local function iterate()
      at = at + 1
      if list[at] then return list[at][1], list[at][1], list[at][2] end
    end
    local perplexity, nats = qm.models.perplexity(model, iterate)
    local mean = 0
    for _, batch in ipairs(list) do
      mean = mean + qm.no_grad(model.loss, model, batch[1], batch[1], batch[2]):item() / 2
    end
    assert.near(mean, nats, 1e-5)
    assert.near(math.exp(mean), perplexity, 1e-3 * perplexity)
    assert.error_matches(function() qm.models.perplexity(model, function() end) end, "at least one", 1, true)
  end)
end)
