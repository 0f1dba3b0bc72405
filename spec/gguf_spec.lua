-- GGUF files: what the format's description says, and every way in which a file is not so.
local qm = require("quartermoon")
local hand = require("spec.support.gguf")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local hex, info, key, text = hand.hex, hand.info, hand.key, hand.text
local function u32(x) return hand.integer(x, 4) end
local function u64(x) return hand.integer(x, 8) end

local folder, remove_folder
before_each(function() folder, remove_folder = process.folder() end)
after_each(function() remove_folder() end)

local function write(parts)
  local path = folder .. "/x.gguf"
  qm.files.write(path, type(parts) == "string" and parts or hand.file(parts))
  return path
end

local function values(parts, name)
  return qm.gguf.with(write(parts), function(file) return file:tensor(name, "cpu"):totable() end)
end

describe("qm.gguf.open", function()
  it("decodes Q4_0: an f16 scale, then byte j with weights j and j + 16", function()
    -- Scale 0.5; nibbles 0 .. 15, then 15 .. 0.
    local block = hex "0038 f0e1d2c3b4a5968778695a4b3c2d1e0f"
    local w = values({ infos = { info("w", { 32, 1 }, 2, 0) }, data = block }, "w")
    for j = 0, 15 do
      assert.equal(0.5 * (j - 8), w[1][j + 1])
      assert.equal(0.5 * (15 - j - 8), w[1][j + 17])
    end
  end)

  it("decodes Q4_1: scale, least value, nibbles", function()
    -- Scale 2, least value -3 (0xc200).
    local block = hex "0040 00c2 f0e1d2c3b4a5968778695a4b3c2d1e0f"
    local w = values({ infos = { info("w", { 32 }, 3, 0) }, data = block }, "w")
    for j = 0, 15 do
      assert.equal(2 * j - 3, w[j + 1])
      assert.equal(2 * (15 - j) - 3, w[j + 17])
    end
  end)

  it("decodes Q8_0: scale, signed bytes", function()
    local block = hex("0034" .. "80817f00ff01" .. ("02"):rep(26)) -- 0.25
    local w = values({ infos = { info("w", { 32, 2 }, 8, 0) }, data = block .. hex("00c0" .. ("01"):rep(32)) }, "w")
    assert.same({ -32, -31.75, 31.75, 0, -0.25, 0.25, 0.5 }, { unpack(w[1], 1, 7) })
    assert.equal(-2, w[2][32])
  end)

  it("reads F32, F16, BF16 and whole numbers as they are, rows first", function()
    local data = hex "0000803f 000000c0 00004040 0000003f 00000000 0000807f" .. ("\0"):rep(8) -- 1 -2 3 .5 0 inf
      .. hex "003c 00c0 017c" .. ("\0"):rep(26) .. hex "803f 00c0" .. ("\0"):rep(28) .. hex "ffffffff 05000000"
    local file = qm.gguf.open(write { data = data, infos = { info("a", { 3, 2 }, 0, 0), info("b", { 3 }, 1, 32),
      info("c", { 2 }, 30, 64), info("d", { 2 }, 26, 96) } })
    assert.same({ "a", "b", "c", "d" }, file:names())
    assert.same({ { 1, -2, 3 }, { 0.5, 0, math.huge } }, file:tensor("a"):totable())
    local kind, shape, size_bytes = file:info("a")
    assert.same({ "F32", { 2, 3 }, 24 }, { kind, shape, size_bytes })
    local b = file:tensor("b", testing.device)
    assert.equal("f16", b.dtype)
    assert.same({ 1, -2 }, { unpack(b:totable(), 1, 2) })
    assert.is_true(b:totable()[3] ~= b:totable()[3]) -- a NaN
    assert.same({ 1, -2 }, file:tensor("c"):totable())
    assert.same({ -1, 5 }, file:tensor("d"):totable())
    file:close()
    file:close()
    assert.error_matches(function() file:tensor("a") end, "is closed")
  end)

  it("names a tensor of a file that was cut off meanwhile", function()
    local path = write { infos = { info("w", { 64 }, 0, 0), info("q", { 32 }, 8, 256) }, data = ("\0"):rep(290) }
    local file = qm.gguf.open(path)
    process.write(path, qm.files.read(path):sub(1, -200)) -- in place
    for _, name in ipairs({ "w", "q" }) do
      assert.error_matches(function() file:tensor(name) end, "tensor '" .. name .. "': the file is truncated", 1, true)
    end
    file:close()
  end)

  it("knows the size of every block type, and says which it does not decode", function()
    local kinds = { { 6, "Q5_0", 22, 32 }, { 7, "Q5_1", 24, 32 }, { 10, "Q2_K", 84, 256 }, { 11, "Q3_K", 110, 256 },
      { 12, "Q4_K", 144, 256 }, { 13, "Q5_K", 176, 256 }, { 14, "Q6_K", 210, 256 } }
    for _, kind in ipairs(kinds) do
      local path = write { infos = { info("w", { kind[4] }, kind[1], 0) }, data = ("\1"):rep(kind[3]) }
      qm.gguf.with(path, function(file)
        assert.same({ kind[2], { kind[4] }, kind[3] }, { file:info("w") })
        assert.error_matches(function() file:tensor("w") end, "x.gguf: tensor 'w': values of type " .. kind[2], 1, true)
      end)
    end
  end)

  it("reads metadata of every type, of versions 2 and 3, and its own alignment", function()
    local keys = { key("a.u8", 0, "\255"), key("a.i8", 1, "\255"), key("a.u16", 2, "\254\255"),
      key("a.i16", 3, "\254\255"), key("a.u32", 4, "\253\255\255\255"), key("a.i32", 5, "\253\255\255\255"),
      key("a.f32", 6, hex "0000c0bf"), key("a.yes", 7, "\1"), key("a.no", 7, "\0"), key("a.s", 8, text("\"é\0'")),
      key("a.list", 9, u32(8) .. u64(2) .. text("x") .. text("")), key("a.u64", 10, u64(2 ^ 53)),
      key("a.big", 10, ("\255"):rep(8)), key("a.i64", 11, ("\255"):rep(8)), key("a.f64", 12, hex "000000000000f83f"),
      key("a.nan", 6, hex "ffffffff"), key("a.nan64", 12, hex "ffffffffffffffff"),
      key("a.nested", 9, u32(9) .. u64(2) .. u32(7) .. u64(2) .. "\1\0" .. u32(4) .. u64(0)),
      key("general.alignment", 4, u32(64)) }
    for version = 2, 3 do
      local file = qm.gguf.open(write { version = version, keys = keys, align = 64,
        infos = { info("w", { 1 }, 0, 0), info("v", { 1 }, 0, 64) }, data = ("\0"):rep(128) })
      local m = file.metadata
      assert.same({ 255, -1, 65534, -2, 2 ^ 32 - 3, -3, -1.5, true, false, "\"é\0'", { "x", "" }, 2 ^ 53, -1, 1.5 },
        { m["a.u8"], m["a.i8"], m["a.u16"], m["a.i16"], m["a.u32"], m["a.i32"], m["a.f32"], m["a.yes"], m["a.no"],
          m["a.s"], m["a.list"], m["a.u64"], m["a.i64"], m["a.f64"] })
      assert.equal(0xffffffffffffffffULL, m["a.big"])
      assert.is_true(m["a.nan"] ~= m["a.nan"] and m["a.nan64"] ~= m["a.nan64"])
      assert.same({ { true, false }, {} }, m["a.nested"])
      assert.same({ "string[]", "array[]", "bool", version, 64 }, { file.types["a.list"], file.types["a.nested"],
        file.types["a.no"], file.version, file.alignment })
      assert.same(#keys, #file.keys)
      file:close()
    end
  end)

  local one = { infos = { info("w", { 8 }, 0, 0) }, data = ("\0"):rep(32) }
  local function with(changes)
    local parts = {}
    for name, value in pairs(one) do parts[name] = value end
    for name, value in pairs(changes) do parts[name] = value end
    return parts
  end
  local zeros = ("\0"):rep(64)
  local BAD = {
    { "another kind of file", with { magic = "GGML" }, "it does not begin with 'GGUF'" },
    { "version 1", with { version = 1 }, "version 1 is not known, only 2 and 3" },
    { "version 4", with { version = 4 }, "version 4 is not known" },
    { "the other byte order", with { version = 0x3000000 }, "big-endian" },
    { "too many tensors", with { tensor_count = 2 ^ 40 }, "1099511627776 tensors and 0 keys are said to follow" },
    { "too many keys", with { key_count = 2 ^ 63 }, "keys are said to follow" },
    { "fewer tensors than there are", with { tensor_count = 0 }, "bytes behind the last tensor" },
    { "a string beyond the end", with { keys = { key("a", 8, u64(1000) .. "x") } },
      "key 'a' has 1000 bytes, but only" },
    { "a string of 2^64 - 1 bytes", with { keys = { key("a", 8, ("\255"):rep(8)) } },
      "key 'a' has 18446744073709551616" },
    { "a key beyond the end", with { keys = { u64(2 ^ 20) .. "ab" .. zeros } },
      "key 1 of the metadata has 1048576 bytes" },
    { "an empty key", with { keys = { key("", 0, "\0") } }, "key 1 of the metadata is empty" },
    { "a key twice", with { keys = { key("a", 0, "\0"), key("a", 0, "\1") } }, "key 'a' stands there twice" },
    { "a value of no type", with { keys = { key("a", 13, zeros) } }, "key 'a': its type is 13, which is none" },
    { "elements of no type", with { keys = { key("a", 9, u32(99) .. u64(1) .. zeros) } },
      "key 'a': the type of its elements is 99" },
    { "a boolean of 2", with { keys = { key("a", 7, "\2") } }, "key 'a': a boolean of 2" },
    { "an array beyond the end", with { keys = { key("a", 9, u32(4) .. u64(2 ^ 30)) } },
      "key 'a': 1073741824 elements of at least 4 bytes, but only" },
    { "an array of too many strings", with { keys = { key("a", 9, u32(8) .. u64(2 ^ 60)) } },
      "elements of at least 8" },
    { "arrays without end", with { keys = { key("a", 9, (u32(9) .. u64(1)):rep(9) .. zeros) } },
      "key 'a': arrays in each other, 8 deep" },
    { "an alignment of 24", with { keys = { key("general.alignment", 4, u32(24)) } },
      "key 'general.alignment': expected a u32 that is a power of 2, got u32 24" },
    { "an alignment of 0", with { keys = { key("general.alignment", 4, u32(0)) } }, "got u32 0" },
    { "an alignment in words", with { keys = { key("general.alignment", 8, text("32")) } }, "got string 32" },
    { "five dimensions", with { infos = { info("w", { 1, 1, 1, 1, 8 }, 0, 0) } }, "tensor 'w': 5 dimensions" },
    { "extents that overflow", with { infos = { info("w", { 2 ^ 40, 2 ^ 40 }, 0, 0) } },
      "tensor 'w': its extents 1099511627776 x 1099511627776 make no sense" },
    { "an unknown type", with { infos = { info("w", { 8 }, 4, 0) } }, "tensor 'w': type 4 is not known" },
    { "half a block", with { infos = { info("w", { 8 }, 2, 0) } },
      "tensor 'w': rows of 8 elements are no whole blocks of Q4_0, which has 32" },
    { "one element of a block type", with { infos = { info("w", {}, 2, 0) } },
      "tensor 'w': rows of 1 elements are no whole blocks of Q4_0, which has 32" },
    { "an offset between", with { infos = { info("w", { 4 }, 0, 16) } }, "no multiple of the alignment 32" },
    { "a tensor beyond the end", with { infos = { info("w", { 9 }, 0, 0) } },
      "tensor 'w': it ends at byte 36 of the data, but there are 32: the file is truncated" },
    { "an offset beyond the end", with { infos = { info("w", { 8 }, 0, 2 ^ 62) } }, "belong to no tensor" },
    { "an overlap", with { infos = { info("w", { 8 }, 0, 0), info("v", { 8 }, 0, 0) } },
      "tensor 'w' overlaps tensor 'v'" },
    { "a hole", with { infos = { info("w", { 8 }, 0, 64) }, data = ("\0"):rep(96) },
      "bytes 0 to 64 of the data belong to no tensor" },
    { "bytes behind", with { data = ("\0"):rep(64) }, "32 bytes behind the last tensor" },
    { "a name twice", with { infos = { info("w", { 4 }, 0, 0), info("w", { 4 }, 0, 32) } },
      "tensor 'w': it stands there twice" },
    { "a long name", with { infos = { info(("n"):rep(64), { 8 }, 0, 0) } }, "its name has 64 bytes, not 1 to 63" },
    { "no name", with { infos = { info("", { 8 }, 0, 0) } }, "its name has 0 bytes" },
    { "a name full of controls", with { infos = { info("\27[2J", { 8 }, 4, 0) } }, "tensor '?[2J': type 4" },
  }
  for _, case in ipairs(BAD) do
    it("refuses, naming file and reason, " .. case[1], function()
      local path = write(case[2])
      local ok, message = pcall(qm.gguf.open, path)
      assert.is_false(ok)
      assert(message:find("qm.gguf.open: " .. path .. ": ", 1, true), message)
      assert(message:find(case[3], 1, true), message)
      -- Inspection lists what is left and says the same.
      local problems = table.concat(qm.inspection.open(path).problems, "\n")
      assert(case[1] == "another kind of file" or problems:find(case[3], 1, true), problems)
    end)
  end

  it("refuses every beginning of a file, and noise, without a crash", function()
    local whole = hand.file(with { keys = { key("a.list", 9, u32(8) .. u64(2) .. text("x") .. text("yz")),
      key("a.n", 9, u32(4) .. u64(2) .. u64(7)) } })
    for length = 0, #whole - 1 do
      local ok, message = pcall(qm.gguf.open, write(whole:sub(1, length)))
      assert(not ok and message:find("x.gguf: ", 1, true), message)
    end
    local generator = qm.generator(5)
    local noise = generator:rand({ 150, 3 }, { device = "cpu" }):totable()
    for _, place in ipairs(noise) do
      local at = math.floor(place[1] * #whole) + 1
      local path = write(whole:sub(1, at - 1) .. string.char(math.floor(place[2] * 256)) .. whole:sub(at + 1))
      local ok, file = pcall(qm.gguf.open, path)
      if ok then file:close() else assert(file:find("x.gguf: ", 1, true), file) end
      qm.inspection.text(qm.inspection.open(path))
    end
  end)
end)

describe("qm.gguf.save", function()
  it("writes what opens to the same, and the bytes that the description says", function()
    local path = folder .. "/y.gguf"
    local w = qm.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, { device = testing.device })
    local metadata = { { "a.s", "string", "x" }, { "a.n", "u32", 7 }, { "a.list", "string[]", { "p", "q" } },
      { "a.yes", "bool", true }, { "a.f", "f32[]", { 0.5, -1 } }, { "a.i", "i32[]", { -5 } },
      { "a.u64", "u64", 0xffffffffffffffffULL }, { "a.none", "string[]", {} } }
    qm.gguf.save(path, { { "w", w }, { "h", w:to("f16") }, { "n", qm.arange(1, 3, { dtype = "i32" }) } }, metadata)
    qm.gguf.with(path, function(file)
      for i, entry in ipairs(metadata) do
        assert.equal(entry[1], file.keys[i])
        assert.equal(entry[2], file.types[entry[1]])
        assert.same(entry[3], file.metadata[entry[1]])
      end
      testing.assert_equal(w:to("cpu"), file:tensor("w", "cpu"))
      testing.assert_equal(w:to("f16"):to("cpu"), file:tensor("h", "cpu"))
    end)
    qm.gguf.save(path, { { "w", qm.tensor({ { 1, -2 } }) } }, { { "a.n", "u32", 7 } })
    local data = hex "0000803f 000000c0" .. ("\0"):rep(24)
    assert.equal(hand.file { keys = { key("a.n", 4, u32(7)) }, infos = { info("w", { 2, 1 }, 0, 0) }, data = data },
      qm.files.read(path))
  end)

  it("says what does not fit, and leaves nothing", function()
    local path, x = folder .. "/y.gguf", qm.ones({ 4 })
    local function refuse(words, ...)
      local arguments = { ... }
      assert.error_matches(function() qm.gguf.save(path, unpack(arguments)) end, words, 1, true)
      assert.same({}, qm.files.list(folder))
    end
    refuse("argument 'tensors': expected different names of 1 to 63 bytes, got string 'w'", { { "w", x }, { "w", x } })
    refuse("expected different names of 1 to 63 bytes", { { ("n"):rep(64), x } })
    refuse("argument 'tensors.w': expected a type that GGUF has, got string 'u8'", { { "w", qm.from_string("ab") } })
    refuse("argument 'tensors.w': expected rows of whole blocks of 32, got number 4",
      { { "w", { type = "Q4_0", shape = { 4 }, write = print } } })
    refuse("argument 'metadata.a': expected an integer from 0 to 255, got number 256", {}, { { "a", "u8", 256 } })
    refuse("argument 'metadata.a': expected a type of GGUF's scalars or string, got string 'u7'", {},
      { { "a", "u7", 1 } })
    refuse("argument 'metadata.a[2]': expected a string, got number 1", {}, { { "a", "string[]", { "x", 1 } } })
    refuse("different keys", {}, { { "a", "u8", 1 }, { "a", "u8", 1 } })
    refuse("tensor 'w': 3 bytes were written, its extents take 18",
      { { "w", { type = "Q4_0", shape = { 32 }, write = function(put) put("abc") end } } })
    refuse("the maker's own",
      { { "w", { type = "Q4_0", shape = { 32 }, write = function() error("the maker's own") end } } })
  end)

  it("keeps the old file where the new one cannot be finished", function()
    local path = folder .. "/y.gguf"
    qm.gguf.save(path, { { "w", qm.ones({ 4 }) } }, {})
    local before = qm.files.read(path)
    pcall(qm.gguf.save, path, { { "w", { type = "F32", shape = { 8 }, write = function(put) put("abcd") end } } }, {})
    assert.equal(before, qm.files.read(path))
    assert.same({ "y.gguf" }, qm.files.list(folder))
  end)
end)

describe("quartermoon inspect of a GGUF file", function()
  it("lists tensors with their bits, and facts of the model", function()
    local keys = { key("general.architecture", 8, text("llama")), key("llama.block_count", 4, u32(2)),
      key("tokenizer.ggml.model", 8, text("gpt2")),
      key("tokenizer.ggml.tokens", 9, u32(8) .. u64(1) .. text("x")) }
    local block = hex "007c" .. ("\1"):rep(16) -- a scale that is infinite
    local path = write { keys = keys, data = block .. ("\0"):rep(14) .. ("\0"):rep(8),
      infos = { info("blk.0.attn_q.weight", { 32, 1 }, 2, 0), info("token_embd.weight", { 1, 2 }, 0, 32) } }
    local report = qm.inspection.open(path, { values = true })
    local words = qm.inspection.text(report)
    assert.truthy(words:find("blk.*.attn_q.weight", 1, true))
    assert.truthy(words:find("Q4_0  [1, 32]  4.50", 1, true), words)
    assert.truthy(words:find("llama: 2 layers", 1, true))
    assert.same({ "x.gguf: block 1 of 2 has no tensor",
      "x.gguf: tensor 'token_embd.weight' has 2 rows for 1 tokens",
      "x.gguf: tensor 'blk.0.attn_q.weight' holds 1 values that are NaN or infinite" }, report.problems)
    local output, status = process.run("bin/quartermoon inspect " .. process.quote(path))
    assert.equal(1, status)
    assert.truthy(output:find("2 problems:", 1, true), output)
  end)
end)
