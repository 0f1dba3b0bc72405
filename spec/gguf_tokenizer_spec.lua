-- Tokenizers in GGUF files: the words, merges and scores that llama.cpp wants, or a refusal.
local cjson = require("cjson")
local qm = require("quartermoon")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local device = testing.device
local folder, remove_folder
before_each(function() folder, remove_folder = process.folder() end)
after_each(function() remove_folder() end)

local function fresh(vocab_size)
  return qm.models.llama.new({ vocab_size = vocab_size, hidden_size = 32, intermediate_size = 32, num_hidden_layers = 1,
    num_attention_heads = 2, max_position_embeddings = 16 }, { linear = { kind = "dense" }, device = device })
end

describe("qm.gguf.export of a tokenizer", function()
  ---The tokenizer of a fixture, in a folder; `change` edits it before.
  local function tokenizer(name, change, config)
    local description = cjson.decode(qm.files.read("spec/fixtures/tokenizers/" .. name .. ".json")).tokenizer
    if change then change(description) end
    qm.files.make_folder(folder .. "/t")
    qm.files.write(folder .. "/t/tokenizer.json", cjson.encode(description))
    qm.files.write_json(folder .. "/t/tokenizer_config.json", config or { chat_template = "{{ bos_token }}" })
    return qm.tokenizer.load(folder .. "/t")
  end

  ---The metadata of a model with so many rows more than the tokenizer has words.
  local function exported(size, options)
    local model = fresh(size)
    options = options or {}
    options.tokenizer = options.tokenizer or folder .. "/t"
    local report = qm.gguf.export(model, folder .. "/m.gguf", options)
    assert.same({}, qm.inspection.open(folder .. "/m.gguf").problems)
    return qm.gguf.with(folder .. "/m.gguf", function(file)
      local m = {}
      for key, value in pairs(file.metadata) do m[key:match("^tokenizer%.ggml%.(.*)$") or key] = value end
      return m, report.notes
    end)
  end

  for name, pre in pairs({ gpt2 = "gpt-2", llama3 = "llama-bpe", qwen2 = "qwen2" }) do
    it("has the merges and the words of " .. name .. "'s", function()
      local source = tokenizer(name)
      local m, notes = exported(source.vocab_size + 2)
      assert.same({ "gpt2", pre, source.vocab_size + 2, "{{ bos_token }}" },
        { m.model, m.pre, #m.tokens, m["tokenizer.chat_template"] })
      assert.same(name == "qwen2" and { "llama.cpp finds words whatever stands around them, and leaves blanks "
        .. "there: <strip>", "llama.cpp leaves out normalizing a text: NFC" } or {}, notes)
      for id = 0, source.vocab_size - 1 do
        local word = source.words[id]
        local added = source.added[word or ""]
        assert.equal(word or m.tokens[id + 1], m.tokens[id + 1])
        assert.equal(not word and 5 or added and (added.special and 3 or 4) or 1, m.token_type[id + 1])
      end
      assert.same({ "[PAD" .. source.vocab_size .. "]", 5 }, { m.tokens[source.vocab_size + 1],
        m.token_type[source.vocab_size + 1] })
      for i, line in ipairs(m.merges) do
        local left, right = line:match("^(.-) (.*)$")
        local key = source.ids_of[left] * require("quartermoon.tokenizer.merges").PAIR + source.ids_of[right]
        assert.equal(i, source.ranks[key])
      end
      assert.equal(#source.before == 1, m.add_bos_token)
      assert.is_false(m.add_eos_token)
    end)
  end

  it("has scores in the order of the merges where words are made of characters", function()
    local source = tokenizer("llama2", nil, { bos_token = "<s>", eos_token = { content = "</s>" } })
    local m = exported(source.vocab_size)
    assert.same({ "llama", "default", 1, 2, true, true }, { m.model, m.pre, m.bos_token_id, m.eos_token_id,
      m.add_bos_token, m.add_space_prefix })
    assert.same({ 2, 3, 3, 6 }, { m.token_type[1], m.token_type[2], m.token_type[3],
      m.token_type[source.ids_of["<0x41>"] + 1] })
    local before = 0
    for i, merge in ipairs(cjson.decode(source.text).model.merges) do
      local left, right = unpack(type(merge) == "table" and merge or { merge:match("^(.-) (.*)$") })
      local score = m.scores[source.ids_of[left .. right] + 1]
      assert(score <= before and score < 0, "merge " .. i)
      before = score
    end
  end)

  it("says where llama.cpp puts spaces that the tokenizer does not", function()
    local source = tokenizer("mistral")
    local m, notes = exported(source.vocab_size)
    assert.is_true(m.add_space_prefix)
    assert.same({ "llama.cpp puts a space before a text that begins with one, too, and behind special words" }, notes)
  end)

  it("of bytes has a word for each", function()
    qm.tokenizer.byte({ specials = { "<end>" } }):save(folder .. "/byte.json")
    local m = exported(258, { tokenizer = folder .. "/byte.json" })
    assert.same({ "gpt2", 258, {}, "A", "\196\160", "<end>", "[PAD257]" }, { m.model, #m.tokens, m.merges,
      m.tokens[66], m.tokens[33], m.tokens[257], m.tokens[258] })
    assert.same({ 1, 3, 5 }, { m.token_type[256], m.token_type[257], m.token_type[258] })
  end)

  it("comes with the model's folder, unless it is unwanted", function()
    local source = tokenizer("llama2", nil, { bos_token = "<s>" })
    local model = fresh(source.vocab_size)
    model:save(folder .. "/m", { tokenizer = folder .. "/t" })
    local again = qm.models.load(folder .. "/m", { device = device })
    qm.gguf.export(again, folder .. "/m.gguf")
    local function kind() return qm.gguf.with(folder .. "/m.gguf", function(file)
      return file.metadata["tokenizer.ggml.model"]
    end) end
    assert.equal("llama", kind())
    qm.gguf.export(again, folder .. "/m.gguf", { tokenizer = false })
    assert.equal("none", kind())
  end)

  it("is refused where llama.cpp would make other tokens", function()
    local function refuse(words, name, change, options)
      local source = tokenizer(name, change, { bos_token = "<s>" })
      assert.error_matches(function() exported(source.vocab_size, options) end, words, 1, true)
    end
    local splits = "the tokenizer splits a text in a way that llama.cpp has no name for"
    refuse(splits, "gpt2", function(d) d.pre_tokenizer.add_prefix_space = true end)
    refuse(splits, "gpt2", function(d) d.model.ignore_merges = true end)
    refuse(splits, "qwen2", function(d) d.pre_tokenizer.pretokenizers[1].pattern.Regex = "\\w+" end)
    refuse("llama.cpp needs a word for every byte, and <0x00> is missing", "llama2", function(d)
      d.model.byte_fallback = false
    end)
    refuse("llama.cpp does not normalize a text by NFKC", "llama2", function(d)
      table.insert(d.normalizer.normalizers, { type = "NFKC" })
    end)
    ---Words of two and three q, of which the longer is made in two ways: these merges.
    local function with_qs(...)
      local merges = { ... }
      return function(d)
        d.model.vocab.q = d.model.vocab.q or 400
        d.model.vocab.qq, d.model.vocab.qqq = 401, 402
        for _, merge in ipairs(merges) do table.insert(d.model.merges, merge) end
      end
    end
    refuse("the tokenizer's merges are not SentencePiece's, which llama.cpp wants here: 'qqq' is not made of 'q' "
      .. "and 'qq'", "llama2", with_qs("q q", "qq q"))
    refuse("'qqq' comes before and after another word", "llama2", with_qs("qq q", "q q", "q qq"))
    assert.equal("llama", exported(tokenizer("llama2", with_qs("q q", "qq q", "q qq")).vocab_size).model)
    refuse("the tokenizer puts other tokens before a text", "llama2", function(d)
      d.post_processor = { type = "TemplateProcessing", single = { { SpecialToken = { id = "</s>" } },
        { Sequence = { id = "A" } } }, special_tokens = { ["</s>"] = { ids = { 2 } } } }
    end)
    local source = tokenizer("gpt2")
    assert.error_matches(function() exported(source.vocab_size - 1) end,
      ("%d tokens, and the model has %d"):format(source.vocab_size, source.vocab_size - 1), 1, true)
    assert.equal("mine", exported(source.vocab_size, { pre = "mine" }).pre)
    qm.tokenizer.train_bpe("the end the end", { vocab_size = 258 }):save(folder .. "/bpe.json")
    assert.error_matches(function() exported(258, { tokenizer = folder .. "/bpe.json" }) end,
      "llama.cpp has no way to split a text as this library's own tokenizers do; the option tokenizer = false", 1, true)
  end)
end)
