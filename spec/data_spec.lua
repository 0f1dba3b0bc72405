local qm = require("quartermoon")
local process = require("spec.support.process")

-- 4000 tokens whose value is their place, so that a batch shows where it came from.
local function numbered(count)
  local tokens = {}
  for i = 1, count do tokens[i] = i - 1 end
  return tokens
end

describe("qm.data", function()
  local folder, remove_folder, path
  before_each(function()
    folder, remove_folder = process.folder()
    path = folder .. "/text.txt"
  end)
  after_each(function()
    os.execute("chmod -R u+w " .. folder)
    remove_folder()
  end)

  local function text_of(count)
    local words = { "In", "the", "beginning", "was", "the", "Word,", "\n", "and", "1:1" }
    local parts = {}
    for i = 1, count do parts[i] = words[math.random(#words)] end
    return table.concat(parts, " ")
  end

  describe("open", function()
    it("holds out every 20th of 400 blocks", function()
      local data = qm.data.open(numbered(4000))
      assert.equal(4000, data.count)
      assert.equal(200, data.held_out_count)
      assert.equal(3800, data.train_count)
      assert.equal(20, #data.held)
      assert.same({ first = 190, count = 10 }, data.held[1])
      assert.same({ first = 3990, count = 10 }, data.held[20])
      assert.same({ first = 0, count = 190 }, data.train[1])
    end)

    it("covers every token once, whatever the count", function()
      for _, count in ipairs({ 0, 1, 399, 401, 997, 12345 }) do
        local zeros = qm.zeros({ count }, { dtype = "u8", device = "cpu" })
        local data = qm.data.open(zeros, { held_out = 0.1, blocks = 30 })
        assert.equal(count, data.train_count + data.held_out_count)
        local ranges = {}
        for _, range in ipairs(data.train) do ranges[#ranges + 1] = range end
        for _, range in ipairs(data.held) do ranges[#ranges + 1] = range end
        table.sort(ranges, function(a, b) return a.first < b.first end)
        local at = 0
        for _, range in ipairs(ranges) do
          assert.equal(at, range.first)
          at = at + range.count
        end
        assert.equal(count, at)
      end
    end)

    it("makes a text's tokens once, and anew when text or tokenizer change", function()
      qm.files.write(path, text_of(500))
      local data = qm.data.open(path)
      assert.is_true(data.tokenized)
      assert.equal("u8", data.tokens.dtype)
      assert.equal(qm.files.read(path), data.tokens:bytes())
      assert.is_false(qm.data.open(path).tokenized)
      local text = qm.files.read(path):gsub("Word", "word", 1) -- the same length
      qm.files.write(path, text)
      assert.is_true(qm.data.open(path).tokenized)
      local tokenizer = qm.tokenizer.train_bpe(text, { vocab_size = 300 })
      data = qm.data.open(path, { tokenizer = tokenizer })
      assert.is_true(data.tokenized)
      assert.is_false(qm.data.open(path).tokenized)
      assert.equal("i32", data.tokens.dtype)
      assert.equal(#text / data.count, data.chars_per_token)
      assert.equal(text, tokenizer:decode(data.tokens))
      assert.is_false(qm.data.open(path, { tokenizer = tokenizer }).tokenized)
    end)

    it("makes them anew when the cache is damaged or lacks a part", function()
      qm.files.write(path, text_of(500))
      local expected = qm.data.open(path).tokens:bytes()
      local damages = { "rm %s*.tokens", "rm %s*.tokens.json", "truncate -s 0 %s*.tokens",
        "truncate -s +1 %s*.tokens", "truncate -s 1 %s*.tokens.json", "sed -i 's/u8/u9/' %s*.tokens.json",
        "sed -i 's/characters/c/' %s*.tokens.json" }
      for _, damage in ipairs(damages) do
        os.execute(damage:format(path))
        local data = qm.data.open(path)
        assert.is_true(data.tokenized, damage)
        assert.equal(expected, data.tokens:bytes())
      end
    end)

    it("encodes a text of several chunks as if it were one", function()
      local text = text_of(500000)
      assert.is_true(#text > 2 ^ 21)
      qm.files.write(path, text)
      local tokenizer = qm.tokenizer.train_bpe(text:sub(1, 10000), { vocab_size = 300 })
      local data = qm.data.open(path, { tokenizer = tokenizer })
      assert.equal(tokenizer:encode(text):bytes(), data.tokens:bytes())
    end)

    it("counts characters, not bytes, for nats per character", function()
      qm.files.write(path, ("\195\188ber "):rep(10))
      local data = qm.data.open(path)
      assert.equal(50 / 60, data.chars_per_token)
      assert.equal(50 / 60, qm.data.open(path).chars_per_token)
      assert.equal(1, qm.data.open({ 1, 2 }).chars_per_token)
    end)

    it("puts the tokens into cache_dir", function()
      qm.files.write(path, text_of(100))
      qm.data.open(path, { cache_dir = folder .. "/a/cache" })
      assert.equal(2, #qm.files.list(folder .. "/a/cache"))
      assert.same({ "a", "text.txt" }, qm.files.list(folder))
    end)

    it("names the file that cannot be read or written, and leaves nothing", function()
      assert.error_matches(function() qm.data.open(folder .. "/none") end,
        "qm.data.open: " .. folder .. "/none: No such file", 1, true)
      assert.error_matches(function() qm.data.open(folder) end, folder, 1, true)
      qm.files.write(path, text_of(100))
      assert.error_matches(function() qm.data.open(path, { cache_dir = "/proc/no" }) end, "/proc/no", 1, true)
      assert.same({ "text.txt" }, qm.files.list(folder))
    end)

    it("refuses what makes no sense", function()
      assert.error_matches(function() qm.data.open(7) end, "argument 'source': expected a path or token ids", 1, true)
      assert.error_matches(function() qm.data.open(qm.ones({ 3 })) end, "token ids u8 or i32 [count], got", 1, true)
      assert.error_matches(function() qm.data.open({ 1 }, { heldout = 0.1 }) end, "did you mean 'held_out'?", 1, true)
      assert.error_matches(function() qm.data.open({ 1 }, { held_out = 0.6 }) end, "from 0 to 0.5", 1, true)
      assert.error_matches(function() qm.data.open({ 1 }, { delimiter = "\n", tokenizer = qm.tokenizer.byte() }) end,
        "special token '<|end|>'", 1, true)
    end)
  end)

  describe("batches", function()
    it("are windows of the training side, each target the token behind", function()
      local data = qm.data.open(numbered(4000))
      local batches = data:batches({ batch = 50, length = 7, seed = 3, device = "cpu" })
      for _ = 1, 10 do
        local tokens, targets, cu = batches:next()
        assert.same({ "i32", "i32", "i32" }, { tokens.dtype, targets.dtype, cu.dtype })
        assert.same({ 350 }, tokens.shape)
        tokens, targets, cu = tokens:totable(), targets:totable(), cu:totable()
        assert.equal(51, #cu)
        for i, bound in ipairs(cu) do assert.equal((i - 1) * 7, bound) end
        for i = 1, 350 do
          assert.equal(tokens[i] + 1, targets[i])
          if i % 7 ~= 1 then assert.equal(tokens[i - 1] + 1, tokens[i]) end
          -- Blocks of ten: numbers 19, 39, ... are held out.
          assert.not_equal(19, math.floor(tokens[i] / 10) % 20)
          assert.not_equal(19, math.floor(targets[i] / 10) % 20)
        end
      end
    end)

    it("draw every place equally often", function()
      -- Ten tokens, no held-out side, windows of 7: the three places 0, 1 and 2.
      local data = qm.data.open(numbered(10), { held_out = 0 })
      local tokens = data:batches({ batch = 30000, length = 7, seed = 5 }):next():totable()
      local counts = { [0] = 0, 0, 0 }
      for i = 1, #tokens, 7 do counts[tokens[i]] = counts[tokens[i]] + 1 end
      for place = 0, 2 do assert.near(10000, counts[place], 4 * math.sqrt(30000 * 2 / 9)) end
    end)

    it("continue from a state bit for bit, and differ by seed", function()
      local data = qm.data.open(numbered(4000))
      local options = { batch = 4, length = 9, seed = 11 }
      local one, two = data:batches(options), data:batches(options)
      for _ = 1, 5 do one:next() end
      local state = one:state()
      assert.same({ seed = 11, draws = 5 }, state)
      two:load_state(state)
      for _ = 1, 3 do
        local a, b = one:next():bytes(), two:next():bytes()
        assert.equal(a, b)
      end
      two:load_state({ seed = 12, draws = 5 })
      one:load_state(state)
      assert.not_equal(one:next():bytes(), two:next():bytes())
    end)

    it("free the batch before, unless it is kept", function()
      local data = qm.data.open(numbered(1000))
      local batches = data:batches({ batch = 2, length = 4 })
      local first = batches:next()
      local second = batches:next():keep()
      assert.error_matches(function() first:totable() end, "this tensor was freed", 1, true)
      batches:next()
      assert.equal(8, #second:totable())
      local memory = data.tokens.device
      collectgarbage()
      collectgarbage()
      collectgarbage("stop")
      batches:next()
      local before = memory:memory().live_bytes
      for _ = 1, 100 do batches:next() end
      assert.equal(before, memory:memory().live_bytes)
      collectgarbage("restart")
    end)

    it("refuse windows that do not fit", function()
      local data = qm.data.open(numbered(100), { blocks = 10, held_out = 0.5 })
      assert.error_matches(function() data:batches({ batch = 1, length = 10 }) end,
        "no training block has 11 tokens", 1, true)
      assert.equal(9, #data:batches({ batch = 1, length = 9 }):next():totable())
      assert.error_matches(function() data:batches({ length = 9 }) end, "option 'batch' is needed", 1, true)
    end)
  end)

  describe("held_out", function()
    it("is the same windows in order, every time, up to the limit", function()
      local data = qm.data.open(numbered(4000))
      for _, case in ipairs({ { nil, 60 }, { 30, 10 }, { 31, 10 } }) do
        local seen, sizes = {}, {}
        for tokens, targets, cu in data:held_out({ length = 3, batch = 7, limit = case[1], device = "cpu" }) do
          local ids, behind = tokens:totable(), targets:totable()
          sizes[#sizes + 1] = #ids
          assert.equal(#ids / 3 + 1, #cu:totable())
          for i, id in ipairs(ids) do
            assert.equal(19, math.floor(id / 10) % 20)
            assert.equal(19, math.floor(behind[i] / 10) % 20)
            assert.equal(id + 1, behind[i])
            seen[#seen + 1] = id
          end
        end
        assert.equal(case[2] * 3, #seen)
        assert.equal(190, seen[1])
        assert.equal(193, seen[4])
        assert.equal(21, sizes[1])
        for i = 2, #seen do assert.is_true(seen[i] > seen[i - 1]) end
      end
    end)

    it("says when there is none", function()
      local data = qm.data.open(numbered(4000), { held_out = 0 })
      assert.error_matches(function() data:held_out({ length = 3 }) end, "no held-out block", 1, true)
    end)
  end)

  describe("with documents", function()
    it("ends each with a special token, and sequences with it", function()
      qm.files.write(path, "abc--defg--h")
      local data = qm.data.open(path, { delimiter = "--", held_out = 0 })
      assert.same({ 97, 98, 99, 256, 100, 101, 102, 103, 256, 104 }, data.tokens:totable())
      assert.is_false(qm.data.open(path, { delimiter = "--" }).tokenized)
      assert.is_true(qm.data.open(path).tokenized)
      -- One place: the window is all but the last token.
      local tokens, targets, cu = data:batches({ batch = 1, length = 9 }):next()
      assert.same({ 97, 98, 99, 256, 100, 101, 102, 103, 256 }, tokens:totable())
      assert.same({ 98, 99, 256, 100, 101, 102, 103, 256, 104 }, targets:totable())
      assert.same({ 0, 4, 9 }, cu:totable())
    end)

    it("finds delimiters across chunks", function()
      local text = ("x"):rep(2 ^ 20 - 1) .. "--" .. ("y "):rep(10) .. "--"
      qm.files.write(path, text)
      local data = qm.data.open(path, { delimiter = "--" })
      assert.equal((text:gsub("%-%-", "<|end|>")), data.tokenizer:decode(data.tokens))
      assert.equal(#text - 2, data.count)
    end)
  end)
end)
