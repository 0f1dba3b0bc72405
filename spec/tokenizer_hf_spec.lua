-- spec/fixtures/tokenizers: small tokenizer.json files of each family, each with texts and what Hugging
-- Face's tokenizers library 0.23 makes of them.
local qm = require("quartermoon")
local cjson = require("cjson")
local merges = require("quartermoon.tokenizer.merges")
local host_buffer = require("quartermoon.tensor").host_buffer

local folder
before_each(function()
  folder = os.tmpname()
  os.remove(folder)
  qm.files.make_folder(folder)
end)
after_each(function() os.execute("rm -rf " .. folder) end)

local function fixture(name)
  local text = qm.files.read("spec/fixtures/tokenizers/" .. name .. ".json")
  return cjson.decode(text)
end

---A tokenizer from a description, by way of a file; `change` edits it before.
local function tokenizer_of(name, change)
  local description = fixture(name).tokenizer
  if change then description = change(description) or description end
  qm.files.write(folder .. "/tokenizer.json", cjson.encode(description))
  return qm.tokenizer.load(folder)
end

for _, family in ipairs({ "gpt2", "llama3", "qwen2", "llama2", "mistral" }) do
  describe("qm.tokenizer.load of a tokenizer.json like " .. family .. "'s", function()
    it("encodes and decodes as the tokenizers library does", function()
      local tokenizer = tokenizer_of(family)
      for _, case in ipairs(fixture(family).cases) do
        assert.same(case.ids, tokenizer:ids(case.text), case.text)
        assert.same(case.plain, tokenizer:ids(case.text, { add_special = false }), case.text)
        assert.same(case.plain, tokenizer:encode(case.text, { add_special = false }):totable())
        assert.equal(case.decoded, tokenizer:decode(case.plain))
      end
    end)
    it("encodes a text in parts, cut where it says, as a whole", function()
      local tokenizer = tokenizer_of(family)
      local text = ("In the beginning, the king's words moved 12 times. "):rep(9)
      local whole = tokenizer:ids(text, { add_special = false, parse_special = false })
      local buffer, count = host_buffer("i32", 2 * #text), 0
      local at, step = 1, 60
      while at <= #text do
        local stop = math.min(#text, at + step)
        local cut = stop == #text and stop or at - 1 + tokenizer:safe_end(text:sub(at, stop))
        assert(cut >= at)
        count = tokenizer:encode_into(text:sub(at, cut), buffer, count, at > 1)
        at = cut + 1
      end
      local list = {}
      for i = 1, count do list[i] = buffer[i - 1] end
      assert.same(whole, list)
    end)
  end)
end

describe("a tokenizer.json", function()
  it("keeps special tokens of the text as words, where asked", function()
    local tokenizer = tokenizer_of("qwen2")
    local start = tokenizer:special("<|im_start|>")
    assert.same({ start }, tokenizer:ids("<|im_start|>"))
    for _, id in ipairs(tokenizer:ids("<|im_start|>", { parse_special = false })) do assert.not_equal(start, id) end
    local ids = tokenizer:ids("a<|im_end|>b")
    assert.equal("ab", tokenizer:decode(ids, { skip_special = true }))
  end)
  it("is saved as it was", function()
    local tokenizer = tokenizer_of("llama3")
    tokenizer:save(folder .. "/again.json")
    assert.equal(qm.files.read(folder .. "/tokenizer.json"), qm.files.read(folder .. "/again.json"))
    assert.equal(tokenizer:fingerprint(), qm.tokenizer.load(folder .. "/again.json"):fingerprint())
  end)
  it("is refused with its file and the reason", function()
    local function refused(change, message)
      assert.error_matches(function() tokenizer_of("gpt2", change) end, message, 1, true)
    end
    refused(function(d) d.model.type = "Unigram" end, "tokenizer.json: a model of type 'Unigram' is not known here")
    refused(function(d) d.pre_tokenizer = { type = "Sorcery" } end, "a pre-tokenizer of type 'Sorcery' is not known")
    refused(function(d) d.normalizer = { type = "Nmt" } end, "a normalizer of type 'Nmt' is not known here")
    refused(function(d) d.model.vocab = nil end, "model has no 'vocab'")
    refused(function(d) d.model.vocab.a = -1 end, "model.vocab: 'a' has no id")
    refused(function(d) d.model.vocab.a = d.model.vocab.b end, "belongs to")
    refused(function(d) d.model.merges[1] = { "nowhere", "found" } end, "model.merges[0]")
    refused(function(d) d.added_tokens = { { id = 3 } } end, "added_tokens[0] has no 'content'")
    refused(function(d)
      d.pre_tokenizer = { type = "Split", pattern = { Regex = "(" }, behavior = "Isolated" }
    end, "pattern (:")
    refused(function() return { 1, 2 } end, "no tokenizer.json")
    qm.files.write(folder .. "/tokenizer.json", "{")
    assert.error_matches(function() qm.tokenizer.load(folder) end, "tokenizer.json: ", 1, true)
    assert.error_matches(function() qm.tokenizer.load(folder .. "/none") end, "none", 1, true)
  end)
  it("is refused where a value is of another type", function()
    local WRONG = {
      { "model is not an object", function(d) d.model = { 1 } end },
      { "normalizer is not an object", function(d) d.normalizer = 3 end },
      { "normalizer.normalizers is not a list",
        function(d) d.normalizer = { type = "Sequence", normalizers = "x" } end },
      { "normalizer.normalizers[0] is not an object",
        function(d) d.normalizer = { type = "Sequence", normalizers = { 1 } } end },
      { "normalizer has no 'prepend'", function(d) d.normalizer = { type = "Prepend" } end },
      { "normalizer.content is not a string",
        function(d) d.normalizer = { type = "Replace", pattern = { String = "a" }, content = {} } end },
      { "a pattern is neither Regex nor String",
        function(d) d.normalizer = { type = "Replace", pattern = { Regex = 1 }, content = "" } end },
      { "pre_tokenizer.type is not a string", function(d) d.pre_tokenizer = { type = {} } end },
      { "decoder.decoders[0].type is not a string",
        function(d) d.decoder = { type = "Sequence", decoders = { { type = 1 } } } end },
      { "post_processor has no 'cls'",
        function(d) d.post_processor = { type = "RobertaProcessing", sep = { "a", 1 } } end },
      { "post_processor.cls is not a word and its id",
        function(d) d.post_processor = { type = "BertProcessing", sep = { "a", 1 }, cls = { 1, "a" } } end },
      { "post_processor.single[0].SpecialToken is not an object",
        function(d) d.post_processor = { type = "TemplateProcessing", single = { { SpecialToken = { "x" } } } } end },
      { "post_processor.special_tokens.x.ids[0] is not a token's id", function(d)
        d.post_processor = { type = "TemplateProcessing", special_tokens = { x = { ids = { 0.5 } } } }
      end },
      { "model.merges[0] is neither a string nor two", function(d) d.model.merges = { { "a", 1 } } end },
      { "model.merges[0]: 'nospace' does not join", function(d)
        d.model.vocab[""], d.model.merges = 60000, { "nospace" }
      end },
      { "model.merges is not a list without gaps", function(d) d.model.merges = { a = "b c" } end },
      { "model.unk_token is not a string", function(d) d.model.unk_token = { "a" } end },
      { "added_tokens[0] is not an object", function(d) d.added_tokens = { true } end },
      { "added_tokens[0].special is not a boolean",
        function(d) d.added_tokens = { { id = 3, content = "x", special = 1 } } end },
      { "added_tokens: UTF-8 error", function(d) d.added_tokens = { { id = 3, content = "\254" } } end },
    }
    for _, case in ipairs(WRONG) do
      assert.error_matches(function() tokenizer_of("gpt2", case[2]) end, "tokenizer.json: " .. case[1], 1, true)
    end
  end)
  it("takes bytes as a last resort only where all of a character's are there", function()
    local tokenizer = tokenizer_of("llama2", function(d) d.model.vocab["<0xA9>"] = nil end)
    local ids = tokenizer:ids("\234\169\169", { add_special = false })
    assert.equal(tokenizer.unk, ids[#ids])
  end)
  it("may have a mark that means something to Lua's patterns", function()
    local tokenizer = tokenizer_of("gpt2", function(d)
      d.pre_tokenizer = { type = "Metaspace", replacement = "%", prepend_scheme = "never" }
    end)
    assert.is_true(#tokenizer:ids("a b") > 0)
  end)
  it("is stopped where its normalizer makes text without end", function()
    local steps = {}
    for i = 1, 30 do steps[i] = { type = "Replace", pattern = { String = "a" }, content = "aa" } end
    local tokenizer = tokenizer_of("gpt2", function(d) d.normalizer = { type = "Sequence", normalizers = steps } end)
    assert.error_matches(function() tokenizer:ids("a") end, "the normalizer makes more than 4160 bytes", 1, true)
    for i = 7, 30 do steps[i] = nil end
    tokenizer = tokenizer_of("gpt2", function(d) d.normalizer = { type = "Sequence", normalizers = steps } end)
    assert.equal(("a"):rep(64), tokenizer:decode(tokenizer:ids("a")))
  end)
  it("merges endless pieces in reasonable time", function()
    local tokenizer = tokenizer_of("llama2")
    local start = qm.clock.now()
    local ids = tokenizer:ids(("words"):rep(20000), { add_special = false })
    assert.equal(("words"):rep(20000), tokenizer:decode(ids))
    assert(qm.clock.now() - start < 20, "not n log n")
  end)
end)

describe("merging", function()
  -- The rule itself, one merge at a time.
  local function plainly(ids, ranks, made)
    ids = { unpack(ids) }
    while true do
      local best, at
      for i = 1, #ids - 1 do
        local rank = ranks[ids[i] * merges.PAIR + ids[i + 1]]
        if rank and (not best or rank < best) then best, at = rank, i end
      end
      if not best then return ids end
      ids[at] = made[ids[at] * merges.PAIR + ids[at + 1]]
      table.remove(ids, at + 1)
    end
  end
  it("takes the lowest rank first and the leftmost of equals, whatever the ranks", function()
    for _ = 1, 200 do
      local ranks, made, ids = {}, {}, {}
      for rank = 1, 12 do
        local pair = math.random(0, 7) * merges.PAIR + math.random(0, 7)
        if not ranks[pair] then ranks[pair], made[pair] = rank, math.random(0, 7) end
      end
      for i = 1, math.random(0, 30) do ids[i] = math.random(0, 7) end
      local expected = plainly(ids, ranks, made)
      local count = merges.apply(ids, #ids, ranks, made)
      assert.same(expected, ids)
      assert.equal(#expected, count)
    end
  end)
end)

describe("a SentencePiece model", function()
  local function varint(n)
    local bytes = {}
    repeat
      local low = n % 128
      n = (n - low) / 128
      bytes[#bytes + 1] = string.char(low + (n > 0 and 128 or 0))
    until n == 0
    return table.concat(bytes)
  end
  local function field(number, value)
    if type(value) == "number" then return varint(number * 8) .. varint(value) end
    return varint(number * 8 + 2) .. varint(#value) .. value
  end
  local ffi = require("ffi")
  local function piece(word, score, kind)
    local bytes = ffi.string(ffi.new("float[1]", score), 4)
    return field(1, field(1, word) .. varint(2 * 8 + 5) .. bytes .. field(3, kind or 1))
  end
  local MARK = "\226\150\129"
  local function model(kind)
    local parts = { piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3) }
    for byte = 0, 255 do parts[#parts + 1] = piece(("<0x%02X>"):format(byte), 0, 6) end
    for i, word in ipairs({ MARK .. "t", "he", MARK .. "the", MARK, "t", "h", "e", "a" }) do
      parts[#parts + 1] = piece(word, -i)
    end
    parts[#parts + 1] = field(2, field(3, kind) .. field(35, 1)) .. field(3, field(3, 1))
    return table.concat(parts)
  end
  it("merges by score, with bytes as the last resort", function()
    qm.files.write(folder .. "/tokenizer.model", model(2))
    local tokenizer = qm.tokenizer.load(folder)
    -- (mark t)(h e) -> (mark the); then mark, a; then a byte of each of e-acute's two.
    assert.same({ 1, 261, 262, 266 }, tokenizer:ids("the a"))
    assert.same({ 1, 262, 3 + 0xC3, 3 + 0xA9 }, tokenizer:ids("\195\169"))
    assert.equal("the a", tokenizer:decode({ 261, 262, 266 }))
  end)
  it("of another kind, or cut short, is refused", function()
    qm.files.write(folder .. "/tokenizer.model", model(1))
    assert.error_matches(function() qm.tokenizer.load(folder) end, "only BPE (2)", 1, true)
    local whole = model(2)
    for _ = 1, 50 do
      qm.files.write(folder .. "/tokenizer.model", whole:sub(1, math.random(#whole - 1)))
      local ok, message = pcall(qm.tokenizer.load, folder)
      assert(ok or message:find("tokenizer.model: ", 1, true), message)
    end
  end)
  it("is refused where a field is of another kind, or a number makes no sense", function()
    local four = varint(2 * 8 + 5)
    local nan = { "\255\255\255\255", "\0\0\192\255", "\1\0\128\127", "\0\0\128\127" }
    local cases = { ["field 1 is of another kind"] = field(1, 7), ["field 2 is of another kind"] = field(2, 7),
      ["field 3 is of another kind"] = field(2, field(3, "x")), ["a piece of 1025 bytes"] = piece(("x"):rep(1025), 0) }
    for _, bytes in ipairs(nan) do
      qm.files.write(folder .. "/tokenizer.model", field(1, field(1, "a") .. four .. bytes))
      assert.error_matches(function() qm.tokenizer.load(folder) end, "a score that is not finite", 1, true)
    end
    for message, bytes in pairs(cases) do
      qm.files.write(folder .. "/tokenizer.model", model(2) .. bytes)
      assert.error_matches(function() qm.tokenizer.load(folder) end, "tokenizer.model: not a SentencePiece model: "
        .. message, 1, true)
    end
  end)
end)
