local qm = require("quartermoon")
local split = require("quartermoon.tokenizer.split")

local TEXT = ("In the beginning God created the heaven and the earth. And the earth was without form, and "
  .. "void; and darkness was upon the face of the deep.\n  1:2 It's 1611 \195\188ber\n\n"):rep(5)

local function random_bytes(count)
  local bytes = {}
  for i = 1, count do bytes[i] = string.char(math.random(0, 255)) end
  return table.concat(bytes)
end

local function pieces(text)
  local list, first = {}, 1
  while first <= #text do
    local last = split.piece_end(text, first)
    assert(last >= first and last <= #text)
    list[#list + 1] = text:sub(first, last)
    first = last + 1
  end
  return list
end

describe("qm.tokenizer", function()
  local path
  before_each(function() path = os.tmpname() end)
  after_each(function() os.remove(path) end)

  describe("splitting", function()
    it("keeps words, digits and the rest apart, each with the space before it", function()
      assert.same({ "And", " 12", ":", "3", " it", "'s", " (", "so", "),", " \195\188ber" },
        pieces("And 12:3 it's (so), \195\188ber"))
    end)
    it("leaves a run's last space to the word behind it", function()
      assert.same({ "a", "\n\n ", " b", "\n", "c", "  " }, pieces("a\n\n  b\nc  "))
      assert.same({ "'", "tis" }, pieces("'tis"))
    end)
    it("cuts endless runs, never inside a character", function()
      for _, run in ipairs({ ("a"):rep(1000), (" "):rep(1000), ("\226\130\172"):rep(500), ("\128"):rep(300) }) do
        local list = pieces(run)
        assert.equal(run, table.concat(list))
        for _, piece in ipairs(list) do assert.is_true(#piece <= 128) end
      end
      assert.equal(126, #pieces(("\226\130\172"):rep(500))[1])
    end)
    it("has safe ends: both parts split as the whole does", function()
      for _ = 1, 100 do
        local from = math.random(#TEXT - 60)
        local part = TEXT:sub(from, from + math.random(60))
        local cut = split.safe_end(part)
        local whole, halves = pieces(part), pieces(part:sub(1, cut))
        for _, piece in ipairs(pieces(part:sub(cut + 1))) do halves[#halves + 1] = piece end
        assert.same(whole, halves)
      end
    end)
  end)

  describe("byte", function()
    it("is the bytes", function()
      local tokenizer = qm.tokenizer.byte()
      assert.equal(256, tokenizer.vocab_size)
      local ids = tokenizer:encode("A\0\255")
      assert.equal("i32", ids.dtype)
      assert.same({ 65, 0, 255 }, ids:totable())
      assert.equal("A\0\255", tokenizer:decode(ids))
      assert.equal("", tokenizer:decode(tokenizer:encode("")))
    end)
  end)

  -- The definition, with every count made anew: what the incremental learner must agree with.
  local function learn_slowly(text, merge_count)
    local words, merges = {}, {}
    for i, piece in ipairs(pieces(text)) do words[i] = { piece:byte(1, -1) } end
    for id = 256, 255 + merge_count do
      local counts, best, best_count = {}, nil, 1
      for _, word in ipairs(words) do
        for i = 1, #word - 1 do
          local key = word[i] * 2 ^ 21 + word[i + 1]
          counts[key] = (counts[key] or 0) + 1
        end
      end
      for key, count in pairs(counts) do
        if count > best_count or (best and count == best_count and key < best) then best, best_count = key, count end
      end
      if not best then break end
      local left, right = math.floor(best / 2 ^ 21), best % 2 ^ 21
      merges[#merges + 1] = { left, right }
      for i, word in ipairs(words) do
        local merged, j = {}, 1
        while j <= #word do
          local both = word[j] == left and word[j + 1] == right
          merged[#merged + 1] = both and id or word[j]
          j = j + (both and 2 or 1)
        end
        words[i] = merged
      end
    end
    return merges, words
  end

  describe("train_bpe", function()
    it("merges the commonest pair first", function()
      local tokenizer = qm.tokenizer.train_bpe("abab abab abab xyx", { vocab_size = 258 })
      assert.same({ { 97, 98 }, { 256, 256 } }, tokenizer.merges)
      assert.same({ 257, 32, 257, 256 }, tokenizer:ids("abab ababab"))
    end)

    it("learns and applies what the definition says", function()
      local texts = { TEXT, ("aaaa aaa aa aaaaa "):rep(7), (random_bytes(2000):gsub("[^a-c ]", "a")) }
      for _, text in ipairs(texts) do
        local expected, words = learn_slowly(text, 60)
        local tokenizer = qm.tokenizer.train_bpe(text, { vocab_size = 256 + 60 })
        assert.same(expected, tokenizer.merges)
        local ids = {}
        for _, word in ipairs(words) do for _, id in ipairs(word) do ids[#ids + 1] = id end end
        assert.same(ids, tokenizer:ids(text))
      end
    end)

    it("stops when no pair is common enough", function()
      assert.equal(256, qm.tokenizer.train_bpe("abcd", { vocab_size = 300 }).vocab_size)
      assert.equal(256, qm.tokenizer.train_bpe("", { vocab_size = 300 }).vocab_size)
      assert.equal(259, qm.tokenizer.train_bpe("abcd", { vocab_size = 300, count_min = 1 }).vocab_size)
    end)

    it("refuses sizes and options that make no sense", function()
      assert.error_matches(function() qm.tokenizer.train_bpe("a", { vocab_size = 255 }) end,
        "argument 'vocab_size': expected an integer from 256", 1, true)
      assert.error_matches(function() qm.tokenizer.train_bpe("a", { vocab = 300 }) end,
        "unknown option 'vocab'", 1, true)
      assert.error_matches(function() qm.tokenizer.train_bpe(3) end, "argument 'text': expected a string", 1, true)
    end)
  end)

  for _, kind in ipairs({ "byte", "bpe" }) do
    describe(kind .. " tokens", function()
      local tokenizer
      setup(function()
        tokenizer = kind == "byte" and qm.tokenizer.byte({ specials = { "<|end|>" } })
          or qm.tokenizer.train_bpe(TEXT, { vocab_size = 400, specials = { "<|end|>" } })
      end)

      it("bring any bytes back", function()
        for _, length in ipairs({ 0, 1, 2, 7, 129, 5000 }) do
          local text = random_bytes(length)
          assert.equal(text, tokenizer:decode(tokenizer:encode(text)))
          assert.equal(text, tokenizer:decode(tokenizer:ids(text)))
        end
        assert.equal(TEXT, tokenizer:decode(tokenizer:encode(TEXT)))
      end)

      it("never come out of text as a special token", function()
        local id = tokenizer:special("<|end|>")
        assert.equal(tokenizer.vocab_size - 1, id)
        assert.is_nil(tokenizer:special("<|begin|>"))
        for _, other in ipairs(tokenizer:ids("a<|end|>b")) do assert.is_true(other < id) end
        assert.equal("a<|end|>", tokenizer:decode({ 97, id }))
      end)

      it("come back from a file the same", function()
        tokenizer:save(path)
        local loaded = qm.tokenizer.load(path)
        assert.same(tokenizer:ids(TEXT), loaded:ids(TEXT))
        assert.equal(tokenizer:fingerprint(), loaded:fingerprint())
        assert.equal(tokenizer.vocab_size, loaded.vocab_size)
        assert.same({ "<|end|>" }, loaded.specials)
        assert.not_equal(qm.tokenizer.byte():fingerprint(), loaded:fingerprint())
      end)

      it("refuse to decode what is no id", function()
        assert.error_matches(function() tokenizer:decode({ 1, tokenizer.vocab_size }) end,
          "argument 'ids': expected ids from 0 to " .. tokenizer.vocab_size - 1, 1, true)
        local negative = qm.tensor({ -1 }, { dtype = "i32" })
        assert.error_matches(function() tokenizer:decode(negative) end, "expected ids", 1, true)
        assert.error_matches(function() tokenizer:decode({ 1.5 }) end, "expected ids", 1, true)
      end)
    end)
  end

  it("writes only into host buffers, and only where there is room", function()
    local tokenizer = qm.tokenizer.byte()
    local buffer = require("quartermoon.host_buffer").new("u8", 3)
    assert.equal(3, tokenizer:encode_into("ab", buffer, 1))
    for _, case in ipairs({ { "abc", buffer, 1 }, { "a", buffer, -1 }, { "a", qm.ones({ 1 }).desc, 0 }, { "a" } }) do
      assert.error_matches(function() tokenizer:encode_into(unpack(case, 1, 3)) end, "tokenizer:encode_into: argument")
    end
    local x = qm.tensor({ 1, 2 }, { dtype = "u8" })
    assert.error_matches(function() x:read_elements(1, 2, x.desc) end, "a host buffer of 2 u8", 1, true)
  end)

  it("encodes in linear time, whatever the text", function()
    local tokenizer = qm.tokenizer.train_bpe(("ab"):rep(2000), { vocab_size = 300 })
    local text = ("ab"):rep(100000)
    assert.equal(text, tokenizer:decode(tokenizer:encode(text)))
  end)

  describe("load", function()
    local cases = {
      { "{", "Expected" },
      { "{}", "not a tokenizer file of version 1" },
      { "3", "not a tokenizer file of version 1" },
      { '{"format":"quartermoon-tokenizer","version":1,"kind":"x","specials":[]}', "unknown kind 'x'" },
      { '{"format":"quartermoon-tokenizer","version":1,"kind":"byte"}', "argument 'specials'" },
      { '{"format":"quartermoon-tokenizer","version":1,"kind":"byte","specials":["a","a"]}', "different words" },
      { '{"format":"quartermoon-tokenizer","version":1,"kind":"bpe","specials":[],"merges":[[1,256]]}', "integer" },
      { '{"format":"quartermoon-tokenizer","version":1,"kind":"bpe","specials":[],"merges":[[1]]}', "integer" },
      { '{"format":"quartermoon-tokenizer","version":1,"kind":"bpe","specials":[],"merges":[7]}', "a table" },
      { '{"format":"quartermoon-tokenizer","version":1,"kind":"bpe","specials":[],"merges":[[1,2],[1,2]]}',
        "different pairs" },
    }
    for _, case in ipairs(cases) do
      it("refuses " .. case[1], function()
        qm.files.write(path, case[1])
        local ok, message = pcall(qm.tokenizer.load, path)
        assert.is_false(ok)
        assert.truthy(message:find(path, 1, true), message)
        assert.truthy(message:find(case[2], 1, true), message)
      end)
    end

    it("refuses merges that double without end", function()
      local merges = { "[97,97]" }
      for i = 1, 40 do merges[i + 1] = ("[%d,%d]"):format(255 + i, 255 + i) end
      qm.files.write(path, '{"format":"quartermoon-tokenizer","version":1,"kind":"bpe","specials":[],"merges":['
        .. table.concat(merges, ",") .. "]}")
      assert.error_matches(function() qm.tokenizer.load(path) end, "at most 1024 bytes", 1, true)
    end)

    it("names a missing file", function()
      assert.error_matches(function() qm.tokenizer.load("/no/such") end, "/no/such: No such file", 1, true)
    end)
  end)
end)
