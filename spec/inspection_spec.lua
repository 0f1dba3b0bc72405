-- What `quartermoon inspect` lists, and that every kind of damage is named by file, tensor and reason.
local qm = require("quartermoon")
local process = require("spec.support.process")

local CONFIG = { model_type = "llama", architectures = { "LlamaForCausalLM" }, vocab_size = 8, hidden_size = 64,
  intermediate_size = 32, num_hidden_layers = 1, num_attention_heads = 2, rms_norm_eps = 1e-5,
  tie_word_embeddings = true, rope_theta = 10000, torch_dtype = "float16" }
local GPTQ = { quant_method = "gptq", bits = 4, group_size = 32, sym = true, desc_act = false }

local function u64(value)
  local bytes = {}
  for i = 1, 8 do bytes[i], value = string.char(value % 256), math.floor(value / 256) end
  return table.concat(bytes)
end

---A file of one's own header.
local function container(header, data) return u64(#header) .. header .. data end

describe("qm.inspection", function()
  local folder, remove_folder
  before_each(function() folder, remove_folder = process.folder() end)
  after_each(function() remove_folder() end)

  local function f16(...) return qm.ones({ ... }, { dtype = "f16" }) end
  local function i32(value, ...) return qm.full({ ... }, value, { dtype = "i32" }) end

  ---The tensors of a small Llama whose linears are GPTQ's, 4 bits in groups of 32.
  local function tensors()
    local all = { ["model.embed_tokens.weight"] = f16(8, 64), ["model.norm.weight"] = f16(64) }
    local layer = "model.layers.0."
    all[layer .. "input_layernorm.weight"], all[layer .. "post_attention_layernorm.weight"] = f16(64), f16(64)
    for name, size in pairs({ ["self_attn.q_proj"] = { 64, 64 }, ["self_attn.k_proj"] = { 64, 64 },
      ["self_attn.v_proj"] = { 64, 64 }, ["self_attn.o_proj"] = { 64, 64 }, ["mlp.gate_proj"] = { 64, 32 },
      ["mlp.up_proj"] = { 64, 32 }, ["mlp.down_proj"] = { 32, 64 } }) do
      local k, n, at = size[1], size[2], layer .. name
      all[at .. ".qweight"], all[at .. ".qzeros"] = i32(0, k / 8, n), i32(0x77777777, k / 32, n / 8)
      all[at .. ".scales"] = f16(k / 32, n)
      local g_idx = {}
      for i = 1, k do g_idx[i] = math.floor((i - 1) / 32) end
      all[at .. ".g_idx"] = qm.tensor(g_idx, { dtype = "i32" })
    end
    return all
  end

  local function write(all, config, name)
    qm.safetensors.save(folder .. "/" .. (name or "model.safetensors"), all)
    local copy = { quantization_config = GPTQ }
    for key, value in pairs(CONFIG) do copy[key] = value end
    for key, value in pairs(config or {}) do copy[key] = value end
    qm.files.write_json(folder .. "/config.json", copy)
  end

  local function problems() return qm.inspection.open(folder).problems end

  ---One problem, whose words hold these.
  local function expect(...)
    local found = problems()
    for _, words in ipairs({ ... }) do
      local seen = false
      for _, problem in ipairs(found) do seen = seen or problem:find(words, 1, true) ~= nil end
      assert.is_true(seen, "no '" .. words .. "' in:\n" .. table.concat(found, "\n"))
    end
    assert.equal(select("#", ...), #found, table.concat(found, "\n"))
  end

  it("lists a quantized model folder and finds nothing wrong", function()
    write(tensors())
    local report = qm.inspection.open(folder)
    assert.same({}, report.problems)
    assert.equal("model folder", report.kind)
    local up
    for _, w in ipairs(report.weights) do if w.name:find("up_proj") then up = w end end
    assert.same({ "gptq", 64, 32, 4, 32, 2 }, { up.format, up.k, up.n, up.bits, up.group_size, up.groups })
    local text = qm.inspection.text(report)
    for _, words in ipairs({ "model.layers.*.self_attn.q_proj", "[64, 64]", "gptq, 4 bits, group 32, symmetric",
      "stored minus one (v1)", "bits per weight", "nothing wrong was found" }) do
      assert.truthy(text:find(words, 1, true), words .. " in\n" .. text)
    end
  end)

  it("reads the bits of every format from the shapes", function()
    local order = {}
    for i = 1, 64 do order[i] = 64 - i end
    local perm = qm.tensor(order, { dtype = "i16" })
    local function one(parts)
      qm.safetensors.save(folder .. "/x.safetensors", parts)
      local report = qm.inspection.open(folder .. "/x.safetensors")
      assert.same({}, report.problems)
      local w = report.weights[1]
      return { w.format, w.k, w.n, w.bits, w.group_size }
    end
    assert.same({ "gptq", 64, 32, 3, 32 },
      one({ qweight = i32(0, 6, 32), qzeros = i32(0, 2, 3), scales = f16(2, 32) }))
    assert.same({ "awq", 64, 32, 4, 16 },
      one({ qweight = i32(0, 64, 4), qzeros = i32(0, 4, 4), scales = f16(4, 32) }))
    assert.same({ "mbwq", 64, 32, 2, 32 },
      one({ qweight = i32(0, 4, 32), scales = f16(2, 32), zeros = f16(2, 32), q_perm = perm }))
    local groups = qm.tensor({ 8, 0, 4, 8 }, { dtype = "i16" })
    assert.same({ "exl2", 64, 32, 6 }, one({ q_weight = i32(0, 12, 32), q_groups = groups, q_scale = i32(0, 2, 4),
      q_scale_max = f16(2), q_invperm = qm.tensor(order, { dtype = "i32" }) }))
  end)

  it("names what is missing from a sharded folder, and what its index says wrongly", function()
    local all, first, second = tensors(), {}, {}
    local map, total = {}, 0
    for name, tensor in pairs(all) do
      local half = name:find("self_attn") and second or first
      half[name], map[name] = tensor, half == first and "a.safetensors" or "b.safetensors"
      total = total + tensor:size_bytes()
    end
    write(first, nil, "a.safetensors")
    write(second, nil, "b.safetensors")
    local index = folder .. "/model.safetensors.index.json"
    qm.files.write_json(index, { metadata = { total_size = total }, weight_map = map })
    assert.same({}, problems())
    map["model.norm.weight"] = nil
    map["lm_head.weight"] = "../../secret"
    qm.files.write_json(index, { metadata = { total_size = total + 1 }, weight_map = map })
    expect("tensor 'model.norm.weight' is not in the index", "'../../secret', which is no file of this folder",
      "tensor 'lm_head.weight' is not in '../../secret'", "it says that the tensors have")
    map["lm_head.weight"], map["model.norm.weight"] = nil, "a.safetensors"
    qm.files.write_json(index, { weight_map = map })
    os.remove(folder .. "/b.safetensors")
    local text = table.concat(problems(), "\n")
    assert.truthy(text:find("the file 'b.safetensors' is missing", 1, true), text)
    assert.truthy(text:find("the weight 'model.layers.0.self_attn.k_proj' that it needs is in no file", 1, true), text)
  end)

  it("compares with config.json", function()
    write(tensors(), { hidden_size = 128, num_attention_heads = 4, head_dim = 16 })
    local text = table.concat(problems(), "\n")
    for _, words in ipairs({ "model.safetensors: tensor 'model.norm.weight' is [64]; config.json wants [128]",
      "'model.layers.0.mlp.up_proj' (gptq) is [64, 32]; config.json wants [128, 32]" }) do
      assert.truthy(text:find(words, 1, true), text)
    end
    write(tensors(), { num_hidden_layers = 1.5 })
    expect("config.json: num_hidden_layers is 1.5, not a number from 1")
    write(tensors(), { tie_word_embeddings = false })
    expect("the weight 'lm_head' that it needs is in no file")
    write(tensors(), { quantization_config = { quant_method = "gptq", bits = 3, group_size = 32, sym = false } })
    expect("config.json: it says 3 bits;")
    write(tensors(), { quantization_config = { quant_method = "gptq", bits = 4, checkpoint_format = "gptq_v2" } })
    expect("it says gptq_v2 (zero points v2), but all of them are stored v1")
  end)

  it("looks at scales, indices and permutations", function()
    local at = "model.layers.0.mlp.up_proj."
    local function damaged(part, tensor, ...)
      local all = tensors()
      all[at .. part] = tensor
      write(all)
      expect(...)
    end
    local scales = f16(2, 32):to("f32")
    local values = scales:totable()
    values[1][3], values[2][1] = 0 / 0, math.huge
    damaged("scales", qm.tensor(values, { dtype = "f16" }), "up_proj' (gptq): scales hold 2 values that are NaN")
    damaged("scales", qm.zeros({ 2, 32 }, { dtype = "f16" }), "up_proj' (gptq): scales are all zero")
    damaged("scales", f16(4, 32), "qzeros have 2 groups, scales 4", "64 rows in groups of 32 are not the 4 groups")
    damaged("g_idx", i32(2, 64), "g_idx goes from 2 to 2, but there are 2 groups")
    damaged("g_idx", i32(0, 32), "g_idx has 32 entries for 64 rows")
    qm.safetensors.save(folder .. "/x.safetensors", { qweight = i32(0, 4, 32), scales = f16(2, 32),
      zeros = f16(2, 32), q_perm = qm.full({ 64 }, 5, { dtype = "i16" }) })
    local found = qm.inspection.open(folder .. "/x.safetensors").problems
    assert.truthy(found[1]:find("q_perm is no permutation: 0 does not occur", 1, true), found[1])
    local x = qm.tensor({ 1, 0 / 0 })
    qm.safetensors.save(folder .. "/x.safetensors", { x = x })
    assert.equal(0, #qm.inspection.open(folder .. "/x.safetensors").problems)
    assert.equal("x.safetensors: tensor 'x' holds 1 values that are NaN or infinite",
      qm.inspection.open(folder .. "/x.safetensors", { values = true }).problems[1])
  end)

  local DAMAGED = {
    { "F32 that overlap", '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
      .. '"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8, "tensor 'b' overlaps tensor 'a'" },
    { "holes", '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8, "bytes 0 to 4 of the data belong to no" },
    { "unknown types", '{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}', 8, "tensor 'a': unknown dtype 'F33'" },
    { "shapes that do not fit", '{"a":{"dtype":"I8","shape":[3,3],"data_offsets":[0,8]}}', 8,
      "tensor 'a': I8 [3, 3] takes 9 bytes, its data_offsets hold 8" },
    { "extents that are none", '{"a":{"dtype":"I8","shape":[-8],"data_offsets":[0,8]}}', 8, "tensor 'a': its shape" },
    { "truncated data", '{"a":{"dtype":"I8","shape":[9],"data_offsets":[0,9]}}', 8, "the file is truncated" },
    { "names that come twice", '{"a":{"dtype":"I8","shape":[8],"data_offsets":[0,8]},'
      .. '"a":{"dtype":"I8","shape":[8],"data_offsets":[0,8]}}', 8, "duplicate object key" },
    { "no JSON", "{", 0, "the header is not a JSON object" },
  }
  for _, case in ipairs(DAMAGED) do
    it("names " .. case[1], function()
      local path = folder .. "/bad.safetensors"
      process.write(path, container(case[2], ("x"):rep(case[3])))
      local found = qm.inspection.open(path).problems
      assert.truthy(table.concat(found, "\n"):find("bad.safetensors: ", 1, true))
      assert.truthy(table.concat(found, "\n"):find(case[4], 1, true), table.concat(found, "\n"))
      assert.is_false((pcall(qm.safetensors.open, path))) -- which the reader refuses too
    end)
  end

  it("looks into checkpoints", function()
    local model = qm.models.llama.new({ vocab_size = 32, hidden_size = 32, intermediate_size = 64,
      num_hidden_layers = 1, num_attention_heads = 2 }, { linear = { kind = "mpq", w_bit = 2, group_size = 32 } })
    qm.checkpoints.save(folder .. "/run", { step = 3, model = model, optim = qm.optim.new(model) })
    local report = qm.inspection.open(folder .. "/run")
    assert.same({}, report.problems)
    assert.equal("checkpoint", report.kind)
    local found
    for _, w in ipairs(report.weights) do if w.name:find("up_proj") then found = w end end
    assert.same({ 32, 64, 2, 32 }, { found.k, found.n, found.bits, found.group_size })
  end)

  it("looks into tokenizers, and leaves pickles alone", function()
    qm.tokenizer.byte():save(folder .. "/tokenizer.json")
    assert.same({ "tokenizer", "tokenizer.json: byte, 256 tokens" },
      qm.inspection.open(folder .. "/tokenizer.json").facts[1])
    write(tensors(), { quantization_config = GPTQ })
    expect("tokenizer.json: it has 256 tokens, but config.json's vocab_size is 8")
    process.write(folder .. "/tokenizer.json", "{}")
    expect("tokenizer.json: ")
    os.remove(folder .. "/tokenizer.json")
    process.write(folder .. "/pytorch_model.bin", "x")
    assert.truthy(qm.inspection.text(qm.inspection.open(folder)):find("pickles run code", 1, true))
  end)

  it("is a command, whose status says whether something is wrong", function()
    local command = process.quote(process.root() .. "/bin/quartermoon") .. " inspect "
    write(tensors())
    local text, status = process.run(command .. folder .. " --all")
    assert.equal(0, status)
    assert.truthy(text:find("model.layers.0.mlp.up_proj", 1, true), text)
    qm.files.write(folder .. "/model.safetensors", "short")
    text, status = process.run(command .. folder)
    assert.equal(1, status)
    assert.truthy(text:find("model.safetensors: 5 bytes are too few for a safetensors file", 1, true), text)
    text, status = process.run(command .. folder .. "/none")
    assert.equal(1, status)
    assert.truthy(text:find("No such file or directory", 1, true), text)
    assert.equal(2, (select(2, process.run(command))))
  end)

  it("gives plain data, which nobody adds to", function()
    process.write(folder .. "/x.safetensors", container("{}", ""))
    assert.is_nil(getmetatable(qm.inspection.open(folder .. "/x.safetensors")))
  end)

  it("prints no control characters of a file's names", function()
    process.write(folder .. "/x.safetensors",
      container('{"a\\u001b[2J":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "x"))
    assert.falsy(qm.inspection.text(qm.inspection.open(folder .. "/x.safetensors")):find("\27", 1, true))
  end)
end)
