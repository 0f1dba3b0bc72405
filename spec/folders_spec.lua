-- Model folders in and out. What transformers computes from such folders is in golden_spec.lua.
local cjson = require("cjson")
local qm = require("quartermoon")
local json_text = require("quartermoon.models.json_text")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local BASE = { vocab_size = 64, hidden_size = 64, intermediate_size = 96, num_hidden_layers = 2,
  num_attention_heads = 2, num_key_value_heads = 1, max_position_embeddings = 32, initializer_range = 0.2 }

local function with(changes)
  local config = {}
  for key, value in pairs(BASE) do config[key] = value end
  for key, value in pairs(changes or {}) do config[key] = value end
  return config
end

local LLAMA3 = { rope_type = "llama3", factor = 4, low_freq_factor = 1, high_freq_factor = 4,
  original_max_position_embeddings = 16 }
local FAMILIES = {
  { "llama", with({ rope_scaling = LLAMA3, tie_word_embeddings = true }) },
  { "llama", with({ attention_bias = true, output_bias = true, mlp_bias = true, head_dim = 64 }) },
  { "mistral", with({ sliding_window = 3 }) },
  { "qwen2", with({ attention_bias = true, tie_word_embeddings = true }) },
  { "qwen2", with({ attention_bias = true, sliding_window = 3, layer_types = { "sliding_attention",
    "full_attention" } }) },
  { "qwen3", with({ qk_norm = true, head_dim = 64 }) },
  { "gpt2", { vocab_size = 64, n_embd = 64, n_layer = 2, n_head = 4, n_positions = 32, initializer_range = 0.2 } },
  { "gpt2", { vocab_size = 64, n_embd = 64, n_layer = 2, n_head = 4, n_positions = 32, tie_word_embeddings = false,
    n_inner = 96, activation_function = "gelu" } },
}

local DENSE = { kind = "dense" }

local function fresh(family, config, linear)
  local class = family == "gpt2" and qm.models.gpt2 or qm.models.llama
  return class.new(config, { dtype = "f32", linear = linear or DENSE, device = testing.device })
end

local function logits(model)
  local tokens = qm.tensor({ 3, 1, 4, 1, 5, 9, 2, 6, 5 }, { dtype = "i32", device = testing.device })
  return qm.no_grad(model.logits, model, tokens)
end

local function load(folder, options)
  options = options or {}
  options.dtype, options.device, options.on_note = "f32", testing.device, options.on_note or function() end
  return qm.models.load(folder, options)
end

describe("A model's folder", function()
  local root, remove_root
  setup(function() root, remove_root = process.folder() end)
  teardown(function() remove_root() end)

  for i, case in ipairs(FAMILIES) do
    local family, config = unpack(case)
    it(("loads back to the same bits: %s (%d)"):format(family, i), function()
      local model, folder = fresh(family, config), root .. "/" .. i
      model:save(folder)
      local again = load(folder)
      assert.equal(family, again.family)
      testing.assert_equal(logits(model), logits(again), "logits")
      model:save(folder .. "s", { shard_bytes = 20000 })
      assert.is_true(qm.files.exists(folder .. "s/model.safetensors.index.json"))
      testing.assert_equal(logits(model), logits(load(folder .. "s")), "logits of shards")
      again:save(folder .. "b", { dtype = "bf16" })
      local rounded = load(folder .. "b")
      assert.equal("bf16", rounded.stored_dtype)
      rounded:save(folder .. "b", { dtype = "bf16", overwrite = true })
      testing.assert_equal(logits(rounded), logits(load(folder .. "b")), "logits of bf16")
    end)

    it(("with quantized weights is a GPTQ folder: %s (%d)"):format(family, i), function()
      local model, folder = fresh(family, config, { w_bit = 4, group_size = 32 }), root .. "/q" .. i
      model:save(folder)
      local again = load(folder)
      assert.same(model:bits_per_weight(), (again:bits_per_weight()))
      testing.assert_equal(logits(model), logits(again), "logits")
      -- The same weights; but a few rows are multiplied from the codes, in another order of sums: 96 products of f32
      -- in each of 2 layers.
      local order = 2 * 96 * 2 ^ -24
      testing.assert_close(logits(model), logits(load(folder, { linear = DENSE })), order, "logits of the decoded")
      local dense = model:save(folder .. "d", { format = "dense" })
      testing.assert_close(logits(model), logits(load(dense)), order, "logits of the dense folder")
      assert.same({ 4, 32, false, "gptq_v2" }, (function()
        local q = qm.files.read_json(folder .. "/quantize_config.json")
        return { q.bits, q.group_size, q.desc_act, q.checkpoint_format }
      end)())
    end)
  end

  it("is trained and saved with the codes that forward passes saw", function()
    local model = fresh("llama", BASE, { w_bit = 8, group_size = 32 })
    local optim = qm.optim.new(model, { lr = 1e-2 })
    local tokens = qm.tensor({ 3, 1, 4, 1 }, { dtype = "i32", device = testing.device })
    for _ = 1, 3 do
      model:loss(tokens, tokens):backward()
      optim:step()
      optim:zero_grad()
    end
    testing.assert_equal(logits(model), logits(load(model:save(root .. "/trained"))), "logits")
  end)

  it("is quantized while it is read", function()
    local dense = load(root .. "/1", { linear = { kind = "mpq", w_bit = 4, group_size = 32 } })
    assert.equal(4, dense.model.layers[1].mlp.up_proj.weight.w_bit)
    assert.is_true(dense.model.layers[1].mlp.up_proj.weight.requires_grad)
    -- From the type that the file has, without a copy in f32: the codes are the same.
    load(root .. "/1"):save(root .. "/1bf16", { dtype = "bf16" })
    local q = load(root .. "/1bf16", { linear = { kind = "mpq", w_bit = 4, group_size = 32 } })
    local w = load(root .. "/1bf16").model.layers[1].mlp.up_proj.weight
    assert.equal("f32", w.dtype)
    testing.assert_equal(qm.QParam.quantize(w, { w_bit = 4, group_size = 32 }):dequantize("f32"),
      q.model.layers[1].mlp.up_proj.weight:dequantize("f32"))
    local function type_of(folder, weights)
      return load(root .. folder, { weights = weights }).model.embed_tokens.weight.dtype
    end
    assert.same({ "bf16", "f32" }, { type_of("/1", "bf16"), type_of("/1b") })
    assert.same({ "f32", "bf16" }, { type_of("/1", "auto"), type_of("/1b", "auto") })
    local other = load(root .. "/q2", { linear = { kind = "mpq", w_bit = 8, group_size = 64 } })
    assert.equal(8, other.model.layers[1].mlp.up_proj.weight.w_bit)
  end)

  it("names exceptions of width, group and layer to those who serve it", function()
    local model, folder = fresh("llama", BASE, { w_bit = 4, group_size = 32 }), root .. "/mixed"
    local mlp = model.model.layers[1].mlp
    local w = mlp.up_proj.weight:dequantize("f32")
    rawset(mlp, "up_proj", qm.nn.QLinear.from(qm.QParam.quantize(w, { w_bit = 8, group_size = -1 })))
    rawset(mlp, "down_proj", qm.nn.Linear.new(96, 64, { device = testing.device }))
    model:save(folder)
    local dynamic = qm.files.read_json(folder .. "/config.json").quantization_config.dynamic
    assert.same({ bits = 8, group_size = -1 }, dynamic["+:^model\\.layers\\.0\\.mlp\\.up_proj$"])
    assert.truthy(dynamic["-:^model\\.layers\\.0\\.mlp\\.down_proj$"])
    testing.assert_equal(logits(model), logits(load(folder)), "logits")
    rawset(mlp, "up_proj", qm.nn.QLinear.from(qm.QParam.quantize(w, { w_bit = 4, group_size = 32 })))
    model:save(folder, { format = "awq", overwrite = true })
    assert.same({ "model.layers.0.mlp.down_proj" },
      qm.files.read_json(folder .. "/config.json").quantization_config.modules_to_not_convert)
    testing.assert_equal(logits(model), logits(load(folder)), "logits")
  end)

  it("names the layers that vLLM fuses too, where all of their parts are one exception", function()
    local model, folder = fresh("llama", BASE), root .. "/fused"
    qm.models.quantize(model, { method = "rtn", grid = "sym", group_size = 32 })
    local function becomes(parent, name, bits, size)
      local w = parent[name].weight:dequantize("f32")
      local q = qm.gptq.quantize(w, nil, { w_bit = bits, group_size = size, grid = "sym" })
      rawset(parent, name, qm.nn.QLinear.from(q))
    end
    local first, second = model.model.layers[1], model.model.layers[2]
    becomes(first.mlp, "gate_proj", 8, 32)
    becomes(first.mlp, "up_proj", 8, 32)
    for _, name in ipairs({ "q_proj", "k_proj", "v_proj" }) do becomes(first.self_attn, name, 4, -1) end
    becomes(second.mlp, "gate_proj", 8, 32)
    becomes(second.mlp, "up_proj", 8, -1) -- two grids
    becomes(second.self_attn, "q_proj", 8, 32) -- alone
    local k_out = second.self_attn.k_proj.weight.shape[2]
    for _, name in ipairs({ "k_proj", "v_proj" }) do
      rawset(second.self_attn, name, qm.nn.Linear.new(64, k_out, { device = testing.device }))
    end
    model:save(folder)
    local dynamic = qm.files.read_json(folder .. "/config.json").quantization_config.dynamic
    local function rule(sign, path) return dynamic[sign .. "^model\\.layers\\." .. path:gsub("%.", "\\.") .. "$"] end
    assert.same({ bits = 8, group_size = 32 }, rule("+:", "0.mlp.gate_up_proj"))
    assert.same({ bits = 4, group_size = -1 }, rule("+:", "0.self_attn.qkv_proj"))
    assert.same({ bits = 8, group_size = 32 }, rule("+:", "1.self_attn.q_proj"))
    for _, sign in ipairs({ "+:", "-:" }) do
      assert.is_nil(rule(sign, "1.mlp.gate_up_proj"))
      assert.is_nil(rule(sign, "1.self_attn.qkv_proj"))
    end
    for _, parent in ipairs({ first.mlp, second.mlp }) do
      for _, name in ipairs({ "gate_proj", "up_proj" }) do
        rawset(parent, name, qm.nn.Linear.new(64, 96, { device = testing.device }))
      end
    end
    model:save(folder, { overwrite = true })
    dynamic = qm.files.read_json(folder .. "/config.json").quantization_config.dynamic
    assert.truthy(rule("-:", "0.mlp.gate_up_proj"))
    assert.truthy(rule("-:", "1.mlp.gate_up_proj"))
    testing.assert_equal(logits(model), logits(load(folder)), "logits")
  end)

  it("keeps zero points whichever way they are stored", function()
    local model, folder = fresh("llama", BASE, { w_bit = 4, group_size = 32 }), root .. "/zeros"
    model:save(folder, { checkpoint_format = "gptq_v2" })
    local again = load(folder)
    testing.assert_equal(logits(model), logits(again), "logits")
    assert.equal(0, again.model.layers[1].mlp.up_proj.weight.zero_offset)
    assert.same({ "zero points are read as gptq_v2 has them, as the config says" }, again.notes)
    testing.assert_equal(logits(model), logits(load(again:save(folder .. "1"))), "logits")
  end)

  it("stores zero points minus one where that serves everybody, or nothing else can", function()
    local model = fresh("llama", BASE)
    qm.models.quantize(model, { method = "rtn", grid = "sym", group_size = 32 })
    local function convention()
      model:save(root .. "/convention", { overwrite = true })
      testing.assert_equal(logits(model), logits(load(root .. "/convention")), "logits")
      local how = qm.files.read_json(root .. "/convention/quantize_config.json")
      return { how.checkpoint_format, how.sym }
    end
    assert.same({ "gptq", true }, convention())
    local zeros = model.model.layers[1].mlp.up_proj.weight.zeros
    zeros:fill(0x66666666)
    assert.same({ "gptq_v2", false }, convention())
    zeros:fill(-1) -- zero points of 16
    assert.same({ "gptq", false }, convention())
  end)

  it("takes tokenizer files and settings of generation along", function()
    local folder = root .. "/1"
    qm.files.write(folder .. "/tokenizer.json", "{}")
    qm.files.write_json(folder .. "/generation_config.json", { eos_token_id = { 3, 4 }, temperature = 0.5 })
    local model = load(folder)
    assert.same({ eos_token_id = { 3, 4 }, temperature = 0.5 }, model.generation_config)
    model:save(root .. "/along")
    assert.equal("{}", qm.files.read(root .. "/along/tokenizer.json"))
    assert.is_true(qm.files.exists(root .. "/along/generation_config.json"))
  end)

  it("is not replaced unless told to", function()
    local model = load(root .. "/1")
    assert.error_matches(function() model:save(root .. "/1") end, "is there already; the option overwrite", 1, true)
    assert.error_matches(function() model:save(root, { overwrite = true }) end, "no model folder to replace", 1, true)
    assert.error_matches(function() model:save(root .. "/x", { format = "gptq" }) end,
      "expected 'dense', as no weight of this model is quantized, got string 'gptq'", 1, true)
    assert.is_false(qm.files.exists(root .. "/x/config.json"))
  end)

  it("of GPT-2's first kind has other names and masks", function()
    local model, folder = fresh(unpack(FAMILIES[7])), root .. "/old"
    model:save(folder)
    local parts = { ["h.0.attn.bias"] = qm.ones({ 1, 1, 32, 32 }), ["h.0.attn.masked_bias"] = qm.ones({}) }
    qm.safetensors.with(folder .. "/model.safetensors", function(file)
      for _, key in ipairs(file:names()) do parts[key:gsub("^transformer%.", "")] = file:tensor(key) end
    end)
    qm.safetensors.save(folder .. "/model.safetensors", parts)
    testing.assert_equal(logits(model), logits(load(folder)), "logits")
  end)
end)

describe("A folder that is not in order", function()
  local root, remove_root, good
  setup(function()
    root, remove_root = process.folder()
    good = root .. "/good"
    fresh("llama", BASE):save(good, { shard_bytes = 60000 })
  end)
  teardown(function() remove_root() end)

  ---Expect an error from a copy of the good folder with one file changed.
  local function refused(file, change, ...)
    local folder = root .. "/bad"
    os.execute(("rm -rf %s && cp -r %s %s"):format(folder, good, folder))
    local value = qm.files.read_json(folder .. "/" .. file)
    local text = change(value, folder)
    qm.files.write(folder .. "/" .. file, type(text) == "string" and text or json_text.encode(value))
    collectgarbage()
    local live = qm.handles_live()
    local ok, message = pcall(load, folder)
    assert.is_false(ok, "it was accepted")
    for _, part in ipairs({ folder, ... }) do
      assert(tostring(message):find(part, 1, true), ("expected '%s' in '%s'"):format(part, tostring(message)))
    end
    collectgarbage()
    collectgarbage()
    assert.is_true(qm.handles_live() <= live)
  end

  ---A wrong value of a key of config.json.
  local function bad_key(key, value, ...)
    local path = {}
    for word in key:gmatch("[^.]+") do path[#path + 1] = word end
    refused("config.json", function(config)
      for i = 1, #path - 1 do
        if type(config[path[i]]) ~= "table" then config[path[i]] = {} end
        config = config[path[i]]
      end
      config[path[#path]] = value
    end, "config.json", "key '" .. key .. "'", ...)
  end

  it("is refused for a key of its configuration, by name", function()
    bad_key("model_type", "mamba", "one of gpt2, llama, mistral, qwen2, qwen3, got string 'mamba'")
    bad_key("model_type", 3)
    bad_key("architectures", { "LlamaForSequenceClassification" }, "expected 'LlamaForCausalLM'")
    for _, value in ipairs({ 0, -1, 1.5, 2 ^ 40, "64", cjson.null, true }) do
      if value ~= cjson.null then bad_key("hidden_size", value, "an integer from 1 to 2147483647") end
    end
    bad_key("num_hidden_layers", 65536, "too few for 65536 layers")
    bad_key("num_hidden_layers", 65537, "an integer from 1 to 65536")
    bad_key("max_position_embeddings", 2 ^ 31 - 1, "the option 'positions'")
    bad_key("num_key_value_heads", 3, "a divisor of num_attention_heads=2")
    bad_key("head_dim", 3, "heads of an even size")
    bad_key("hidden_act", "gelu", "one of 'silu', 'swish', got string 'gelu'")
    bad_key("rms_norm_eps", -1)
    bad_key("tie_word_embeddings", "yes", "true or false")
    bad_key("rope_parameters.rope_type", "yarn", "one of 'default', 'linear', 'llama3', got string 'yarn'")
    bad_key("rope_scaling.type", "dynamic")
    bad_key("rope_parameters.partial_rotary_factor", 0.5)
    bad_key("rope_parameters.full_attention", { rope_theta = 1 }, "one set of rotations for all layers")
    refused("config.json", function(c) c.rope_parameters = { rope_type = "linear" } end, "rope_parameters.factor")
    bad_key("quantization_config.quant_method", "bitsandbytes", "'gptq', 'awq', 'exl2', 'bie'")
    refused("config.json", function(c) c.quantization_config = { quant_method = "gptq", bits = 5, group_size = 32 } end,
      "key 'quantization_config.bits'", "2, 3, 4 or 8")
    refused("config.json", function(c) c.quantization_config = { quant_method = "gptq", bits = 4, group_size = 32 } end,
      "no weight there is quantized")
    bad_key("eos_token_id", "end", "a token number or a list of them")
    refused("config.json", function() return "[1, 2]" end, "expected a JSON object")
    refused("config.json", function() return "{" end, "config.json")
  end)

  it("is refused for tensors that its configuration has otherwise", function()
    refused("config.json", function(c) c.intermediate_size = 128 end, "tensor 'model.layers.0.mlp.",
      "expected [128, 64] as config.json has it, got f32 [96, 64]")
    refused("config.json", function(c) c.num_hidden_layers = 3 end, "holds no tensor 'model.layers.2.")
    refused("config.json", function(c) c.num_hidden_layers = 1 end, "tensor 'model.layers.1.",
      "has no place in a model of this config.json")
    refused("config.json", function(c) c.head_dim, c.max_position_embeddings = 65536, 2 ^ 22 end,
      "self_attn.", "expected [") -- before anything is made of 2^37 rotations
    refused("config.json", function(c) c.mlp_bias = true end, "holds no tensor 'model.layers.0.mlp.gate_proj.bias'")
  end)

  it("is refused for an index that files do not bear out", function()
    local index = "model.safetensors.index.json"
    local key = "model.layers.0.self_attn.q_proj.weight"
    refused(index, function(i) i.weight_map[key] = nil end, "tensor '" .. key .. "'", "the index does not know it")
    refused(index, function(i) i.weight_map.extra = i.weight_map[key] end, "tensor 'extra' is missing from model-0")
    refused(index, function(i)
      for _, shard in pairs(i.weight_map) do
        if shard ~= i.weight_map[key] then i.weight_map[key] = shard; break end
      end
    end, "tensor '" .. key .. "' is in model-0", "the index says in model-0")
    refused(index, function(i) i.weight_map[key] = "../good/x.safetensors" end, "a .safetensors file in this folder")
    refused(index, function(i) i.weight_map[key] = 3 end, "a .safetensors file in this folder")
    refused(index, function(i) i.weight_map[key] = "none.safetensors" end, "none.safetensors: No such file")
    refused(index, function(_, folder)
      return (qm.files.read(folder .. "/" .. index):gsub('("lm_head.weight": "[^"]*")', "%1, %1"))
    end, "tensor 'lm_head.weight' stands there twice")
    refused(index, function(i) i.weight_map = {} end, "'weight_map'")
    refused("config.json", function(_, folder)
      os.execute("rm " .. folder .. "/*.index.json")
    end, "files and no model.safetensors.index.json")
    refused("config.json", function(_, folder)
      os.execute("rm " .. folder .. "/model*; touch " .. folder .. "/pytorch_model.bin")
    end, "no model.safetensors (pytorch_model.bin is of a kind that is not read)")
    refused(index, function(_, folder)
      local twice = { ["lm_head.weight"] = qm.ones({ 64, 64 }) }
      qm.safetensors.save(folder .. "/twice.safetensors", twice)
      local value = qm.files.read_json(folder .. "/" .. index)
      value.weight_map.other = "twice.safetensors"
      return json_text.encode(value)
    end, "tensor 'lm_head.weight' is in")
  end)
end)

describe("Configurations of both generations", function()
  local configs = require("quartermoon.models.config")

  it("mean the same", function()
    local function parse(values)
      values.model_type = "llama"
      return configs.parse("config.json", values)
    end
    assert.same(parse({ rope_theta = 5e5, rope_scaling = LLAMA3 }), parse({ rope_parameters = { rope_theta = 5e5,
      rope_type = "llama3", factor = 4, low_freq_factor = 1, high_freq_factor = 4,
      original_max_position_embeddings = 16 } }))
    assert.same(parse({ rope_scaling = { type = "linear", factor = 2 } }),
      parse({ rope_parameters = { rope_type = "linear", factor = 2, rope_theta = 10000 } }))
    assert.same(parse({}), parse({ rope_scaling = cjson.null, num_key_value_heads = cjson.null }))
  end)

  it("have the defaults of their families", function()
    local mistral = configs.parse("config.json", { model_type = "mistral" })
    assert.same({ 4096, 8, 14336 }, { mistral.sliding_window, mistral.num_key_value_heads, mistral.intermediate_size })
    local none = configs.parse("config.json", { model_type = "mistral", sliding_window = cjson.null })
    assert.equal(0, none.sliding_window)
    local qwen3 = configs.parse("config.json", { architectures = { "Qwen3ForCausalLM" } })
    assert.same({ 128, true, false }, { qwen3.head_dim, qwen3.qk_norm, qwen3.attention_bias })
    local windows = configs.parse("config.json", { model_type = "qwen2", use_sliding_window = true,
      num_hidden_layers = 3, max_window_layers = 2 })
    assert.same({ "full_attention", "full_attention", "sliding_attention" }, windows.layer_types)
  end)
end)
