-- scripts/quantize.lua, as a person types it.
local qm = require("quartermoon")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local LENGTH = 32

describe("scripts/quantize.lua", function()
  local root, remove_root
  setup(function()
    root, remove_root = process.folder()
    qm.seed(1)
    local model = qm.models.llama.new({ vocab_size = 256, hidden_size = 64, intermediate_size = 96,
      num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 64 },
      { linear = { kind = "dense" }, device = testing.device })
    model:save(root .. "/base", { dtype = "bf16" })
    qm.tokenizer.byte():save(root .. "/base/tokenizer.json")
    qm.files.write(root .. "/base/generation_config.json", '{"eos_token_id": 3}')
  end)
  teardown(function() remove_root() end)

  local function run(options, model, out)
    return process.run(("bin/quartermoon scripts/quantize.lua %s %s --device %s %s"):format(
      process.quote(root .. "/" .. (model or "base")), process.quote(root .. "/" .. out), testing.device, options))
  end

  local CALIBRATED = (" --calibration README.md --samples 16 --length %d --eval-tokens 256 --dtype f32"):format(LENGTH)

  ---The script's report: lines of the table by layer, perplexities.
  local function quantize(options, out)
    local output, status = run(options, "base", out)
    assert.equal(0, status, output)
    local report = { count = 0 }
    for name, k, n, weight, error_of in output:gmatch("(model%.layers%S+)%s+(%d+) x (%d+)%s+(%S+)%s+(%S+)%s+%S+\n") do
      report[name] = { k = tonumber(k), n = tonumber(n), weight = tonumber(weight), output = tonumber(error_of) }
      report.count = report.count + 1
    end
    report.before, report.after = output:match("perplexity of the held%-out text: (%S+) before, (%S+) after")
    assert.equal(14, report.count, output)
    assert.falsy(qm.files.list(root .. "/" .. out .. ".partial"))
    return report, output
  end

  local function load(out)
    return qm.models.load(root .. "/" .. out, { dtype = "f32", device = testing.device, on_note = function() end })
  end

  local function logits(model)
    local tokens = qm.tensor({ 73, 110, 32, 116, 104, 101, 32, 98 }, { dtype = "i32", device = testing.device })
    return qm.no_grad(model.logits, model, tokens)
  end

  it("rounds with errors compensated, which changes outputs less than to nearest", function()
    local plain = quantize("--bits 3 --group-size 32 --method rtn" .. CALIBRATED, "rtn")
    local better = quantize("--bits 3 --group-size 32" .. CALIBRATED, "gptq")
    local ratio = 0
    for name, line in pairs(better) do
      if name:find("^model") then
        assert.is_true(line.output > 0 and line.output < plain[name].output, name)
        assert.is_true(line.weight > plain[name].weight, name) -- what it costs
        ratio = ratio + line.output / plain[name].output / 14
      end
    end
    assert.is_true(ratio < 0.7, "mean share of the error left: " .. ratio)
    assert.same({ 96, 64 }, { better["model.layers.1.mlp.down_proj"].k, better["model.layers.1.mlp.down_proj"].n })
    assert.equal(plain.before, better.before)

    -- The folder is the model that was measured.
    local text = qm.files.read("README.md")
    local tokens = qm.tokenizer.byte():encode(text, { device = "cpu" })
    local data = qm.data.open(tokens, { blocks = math.max(20, math.min(400, math.floor(#text / (16 * LENGTH)))) })
    local measured = qm.models.perplexity(load("gptq"),
      data:held_out({ length = LENGTH, batch = 4, limit = 256, device = testing.device }))
    assert.near(tonumber(better.after), measured, 1e-3 * measured)
  end)

  it("writes a folder that gives back the same logits, bit for bit", function()
    local _, output = quantize("--bits 4 --group-size 32 --sym --method rtn", "same")
    assert.truthy(output:find("quantized model: " .. root .. "/same", 1, true))
    local model = qm.models.load(root .. "/base", { dtype = "f32", device = testing.device })
    qm.models.quantize(model, { method = "rtn", grid = "sym", group_size = 32 })
    local again = load("same")
    testing.assert_equal(logits(model), logits(again), "logits")
    again:save(root .. "/same2")
    testing.assert_equal(logits(model), logits(load("same2")), "logits of what is saved again")
    assert.equal("bf16", again.stored_dtype)
    local how = qm.files.read_json(root .. "/same/quantize_config.json")
    assert.same({ 4, 32, true, false, "gptq" }, { how.bits, how.group_size, how.sym, how.desc_act,
      how.checkpoint_format })
    assert.same({ 3 }, again.generation_config.eos_token_id)
    assert.equal(process.read(root .. "/base/tokenizer.json"), process.read(root .. "/same/tokenizer.json"))
  end)

  it("takes features in another order, groups of these or as they lie", function()
    local plain = quantize("--bits 2 --group-size 32" .. CALIBRATED, "order0")
    for _, case in ipairs({ { "--act-order", true }, { "--act-order --static-groups", false } }) do
      local out = case[2] and "order1" or "order2"
      local report = quantize("--bits 2 --group-size 32 " .. case[1] .. CALIBRATED, out)
      local name = "model.layers.0.mlp.down_proj"
      assert.not_equal(plain[name].output, report[name].output)
      assert.equal(case[2], qm.files.read_json(root .. "/" .. out .. "/quantize_config.json").desc_act)
      local model = load(out)
      assert.equal(case[2], model.model.layers[1].mlp.down_proj.weight.g_idx ~= nil)
      model:save(root .. "/" .. out .. "s")
      testing.assert_equal(logits(model), logits(load(out .. "s")), "logits")
    end
  end)

  it("writes the other formats, and replaces a folder only when told to", function()
    for format, kind in pairs({ awq = "awq", mpq = "mpq", mbwq = "mbwq" }) do
      quantize("--group-size 32 --format " .. kind .. " --act-order --static-groups" .. CALIBRATED, format)
      local q = load(format).model.layers[2].self_attn.v_proj.weight
      assert.same({ 4, 32, kind == "awq" }, { q.w_bit, q.group_size, q.asym })
    end
    local output, status = run("--method rtn", "base", "awq")
    assert.equal(2, status)
    assert.truthy(output:find("/awq is there already; --overwrite replaces it", 1, true), output)
    quantize("--method rtn --bits 8 --overwrite", "awq")
    assert.equal(8, load("awq").model.layers[1].mlp.up_proj.weight.w_bit)
  end)

  it("says what is wrong, and leaves nothing", function()
    qm.files.write(root .. "/short", "the moon")
    qm.files.write(root .. "/file", "")
    for options, words in pairs({
      [""] = "--calibration: the method gptq needs a text",
      ["--bits 5"] = "--bits: expected one of 1, 2, 3, 4, 8, got '5'",
      ["--bits 1"] = "--bits: the format gptq has no weights of 1 bits",
      ["--format awq --bits 3"] = "--bits: the format awq has no weights of 3 bits",
      ["--format exl2"] = "--format: expected one of gptq, awq, mpq, mbwq, got 'exl2'",
      ["--group-size 48"] = "--group-size: expected a multiple of 32, or -1, got 48",
      ["--format mpq --sym"] = "--sym: the format mpq has float zeros",
      ["--sym --fit mse"] = "--fit mse: a symmetric grid",
      ["--format mbwq --act-order" .. CALIBRATED] = "--act-order: the format mbwq has groups only as they lie",
      ["--static-groups" .. CALIBRATED] = "--static-groups: what it changes is --act-order",
      ["--method rtn --act-order"] = "--act-order: to nearest, no feature comes before another",
      ["--method awq"] = "--method: expected one of gptq, rtn, got 'awq'",
      ["--calibration /nowhere"] = "--calibration: /nowhere: No such file",
      ["--calibration " .. root] = "--calibration: " .. root,
      ["--length 16 --calibration " .. root .. "/short"] = "short has 8 tokens; for sequences of 16 (--length) it "
        .. "takes 340",
      ["--calibration README.md --length 65"] = "--length: the model has 64 positions",
      ["--bit 4"] = "unknown option '--bit', did you mean --bits?",
    }) do
      local output, status = run(options, "base", "no")
      assert.equal(2, status, options .. ": " .. output)
      assert.truthy(output:find(words, 1, true), output)
      assert.falsy(qm.files.list(root .. "/no") or qm.files.list(root .. "/no.partial"), options)
    end
    local output, status = run("--method rtn", "nowhere", "no")
    assert.equal(1, status)
    assert.truthy(output:find("nowhere/config.json", 1, true), output)
    output, status = run("--method rtn", "base", "file/no")
    assert.equal(2, status)
    assert.truthy(output:find("file/no.partial", 1, true), output)
    output, status = run("--method rtn", "base", "file")
    assert.equal(2, status)
    assert.truthy(output:find("file is there already", 1, true), output)
    assert.falsy(qm.files.list(root .. "/no"))
  end)

  it("names the layer that cannot be quantized, and leaves nothing", function()
    qm.models.llama.new({ vocab_size = 256, hidden_size = 64, intermediate_size = 72, num_hidden_layers = 1,
      num_attention_heads = 2, max_position_embeddings = 64 }, { linear = { kind = "dense" },
      device = testing.device }):save(root .. "/odd")
    local output, status = run("--method rtn", "odd", "no")
    assert.equal(1, status)
    assert.truthy(output:find("model.layers.0.mlp.gate_proj: ", 1, true), output)
    assert.falsy(qm.files.list(root .. "/no") or qm.files.list(root .. "/no.partial"))
  end)
end)
