local qm = require("quartermoon")
local cjson = require("cjson")

local MESSAGES = {
  { role = "system", content = "Be brief." },
  { role = "user", content = "In the beginning?" },
  { role = "assistant", content = "God created the heaven." },
  { role = "user", content = "And <|im_end|> </s> then?" },
  { role = "assistant", content = "the earth" },
}
local FAMILIES = { qwen2 = "chatml", llama3 = "llama3", llama2 = "llama2", mistral = "mistral" }

local function tokenizer_of(name)
  local text = qm.files.read("spec/fixtures/tokenizers/" .. name .. ".json")
  local path = os.tmpname()
  qm.files.write(path, cjson.encode(cjson.decode(text).tokenizer))
  local tokenizer = qm.tokenizer.load(path)
  os.remove(path)
  return tokenizer
end

describe("qm.chat", function()
  for family, format in pairs(FAMILIES) do
    it("gives the tokens of the whole text, as " .. format, function()
      local tokenizer = tokenizer_of(family)
      local plain = {}
      for i, message in ipairs(MESSAGES) do
        plain[i] = { role = message.role, content = message.content:gsub("<[^>]*> ?", "") }
      end
      local ids = qm.chat.encode(tokenizer, plain, { format = format })
      local text = qm.chat.text(tokenizer, plain, { format = format })
      assert.same(tokenizer:ids(text, { add_special = false }), ids)
    end)

    it("learns the assistant's words and nothing else, as " .. format, function()
      local tokenizer = tokenizer_of(family)
      local ids, learn = qm.chat.encode(tokenizer, MESSAGES, { format = format })
      local learnt, heard = {}, {}
      for i, id in ipairs(ids) do table.insert(learn[i] and learnt or heard, id) end
      local words = tokenizer:decode(learnt, { skip_special = true })
      assert.equal("Godcreatedtheheaven.theearth", (words:gsub("%s", "")))
      assert.falsy(tokenizer:decode(heard):find("created", 1, true))
      assert.truthy(tokenizer:decode(heard):find("brief", 1, true))
    end)
  end

  it("keeps what looks like a special token in a message as words", function()
    local tokenizer = tokenizer_of("qwen2")
    local ids, count = qm.chat.encode(tokenizer, { MESSAGES[4] }), 0
    for _, id in ipairs(ids) do
      if id == tokenizer:special("<|im_end|>") then count = count + 1 end
    end
    assert.equal(1, count)
  end)

  it("ends where the assistant is to begin", function()
    local tokenizer = tokenizer_of("qwen2")
    local text = qm.chat.text(tokenizer, { MESSAGES[2] }, { prompt = true })
    assert.equal("<|im_start|>user\nIn the beginning?<|im_end|>\n<|im_start|>assistant\n", text)
  end)

  it("makes targets of the next tokens that are learnt", function()
    local tokens, targets = qm.chat.targets({ 5, 6, 7, 8 }, { false, false, true, false })
    assert.same({ 5, 6, 7 }, tokens:totable())
    assert.same({ -100, 7, -100 }, targets:totable())
  end)

  it("takes a format of one's own", function()
    local tokenizer = tokenizer_of("gpt2")
    local ids = qm.chat.encode(tokenizer, { MESSAGES[2] }, { format = function(messages)
      return { { text = "Q: " .. messages[1].content } }
    end })
    assert.equal("Q: In the beginning?", tokenizer:decode(ids))
  end)

  it("says what is wrong", function()
    local tokenizer = tokenizer_of("qwen2")
    local function encode(messages, options)
      return function() qm.chat.encode(tokenizer, messages, options) end
    end
    assert.error_matches(encode({ { role = "poet", content = "" } }), "argument 'messages[1].role'", 1, true)
    assert.error_matches(encode({ { role = "user" } }), "argument 'messages[1].content'", 1, true)
    assert.error_matches(encode({ MESSAGES[1] }, { format = "nonsense" }), "chatml, llama2, llama3, mistral", 1, true)
    assert.error_matches(encode({ MESSAGES[3] }, { format = "llama2" }), "a question before each answer", 1, true)
    assert.error_matches(encode({ MESSAGES[1] }, { format = "llama3" }), "<|begin_of_text|>", 1, true)
    assert.error_matches(function() qm.chat.targets({ 1 }, { true }) end, "at least 2 tokens", 1, true)
  end)
end)
