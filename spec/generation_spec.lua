local qm = require("quartermoon")
local testing = require("spec.support.testing")

local LLAMA = { vocab_size = 300, hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2,
  num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 64, initializer_range = 0.5 }
local GPT2 = { vocab_size = 300, n_embd = 32, n_layer = 2, n_head = 4, n_positions = 64, initializer_range = 0.5 }

local function llama(changes, options)
  local config = {}
  for key, value in pairs(LLAMA) do config[key] = value end
  for key, value in pairs(changes or {}) do config[key] = value end
  return qm.models.llama.new(config, options or { dtype = "f32", linear = { kind = "dense", std = 0.3 } })
end

local MAKERS = {
  llama = llama,
  ["a sliding window"] = function() return llama({ sliding_window = 5 }) end,
  ["normed heads, 4 bits"] = function()
    return llama({ qk_norm = true, hidden_size = 128, intermediate_size = 64 }, { dtype = "f32",
      linear = { group_size = 32 } })
  end,
  ["gpt2"] = function() return qm.models.gpt2.new(GPT2, { dtype = "f32", linear = { kind = "dense", std = 0.3 } }) end,
}

local function ids(values) return qm.tensor(values, { dtype = "i32" }) end

local function random_tokens(count)
  return qm.rand({ count }, nil, 0, 300):to("i32"):totable()
end

---The last row of the logits without a cache.
local function uncached(model, tokens)
  local logits = qm.no_grad(model.logits, model, ids(tokens))
  return logits:narrow(#tokens, 1)
end

describe("a cache", function()
  for what, make in pairs(MAKERS) do
    it("gives what decoding without it gives, texts of different lengths together: " .. what, function()
      local model = make()
      local texts = { random_tokens(9), random_tokens(1), random_tokens(14) }
      local cache = model:cache(20, 3)
      local flat, offsets = {}, { 0 }
      for s, text in ipairs(texts) do
        for _, token in ipairs(text) do flat[#flat + 1] = token end
        offsets[s + 1] = #flat
      end
      local logits = model:next_logits(ids(flat), cache, offsets)
      for s, text in ipairs(texts) do
        testing.assert_close(uncached(model, text), logits:narrow(s, 1), 2e-5, "prompt")
      end
      for step = 1, 4 do
        -- The second text waits now and then.
        local fresh, cu, who = {}, { 0 }, {}
        for s, text in ipairs(texts) do
          if s ~= 2 or step % 2 == 0 then
            fresh[#fresh + 1], text[#text + 1], who[#who + 1] = (step * 37 + s) % 300, (step * 37 + s) % 300, s
          end
          cu[s + 1] = #fresh
        end
        logits = model:next_logits(ids(fresh), cache, cu)
        assert.same({ #who, 300 }, logits.shape)
        for row, s in ipairs(who) do
          testing.assert_close(uncached(model, texts[s]), logits:narrow(row, 1), 2e-5, "step " .. step)
        end
      end
      assert.same({ 13, 3, 18 }, cache.lengths)
      cache:cut(1, 4)
      logits = model:next_logits(ids({ 7 }), cache, { 0, 1, 1, 1 })
      testing.assert_close(uncached(model, { texts[1][1], texts[1][2], texts[1][3], texts[1][4], 7 }), logits, 2e-5,
        "cut")
      cache:free()
    end)
  end

  it("continues in 16 bits as it would without, to their rounding", function()
    local model = llama(nil, { dtype = "bf16", linear = { kind = "dense", std = 0.1 } })
    local text, cache = random_tokens(12), model:cache(16)
    model:next_logits(ids(text), cache)
    text[13] = 5
    local logits = model:next_logits(ids({ 5 }), cache)
    -- Scores of a few units; two layers' products in 8 bits of mantissa.
    testing.assert_close(uncached(model, text):to("f32"), logits:to("f32"), 0.05)
    cache:free()
  end)

  it("says what does not fit", function()
    local model = llama()
    local cache = model:cache(4, 2)
    assert.error_matches(function() model:next_logits(ids({ 1, 2 }), cache) end, "offsets of 2 sequences", 1, true)
    assert.error_matches(function() model:next_logits(ids({ 1, 2, 3, 4, 5 }), cache, { 0, 5, 5 }) end,
      "at most 4 more of sequence 1, for which the cache has room, got number 5", 1, true)
    assert.error_matches(function() model:next_logits(ids({ 1 }), {}) end, "a qm.models.Cache", 1, true)
    assert.error_matches(function() model:cache(65) end, "an integer from 1 to 64", 1, true)
    assert.same({ 0, 0 }, cache.lengths)
    cache:free()
  end)
end)

describe("model:generate", function()
  it("continues a list of prompts as each alone", function()
    local model = llama()
    local prompts = { random_tokens(3), random_tokens(11), random_tokens(1), random_tokens(7), random_tokens(5) }
    for _, options in ipairs({ { temperature = 0 }, { seed = 9, top_p = 0.9 } }) do
      options.max_tokens = 8
      local alone = {}
      for i, prompt in ipairs(prompts) do
        local own = {}
        for key, value in pairs(options) do own[key] = value end
        own.seed = (options.seed or 0) + i - 1
        alone[i] = model:generate(prompt, own)
        assert.equal(8, #alone[i])
      end
      assert.same(alone, (model:generate(prompts, options)))
      options.batch, options.prefill_rows = 2, 3 -- fewer places than texts, prompts in parts
      assert.same(alone, (model:generate(prompts, options)))
      options.record = true
      assert.same(alone, (model:generate(prompts, options)))
    end
  end)

  it("stops each text by itself, at its length, a token or a string", function()
    local model, tokenizer = llama({ vocab_size = 128 }), qm.tokenizer.byte() -- ASCII
    local whole, info = model:generate("In the", { tokenizer = tokenizer, temperature = 0, max_tokens = 20 })
    assert.same("length", info.reason)
    assert.equal(tokenizer:decode(whole), info.text)
    local word = tokenizer:decode({ unpack(whole, 5, 8) })
    local at = tokenizer:decode(whole):find(word, 1, true)
    local pieces = {}
    local cut, cut_info = model:generate("In the", { tokenizer = tokenizer, temperature = 0, max_tokens = 20,
      stop = { word, "never to be found" }, on_text = function(words) pieces[#pieces + 1] = words end })
    assert.equal("stop", cut_info.reason)
    assert.equal(tokenizer:decode(whole):sub(1, at - 1), cut_info.text)
    assert.equal(cut_info.text, table.concat(pieces))
    assert.equal(at + 3, #cut)
    local made, infos = model:generate({ "In the", { whole[1] } }, { tokenizer = tokenizer, temperature = 0,
      max_tokens = 20, stop = whole[4] })
    assert.is_true(#made[1] <= 3)
    assert.equal("stop", infos[1].reason)
  end)

  it("holds no more memory the longer it runs, and leaves none behind", function()
    local model = llama()
    local live = {}
    local function run()
      model:generate({ { 1, 2 }, { 3 } }, { max_tokens = 40, seed = 3, repetition_penalty = 1.1,
        on_token = function(_, i)
          if i == 1 then live[#live + 1] = qm.default_device():memory().live_bytes end
        end })
    end
    run()
    local handles, bytes = qm.handles_live(), qm.default_device():memory().live_bytes
    collectgarbage("stop")
    live = {}
    run()
    assert.error_matches(function()
      model:generate({ 1 }, { on_token = function() error("enough", 0) end })
    end, "enough", 1, true)
    local after = { qm.handles_live(), qm.default_device():memory().live_bytes }
    collectgarbage("restart")
    assert.same({ handles, bytes }, after)
    local steady = 6 -- on a GPU an early step is recorded, and its memory stays
    for i = steady, #live do assert.equal(live[steady], live[i]) end
    assert.is_true(#live > 30)
  end)

  it("says what does not fit", function()
    local model = llama()
    local function refuses(message, ...)
      local arguments = { ... }
      assert.error_matches(function() model:generate(unpack(arguments)) end, message, 1, true)
    end
    refuses("at least one token", {})
    refuses("at most 64 tokens, the model's positions", random_tokens(65))
    refuses("argument 'top_p': expected a number from 0 to 1, got number 2", { 1 }, { top_p = 2 })
    refuses("argument 'repetition_penalty': expected a number above 0", { 1 }, { repetition_penalty = 0 })
    refuses("argument 'tokenizer': expected the tokenizer, for stop strings", { 1 }, { stop = "x" })
    refuses("argument 'tokenizer': expected the tokenizer, for on_text", { 1 }, { on_text = print })
    refuses("option 'topp'", { 1 }, { topp = 1 })
    model.lm_head.weight:fill(1 / 0)
    refuses("the scores of the next token are not numbers", { 1 }, { max_tokens = 1 })
  end)
end)
