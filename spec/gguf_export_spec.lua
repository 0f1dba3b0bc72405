-- Models as GGUF files: which grids map exactly and onto which bytes, llama.cpp's names, orders and numbers.
local qm = require("quartermoon")
local architectures = require("quartermoon.gguf.architecture")
local grid = require("quartermoon.gguf.grid")
local hand = require("spec.support.gguf")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local device = testing.device
local folder, remove_folder
before_each(function() folder, remove_folder = process.folder() end)
after_each(function() remove_folder() end)

---A parameter [32 r, 32] whose column 0 has the codes 0, 1, 2 ... in turn, every other column zeros.
local function counted(w_bit, rows, parts)
  local per_word, data = 32 / w_bit, {}
  for word = 0, rows * w_bit / 32 - 1 do
    local value = 0
    for j = per_word - 1, 0, -1 do value = value * 2 ^ w_bit + (word * per_word + j) % 2 ^ w_bit end
    data[word + 1] = { value >= 2 ^ 31 and value - 2 ^ 32 or value }
    for column = 2, 32 do data[word + 1][column] = 0 end
  end
  parts.data, parts.w_bit = qm.tensor(data, { dtype = "i32", device = device }), w_bit
  return qm.QParam.new(parts)
end
local function floats(groups, value, dtype)
  return qm.full({ groups, 32 }, value, { dtype = dtype or "f16", device = device })
end
local function fields(groups, word, words)
  return qm.full({ groups, words or 4 }, word, { dtype = "i32", device = device })
end

---The bytes of a column.
local function bytes_of(q, column)
  local encode, name = grid.encoder(q)
  local size = ({ Q4_0 = 18, Q4_1 = 20, Q8_0 = 34 })[name] * q.shape[1] / 32
  local out = require("ffi").new("uint8_t[?]", size)
  encode(column, out)
  return require("ffi").string(out, size), name
end

describe("a grid", function()
  it("of 4 bits around 8 is Q4_0", function()
    -- 0x77777777: fields of 7, which GPTQ stores for 8.
    local q = counted(4, 32, { scales = floats(1, 0.5), zeros = fields(1, 0x77777777), asym = true, group_size = 32 })
    local bytes, name = bytes_of(q, 0)
    assert.equal("Q4_0", name)
    -- Code j beside code j + 16, which is j again.
    assert.equal(hand.hex "0038 00112233445566778899aabbccddeeff", bytes)
    assert.equal(hand.hex("0038" .. ("00"):rep(16)), (bytes_of(q, 31)))
  end)

  it("of fewer bits is Q4_0 where its codes, less the zero point, are", function()
    -- Zero point 2, stored as 1: codes 0 .. 3 become -2 .. 1, in the file 6 .. 9.
    local q = counted(2, 32, { scales = floats(1, -2), zeros = fields(1, 0x55555555, 2), asym = true, group_size = 32 })
    local bytes, name = bytes_of(q, 0)
    assert.equal("Q4_0", name)
    assert.equal(hand.hex("00c0" .. ("66778899"):rep(4)), bytes)
  end)

  it("with zeros of its own is Q4_1 where scale and least value are f16", function()
    local q = counted(4, 64, { scales = floats(2, 0.5), zeros = floats(2, 3), group_size = 32 })
    local bytes, name = bytes_of(q, 0)
    assert.equal("Q4_1", name)
    assert.equal(hand.hex("0038 00c2 00112233445566778899aabbccddeeff"):rep(2), bytes)
    assert.equal("Q4_0", grid.exact_type(counted(4, 32, { scales = floats(1, 0.5), zeros = floats(1, 4),
      group_size = 32 })))
  end)

  it("of 8 bits around 128, or of 4 bits around any whole number, is Q8_0", function()
    local q = counted(8, 32, { scales = floats(1, 0.25), zeros = floats(1, 32), group_size = 32 })
    local bytes, name = bytes_of(q, 0)
    assert.equal("Q8_0", name)
    local expected = "\0\52"
    for code = 0, 31 do expected = expected .. string.char(code + 128) end
    assert.equal(expected, bytes)
    -- Zero point 11 and a scale of eleven bits, whose product is no f16.
    q = counted(4, 32, { scales = floats(1, 2047), zeros = fields(1, 0xaaaaaaaa - 2 ^ 32), asym = true,
      group_size = 32 })
    bytes, name = bytes_of(q, 0)
    assert.equal("Q8_0", name)
    assert.equal(string.char(0xff, 0x67, 256 - 11, 256 - 10), bytes:sub(1, 4))
  end)

  it("that no block holds says why", function()
    local function refused(words, q)
      local name, reason = grid.exact_type(q)
      assert.is_nil(name)
      assert.equal(words, reason)
    end
    local asym = { asym = true, group_size = 32 }
    local function with(parts)
      for key, value in pairs(asym) do if parts[key] == nil then parts[key] = value end end
      return parts
    end
    refused("the scale of group 0, column 0, 0.100000001, is no f16",
      counted(4, 32, with { scales = floats(1, 0.1, "f32"), zeros = fields(1, 0x77777777) }))
    refused("the zero of group 0, column 0, 0.100000001, is no whole multiple of its scale 0.25, and the least "
      .. "value of group 0, column 0, -0.100000001, is no f16", counted(4, 32, { scales = floats(1, 0.25, "f32"),
      zeros = floats(1, 0.1, "f32"), group_size = 32 }))
    refused("the zero of group 0, column 0, 0.125, is no whole multiple of its scale 0.25, and its codes have 8 bits",
      counted(8, 32, { scales = floats(1, 0.25), zeros = floats(1, 0.125), group_size = 32 }))
    refused("codes less zero points reach from -1 to 254, and Q8_0 from -128 to 127",
      counted(8, 32, with { scales = floats(1, 1), zeros = fields(1, 0, 8) }))
    refused("inputs 0 and 16 are of groups 0 and 1, and a block of 32 has one scale",
      counted(4, 32, { scales = floats(2, 1), zeros = fields(2, 0x77777777), asym = true, group_size = 16 }))
    local order = {}
    for i = 1, 64 do order[i] = (i - 1) % 2 end
    refused("inputs 0 and 1 are of groups 0 and 1, and a block of 32 has one scale", counted(4, 64,
      with { scales = floats(2, 1), zeros = fields(2, 0x77777777), g_idx = qm.tensor(order, { dtype = "i32",
        device = device }) }))
    refused("its channel_scale multiplies activations, for which GGUF has no place", counted(4, 32, {
      scales = floats(1, 1), zeros = floats(1, 8), group_size = 32, layer_type = 2,
      channel_scale = qm.full({ 32 }, 2, { dtype = "f16", device = device }) }))
  end)

  it("keeps features in their order, whichever way the codes lie", function()
    local order = {}
    for i = 0, 31 do order[i + 1] = (i * 7) % 32 end
    local q = counted(4, 32, { scales = floats(1, 1), zeros = floats(1, 8), group_size = 32, layer_type = 2,
      q_perm = qm.tensor(order, { dtype = "i32", device = device }) })
    local file = folder .. "/q.gguf"
    local bytes = bytes_of(q, 0)
    qm.gguf.save(file, { { "w", { type = "Q4_0", shape = { 1, 32 }, write = function(put) put(bytes) end } } }, {})
    local w = q:dequantize("f32"):to("cpu"):totable()
    qm.gguf.with(file, function(x)
      for i, value in ipairs(x:tensor("w", "cpu"):totable()[1]) do assert.equal(w[i][1], value) end
    end)
  end)
end)

local BASE = { vocab_size = 70, hidden_size = 64, intermediate_size = 96, num_hidden_layers = 2,
  num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 32, initializer_range = 0.2 }
local function with(changes)
  local config = {}
  for key, value in pairs(BASE) do config[key] = value end
  for key, value in pairs(changes or {}) do config[key] = value end
  return config
end
local LLAMA3 = { rope_type = "llama3", factor = 4, low_freq_factor = 1, high_freq_factor = 4,
  original_max_position_embeddings = 16 }
local GPT2 = { vocab_size = 70, n_embd = 64, n_layer = 2, n_head = 4, n_positions = 32, initializer_range = 0.2 }
local MODELS = {
  { "llama", "llama", with({ rope_scaling = LLAMA3, tie_word_embeddings = true }) },
  { "llama", "llama", with({ attention_bias = true, output_bias = true, mlp_bias = true, head_dim = 32 }) },
  { "qwen2", "llama", with({ attention_bias = true }) },
  { "qwen3", "llama", with({ qk_norm = true, head_dim = 32 }) },
  { "gpt2", "gpt2", GPT2 },
}
local LINEAR = {
  { "F32", { kind = "dense" } }, { "Q8_0", { w_bit = 4, group_size = 32 } },
  { "Q4_1", { w_bit = 4, group_size = 64, asym = false } }, { "Q4_0", { w_bit = 2, group_size = 32 } },
}

local function fresh(class, config, linear)
  return qm.models[class].new(config, { dtype = "f32", linear = linear or { kind = "dense" }, device = device })
end

---Check a tensor of a file: rows first, llama's queries and keys in pairs.
local function assert_holds(entry, heads, read, name)
  local x = entry.param
  if qm.nn.is_quantized(x) then x = x:dequantize("f32") end
  if #x.shape == 2 and getmetatable(entry.layer) ~= qm.nn.Embedding then x = x:transpose() end
  assert.same(x.shape, read.shape, name)
  local ours, theirs, rows = x:host(), read:host(), x.shape[1]
  local columns, half = x:count() / rows, heads and rows / heads / 2
  for h = 0, heads and heads - 1 or rows - 1 do
    for i = 0, heads and half - 1 or 0 do
      for j = 0, heads and 1 or 0 do
        local from, to = heads and h * 2 * half + j * half + i or h, heads and h * 2 * half + 2 * i + j or h
        for c = 0, columns - 1 do
          assert(ours[from * columns + c] == theirs[to * columns + c], name)
        end
      end
    end
  end
end

describe("qm.gguf.export", function()
  for i, case in ipairs(MODELS) do
    for _, linear in ipairs(LINEAR) do
      it(("writes what decodes to the same bits: %s (%d), %s"):format(case[1], i, linear[1]), function()
        local model, path = fresh(case[2], case[3], linear[2]), folder .. "/m.gguf"
        local report = qm.gguf.export(model, path)
        local architecture, kinds = architectures.of("spec", model), {}
        for _, tensor in ipairs(report.tensors) do kinds[tensor.name] = tensor.type end
        qm.gguf.with(path, function(file)
          assert.equal(case[1], file.metadata["general.architecture"])
          assert.equal(#report.tensors, #file:names())
          for _, entry in ipairs(model:published_parameters()) do
            local name, heads = architectures.tensor_name("spec", architecture, entry.path,
              entry.name:match("[^.]+$"))
            assert_holds(entry, heads, file:tensor(name), name)
            assert.equal(kinds[name], (file:info(name)))
          end
          assert.equal(linear[1], (file:info("blk.1.ffn_down.weight")))
          assert.equal("F32", (file:info("blk.1.attn_norm.weight")))
        end)
        assert.same({}, qm.inspection.open(path).problems)
      end)
    end
  end

  it("gives llama.cpp the numbers of the model", function()
    local function metadata(class, config)
      local path = folder .. "/m.gguf"
      qm.gguf.export(fresh(class, config), path, { name = "Moon" })
      return qm.gguf.with(path, function(file)
        return file.metadata, file:has("rope_freqs.weight") and file:tensor("rope_freqs.weight", "cpu"):totable()
      end)
    end
    local m, factors = metadata("llama", with({ rope_scaling = LLAMA3, rope_theta = 1e4 }))
    assert.same({ 2, 32, 64, 96, 4, 2, 16, 16, 16, 1e4, 70, "Moon", 0, "none" }, { m["llama.block_count"],
      m["llama.context_length"], m["llama.embedding_length"], m["llama.feed_forward_length"],
      m["llama.attention.head_count"], m["llama.attention.head_count_kv"], m["llama.attention.key_length"],
      m["llama.attention.value_length"], m["llama.rope.dimension_count"], m["llama.rope.freq_base"],
      m["llama.vocab_size"], m["general.name"], m["general.file_type"], m["tokenizer.ggml.model"] })
    assert.near(1e-5, m["llama.attention.layer_norm_rms_epsilon"], 1e-12)
    -- Pair 0 turns 16 / 2 pi = 2.5 times in the original context: between low 1 and high 4. The last pairs, of
    -- less than one turn, are slower by the whole factor.
    local kept = (16 / (2 * math.pi) - 1) / 3
    assert.near(1 / ((1 - kept) / 4 + kept), factors[1], 1e-6)
    assert.same({ 8, 4 }, { #factors, factors[8] })
    m = metadata("llama", with({ rope_scaling = { rope_type = "linear", factor = 8 } }))
    assert.same({ "linear", 8 }, { m["llama.rope.scaling.type"], m["llama.rope.scaling.factor"] })
    m = metadata("gpt2", GPT2)
    assert.same({ 2, 32, 64, 256, 4 }, { m["gpt2.block_count"], m["gpt2.context_length"],
      m["gpt2.embedding_length"], m["gpt2.feed_forward_length"], m["gpt2.attention.head_count"] })
    assert.near(1e-5, m["gpt2.attention.layer_norm_epsilon"], 1e-12)
  end)

  it("bounds the context by a window that llama.cpp's architecture does not have", function()
    local report = qm.gguf.export(fresh("llama", with({ sliding_window = 8 })), folder .. "/m.gguf")
    assert.truthy(report.notes[1]:find("context_length is 8", 1, true))
    qm.gguf.with(folder .. "/m.gguf", function(file) assert.equal(8, file.metadata["llama.context_length"]) end)
  end)

  it("refuses what no block holds, by name and reason, or rounds it to F16 and says so", function()
    local model, path = fresh("llama", BASE, { w_bit = 8, group_size = 32, asym = false }), folder .. "/m.gguf"
    assert.error_matches(function() qm.gguf.export(model, path) end,
      "qm.gguf.export: tensor 'model.layers.0.self_attn.q_proj': neither Q4_0, Q4_1 nor Q8_0 holds it exactly: the "
      .. "zero of group 0, column 0", 1, true)
    assert.same({}, qm.files.list(folder))
    local report = qm.gguf.export(model, path, { otherwise = "f16" })
    local rounded = 0
    for _, tensor in ipairs(report.tensors) do
      if tensor.reason then rounded = rounded + 1 end
      assert.equal(tensor.reason and "F16" or "F32", tensor.type)
    end
    assert.equal(14, rounded)
    qm.gguf.with(path, function(file)
      local w = model.model.layers[1].mlp.down_proj.weight:dequantize("f16"):transpose():to("cpu")
      testing.assert_equal(w, file:tensor("blk.0.ffn_down.weight", "cpu"))
      assert.equal(1, file.metadata["general.file_type"])
    end)
    -- What scales the activations goes into the weights.
    local scale = qm.full({ 96 }, 2, { device = device, dtype = "f16" })
    local q = qm.QParam.quantize(qm.ones({ 96, 64 }, { device = device }), { w_bit = 4, group_size = 32, asym = false,
      channel_scale = scale, layer_type = 2 })
    rawset(model.model.layers[1].mlp, "down_proj", qm.nn.QLinear.from(q))
    qm.gguf.export(model, path, { otherwise = "f16" })
    qm.gguf.with(path, function(file)
      assert.equal(2, file:tensor("blk.0.ffn_down.weight", "cpu"):at(64, 96))
    end)
  end)

  it("stores dense matrices in the type that is asked for, and nothing that is not finite", function()
    local model, path = fresh("gpt2", GPT2), folder .. "/m.gguf"
    for dtype, kind in pairs({ f16 = "F16", bf16 = "BF16" }) do
      qm.gguf.export(model, path, { dtype = dtype })
      qm.gguf.with(path, function(file)
        local w = model.transformer.wte.weight:to(dtype):to("cpu")
        testing.assert_equal(w, file:tensor("token_embd.weight", "cpu"))
        for name, wanted in pairs({ ["token_embd.weight"] = kind, ["blk.0.attn_qkv.weight"] = kind,
          ["position_embd.weight"] = "F32", ["blk.0.attn_qkv.bias"] = "F32" }) do
          assert.equal(wanted, (file:info(name)))
        end
      end)
    end
    model.transformer.h[2].mlp.c_fc.weight:fill(7e4)
    assert.error_matches(function() qm.gguf.export(model, path, { dtype = "f16" }) end,
      "tensor 'blk.1.ffn_up.weight': it holds a value that is not finite as f16", 1, true)
    assert.same({ "m.gguf" }, qm.files.list(folder))
  end)

  it("is a script, too", function()
    local model = fresh("llama", BASE, { w_bit = 8, group_size = 32, asym = false })
    model:save(folder .. "/m", { dtype = "bf16" })
    local command = ("bin/quartermoon scripts/export_gguf.lua %s/m %s/m.gguf"):format(folder, folder)
    local output, status = process.run(command)
    assert.equal(1, status)
    assert.truthy(output:find("tensor 'model.layers.0.self_attn.q_proj': neither Q4_0", 1, true), output)
    output, status = process.run(command .. " --otherwise f16")
    assert.equal(0, status, output)
    assert.truthy(output:find("blk.1.ffn_up.weight is rounded to F16: the zero of group 0", 1, true), output)
    assert.truthy(output:find("m.gguf: 21 tensors, 2 BF16, 14 F16, 5 F32", 1, true), output)
  end)

  it("refuses what llama.cpp would compute otherwise", function()
    local function refuse(words, class, config)
      assert.error_matches(function() qm.gguf.export(fresh(class, config), folder .. "/m.gguf") end, words, 1, true)
    end
    refuse("llama.cpp's 'qwen3', which alone has qk_norm, has no biases", "llama",
      with({ qk_norm = true, mlp_bias = true }))
    local function gpt2(key, value)
      local config = { [key] = value }
      for name, own in pairs(GPT2) do config[name] = own end
      return config
    end
    refuse("activation_function is gelu; llama.cpp's 'gpt2' has only GELU's tanh form", "gpt2",
      gpt2("activation_function", "gelu"))
    refuse("scale_attn_weights is false", "gpt2", gpt2("scale_attn_weights", false))
    refuse("scale_attn_by_inverse_layer_idx is true", "gpt2", gpt2("scale_attn_by_inverse_layer_idx", true))
    assert.error_matches(function() qm.gguf.export({}, "x") end, "argument 'model': expected a language model", 1, true)
    assert.error_matches(function() qm.gguf.export(fresh("gpt2", GPT2), "x", { otherwise = "f8" }) end,
      "argument 'otherwise': expected one of 'refuse', 'f16'", 1, true)
  end)
end)
