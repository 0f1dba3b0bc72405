-- Whole model folders in each quantized format: written by us, loaded, trained a step, saved again.
local qm = require("quartermoon")
local module = require("quartermoon.nn.module")
local mpq = require("spec.support.mpq")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local device = testing.device
local CONFIG = { vocab_size = 64, hidden_size = 64, intermediate_size = 96, num_hidden_layers = 2,
  num_attention_heads = 2, num_key_value_heads = 1, max_position_embeddings = 32, initializer_range = 0.2 }

---A Llama whose linear layers `make(k, n, path)` gives.
local function model_of(make)
  local model = qm.models.llama.new(CONFIG, { dtype = "f32", linear = { kind = "dense" }, device = device })
  local function walk(parent, prefix)
    for _, name in ipairs(parent.members) do
      local child = parent[name]
      if getmetatable(child) == qm.nn.Linear and prefix ~= "" then
        local k, n = unpack(child.weight.shape)
        rawset(parent, name, qm.nn.QLinear.from(make(k, n, prefix .. name, child.weight)))
      elseif module.is_module(child) then
        walk(child, prefix .. name .. ".")
      end
    end
  end
  walk(model, "")
  return model
end

local function logits(model)
  local tokens = qm.tensor({ 3, 1, 4, 1, 5, 9, 2, 6, 5 }, { dtype = "i32", device = device })
  return qm.no_grad(model.logits, model, tokens)
end

local function load(folder)
  return qm.models.load(folder, { dtype = "f32", device = device, on_note = function() end })
end

local function quantize(options)
  return function(_, _, _, w)
    local own = {}
    for key, value in pairs(options) do own[key] = value end
    return qm.QParam.quantize(w, own)
  end
end

---Random EXL2 tensors: 5 and 3 bits, a permutation.
local function exl2(k, n)
  local q = mpq.random(k, n, { sections = { { w_bit = 5, rows = 32 }, { w_bit = 3, rows = k - 32 } } })
  local groups = #q.q_groups / 2
  local levels = {}
  for g = 1, groups do
    levels[g] = {}
    for i = 1, n / 8 do levels[g][i] = math.random(0, 2 ^ 31 - 1) end
  end
  return qm.QParam.import("exl2", { q_weight = q.data:to(device), q_invperm = mpq.permutation(k):to(device),
    q_scale = qm.tensor(levels, { dtype = "i32", device = device }),
    q_scale_max = qm.rand({ groups }, { device = device }, 0.05, 0.1):to("f16"),
    q_groups = qm.tensor(q.q_groups, { dtype = "i16", device = device }) })
end

---bitorch-engine's layer kind 2, with a permutation and scales of the channels.
local function mbwq(w_bit, group_size)
  return function(k, _, _, w)
    return qm.QParam.quantize(w, { w_bit = w_bit, group_size = group_size, asym = false, layer_type = 2,
      q_perm = mpq.permutation(k):to(device), channel_scale = qm.rand({ k }, { device = device }, 0.5, 2):to("f16") })
  end
end

local CASES = {
  { "AWQ", "awq", quantize { w_bit = 4, group_size = 32, zero_offset = 0 } },
  { "AWQ with a short last group", "awq", quantize { w_bit = 4, group_size = 64, zero_offset = 0 } },
  { "EXL2", "exl2", exl2 },
  { "MBWQ of 4 bits", "mbwq", mbwq(4, 32) },
  { "MBWQ of 2 bits with a short last group", "mbwq", mbwq(2, 64) },
  { "MBWQ of one group", "mbwq", mbwq(4, -1) },
  { "MBWQ of mixed widths", "mbwq", function(k, _, _, w)
    return qm.QParam.quantize(w, { sections = { { w_bit = 8, rows = 32, group_size = 32 },
      { w_bit = 2, rows = k - 32, group_size = 64 } }, layer_type = 2, q_perm = mpq.permutation(k):to(device) })
  end },
  { "MPQ", "mpq", quantize { w_bit = 4, group_size = 32, asym = false } },
  { "MPQ of 2 bits with a short last group", "mpq", quantize { w_bit = 2, group_size = 64, asym = false } },
}

describe("A folder in the format", function()
  local root, remove_root
  setup(function() root, remove_root = process.folder() end)
  teardown(function() remove_root() end)

  for i, case in ipairs(CASES) do
    local title, format, make = unpack(case)
    it(title .. " gives back the logits, trains and is saved again", function()
      local model, folder = model_of(make), root .. "/" .. i
      model:save(folder, { format = format })
      assert.same({}, qm.inspection.open(folder).problems)
      local again = load(folder)
      testing.assert_equal(logits(model), logits(again), "logits")
      assert.same(model:bits_per_weight(), (again:bits_per_weight()))
      local optim = qm.optim.new(again, { lr = 1e-2 })
      local tokens = qm.tensor({ 3, 1, 4, 1, 5, 9, 2, 6 }, { dtype = "i32", device = device })
      local before = again:loss(tokens, tokens)
      before:backward()
      optim:step()
      optim:zero_grad()
      assert.is_true(again:loss(tokens, tokens):item() < before:item())
      again:save(folder .. "t", { format = format })
      testing.assert_equal(logits(again), logits(load(folder .. "t")), "logits after training")
    end)
  end

  it("MPQ, doubly quantized, is loaded and becomes plain", function()
    local parts, folder = {}, root .. "/double"
    local function random(dtype, low, high, ...)
      return qm.rand({ ... }, { device = device }, low, high):to(dtype)
    end
    local model = model_of(function(k, n, path)
      local fields = { qweight = mpq.random(k, n, { w_bit = 4, asym = false }).data:to(device),
        qstatistic = random("u8", 0, 256, k / 32, n / 32, 32), qscales_zeros = random("f16", 0, 1, k / 32, n / 32, 1),
        qscales_scales = random("f16", 0.001, 0.002, k / 32, n / 32, 1),
        qzeros_zeros = random("f16", 7, 8, k / 32, n / 32, 1),
        qzeros_scales = random("f16", 0, 0.01, k / 32, n / 32, 1) }
      for field, tensor in pairs(fields) do
        parts[path .. "." .. field], fields[field] = tensor, tensor:clone():keep()
      end
      return qm.QParam.import("mpq", fields, { bits = 4 })
    end)
    model:save(folder, { format = "mpq" })
    qm.safetensors.with(folder .. "/model.safetensors", function(file)
      for _, key in ipairs(file:names()) do
        if key:find("norm") or key:find("embed") or key:find("lm_head") then parts[key] = file:tensor(key) end
      end
    end)
    qm.safetensors.save(folder .. "/model.safetensors", parts)
    local again = load(folder)
    testing.assert_equal(logits(model), logits(again), "logits")
    again:save(folder .. "2")
    testing.assert_equal(logits(model), logits(load(folder .. "2")), "logits of the plain folder")
  end)

  it("GPTQ by GPTQModel gives its logits: act-order, zero points of 0 that borrowed from their neighbours", function()
    -- Written and computed by GPTQModel 7.7 on a CPU, in f16: random weights, 2 bits, a third of the columns positive.
    local folder = "spec/fixtures/gptqmodel"
    local function relative(model)
      return qm.safetensors.with(folder .. "/logits.safetensors", function(file)
        local theirs = file:tensor("logits", device):to("f32")
        local gap = qm.no_grad(model.logits, model, file:tensor("tokens", device)) - theirs
        return math.sqrt(gap:square():sum():item() / theirs:square():sum():item())
      end)
    end
    local model = load(folder)
    assert.truthy(model.model.layers[1].mlp.down_proj.weight.g_idx)
    assert.near(0, relative(model), 4 * 2 ^ -11) -- roundings to f16 in a row of four products
    assert.near(0, relative(load(model:save(root .. "/theirs"))), 4 * 2 ^ -11)
    -- Of another maker the same bits are other zero points.
    local config = qm.files.read_json(folder .. "/config.json")
    config.quantization_config.meta.quantizer = "other:1"
    local other = root .. "/other"
    qm.files.make_folder(other)
    qm.files.write_json(other .. "/config.json", config)
    qm.files.write(other .. "/model.safetensors", qm.files.read(folder .. "/model.safetensors"))
    assert.is_true(relative(load(other)) > 0.05)
  end)

  it("AWQ has one size of groups, or is refused by tensor and sizes", function()
    local count = 0
    local model = model_of(function(_, _, _, w)
      count = count + 1
      return qm.QParam.quantize(w, { w_bit = 4, group_size = count == 3 and 16 or 32, zero_offset = 0 })
    end)
    assert.error_matches(function() model:save(root .. "/no", { format = "awq" }) end,
      "tensor 'model.layers.0.self_attn.v_proj': groups of 16 beside groups of 32", 1, true)
  end)
end)

describe("quant_strategy.json", function()
  local root, remove_root
  setup(function() root, remove_root = process.folder() end)
  teardown(function() remove_root() end)

  it("says widths, shares and group sizes in the order of the widths", function()
    local folder = model_of(CASES[7][3]):save(root .. "/mixed", { format = "mbwq" })
    local text = qm.files.read(folder .. "/quant_strategy.json")
    local layer = qm.files.read_json(folder .. "/quant_strategy.json").measurement["model.layers.1"].down_proj
    assert.same({ { 8, 2 }, { ["8"] = 32, ["2"] = 64 }, 4 }, { layer.bits, layer.group_size, layer.scale_bits })
    -- A loader takes the floor of K times the share: 32 and 64 of 96 rows.
    assert.equal(32, math.floor(96 * layer.bits_prop[1]))
    assert.near(1, layer.bits_prop[1] + layer.bits_prop[2], 1e-12)
    assert.truthy(text:find('"group_size": {%s*"8": 32,%s*"2": 64'))
  end)

  it("is held against the tensors, and needed where these do not tell", function()
    local folder = model_of(mbwq(2, 64)):save(root .. "/short", { format = "mbwq" })
    local path = folder .. "/quant_strategy.json"
    local good = qm.files.read(path)
    local function refused(text, words)
      if text then qm.files.write(path, text) else os.remove(path) end
      assert.error_matches(function() load(folder) end, words, 1, true)
    end
    refused(good:gsub('"2": 64', '"2": "x"'), path .. ": key 'group_size.2' of ")
    refused(good:gsub('"2": 64', '"2": 7'), "argument 'scales': expected G=")
    refused(good:gsub("2%s*%],%s*\"bits_prop", '4 ], "bits_prop'),
      "expected 2 first, as the codes of qweight have, got number 4")
    refused("[]", path .. ": expected an object 'measurement'")
    refused("{", path)
    refused(nil, "argument 'group_size': expected rows to a group, which 2 groups of 96 rows do not tell")
  end)
end)
