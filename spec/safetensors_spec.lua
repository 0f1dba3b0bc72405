local qm = require("quartermoon")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local function u64(value)
  local bytes = {}
  for i = 1, 8 do
    bytes[i] = string.char(value % 256)
    value = math.floor(value / 256)
  end
  return table.concat(bytes)
end

local write_file = process.write

describe("qm.safetensors", function()
  local folder, remove_folder, path

  before_each(function()
    folder, remove_folder = process.folder()
    path = folder .. "/x.safetensors"
  end)
  after_each(function() remove_folder() end)

  local function files() return (process.run("ls -A " .. folder)) end

  describe("open", function()
    it("reads what the format's page shows, header padded with spaces or not", function()
      local header = '{"__metadata__":{"who":"me"},"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]},'
        .. '"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
      for _, padding in ipairs({ "", "   " }) do
        write_file(path, u64(#header + #padding) .. header .. padding .. "\0\0\128\63" .. "\1\2")
        local file = qm.safetensors.open(path)
        assert.same({ "a", "b" }, file:names())
        assert.same({ who = "me" }, file.metadata)
        local dtype, shape = file:info("b")
        assert.equal("u8", dtype)
        assert.same({ 2 }, shape)
        assert.equal(1, file:tensor("a"):item())
        assert.same({ 1, 2 }, file:tensor("b"):totable())
        file:close()
        file:close()
        assert.error_matches(function() file:tensor("a") end, "is closed", 1, true)
      end
    end)

    -- Each case is a header, then data.
    local function entry(dtype, shape, first, last)
      return ('{"dtype":%s,"shape":%s,"data_offsets":[%s,%s]}'):format(dtype, shape, first, last)
    end
    local malformed = {
      { "is not JSON", "{nope", "" , "not JSON" },
      { "is not an object", "[1]", "", "not a JSON object" },
      { "has a JSON value behind the header", "{} {}", "", "not JSON" },
      { "names a tensor twice", '{"a":' .. entry('"U8"', "[1]", 0, 1) .. ',"a":' .. entry('"U8"', "[1]", 1, 2) .. "}",
        "xy", "duplicate object key" },
      { "has an unknown dtype", '{"a":' .. entry('"F31"', "[1]", 0, 1) .. "}", "x", "unknown dtype 'F31'" },
      { "has a dtype that is no string", '{"a":' .. entry("7", "[1]", 0, 1) .. "}", "x", "dtype is not a string" },
      { "has a negative extent", '{"a":' .. entry('"U8"', "[-1]", 0, 1) .. "}", "x", "extent 1 of its shape" },
      { "has a fractional extent", '{"a":' .. entry('"U8"', "[1,1.5]", 0, 1) .. "}", "x", "extent 2 of its shape" },
      { "has a shape that overflows", '{"a":' .. entry('"F32"', "[4294967296,4294967296,4]", 0, 4) .. "}", "xxxx",
        "more than 2^63 bytes" },
      { "has an extent beyond 64 bits", '{"a":' .. entry('"F32"', "[99999999999999999999]", 0, 4) .. "}", "xxxx",
        "not JSON" },
      { "has a shape that is no list", '{"a":' .. entry('"U8"', '"1"', 0, 1) .. "}", "x", "shape is not a list" },
      { "has negative offsets", '{"a":' .. entry('"U8"', "[1]", -1, 0) .. "}", "x", "lie outside" },
      { "has offsets the wrong way round", '{"a":' .. entry('"U8"', "[1]", 1, 0) .. "}", "x", "lie outside" },
      { "ends before its data does", '{"a":' .. entry('"F32"', "[2]", 0, 8) .. "}", "xxxx", "lie outside" },
      { "has offsets that disagree with the shape", '{"a":' .. entry('"F32"', "[2]", 0, 4) .. "}", "xxxx",
        "its shape takes 8 bytes, its data_offsets hold 4" },
      { "has three offsets", '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', "x", "two whole numbers" },
      { "has no offsets", '{"a":{"dtype":"U8","shape":[1]}}', "x", "two whole numbers" },
      { "overlaps", '{"a":' .. entry('"U8"', "[2]", 0, 2) .. ',"b":' .. entry('"U8"', "[2]", 1, 3) .. "}", "xxx",
        "tensor 'b' begins at byte 1, inside tensor 'a'" },
      { "has a hole", '{"a":' .. entry('"U8"', "[1]", 0, 1) .. ',"b":' .. entry('"U8"', "[1]", 2, 3) .. "}", "xxx",
        "bytes 1 to 2 of the data belong to no tensor" },
      { "has a hole at the start", '{"a":' .. entry('"U8"', "[1]", 1, 2) .. "}", "xx", "bytes 0 to 1" },
      { "has trailing bytes", '{"a":' .. entry('"U8"', "[1]", 0, 1) .. "}", "xyz", "2 bytes behind the last tensor" },
      { "has an entry that is no object", '{"a":7}', "", "not an object" },
      { "has metadata that is no object", '{"__metadata__":[]}', "", "__metadata__ is not an object" },
      { "has metadata that is no string", '{"__metadata__":{"a":1}}', "", "value of 'a' is not a string" },
      { "has a NUL in a name", '{"a\\u0000b":' .. entry('"U8"', "[1]", 0, 1) .. "}", "x", "not JSON" },
      { "has a name that is not UTF-8", '{"a\255":' .. entry('"U8"', "[1]", 0, 1) .. "}", "x", "not JSON" },
      { "nests too deep", ("["):rep(100000), "", "not JSON" },
    }
    for _, case in ipairs(malformed) do
      it("refuses a file that " .. case[1], function()
        collectgarbage() -- what earlier specs dropped must not hide a leak
        collectgarbage()
        local live = qm.handles_live()
        write_file(path, u64(#case[2]) .. case[2] .. case[3])
        local ok, message = pcall(qm.safetensors.open, path)
        assert.is_false(ok)
        assert.truthy(message:find(path, 1, true), message)
        assert.truthy(message:find(case[4], 1, true), message)
        assert.equal(live, qm.handles_live())
      end)
    end

    it("refuses a file cut anywhere, and says which", function()
      qm.safetensors.save(path, { a = qm.ones({ 3 }), b = qm.ones({ 2, 2 }) }, { k = "v" })
      local whole = process.read(path)
      for length = 0, #whole - 1 do
        write_file(path, whole:sub(1, length))
        local ok, message = pcall(qm.safetensors.open, path)
        assert.is_false(ok, "cut to " .. length)
        assert.truthy(message:find(path, 1, true), message)
      end
    end)

    it("refuses absurd header lengths", function()
      for _, length in ipairs({ u64(2 ^ 40), ("\255"):rep(8), "\0\0\0\0\0\0\0\128" }) do
        write_file(path, length .. "{}")
        assert.error_matches(function() qm.safetensors.open(path) end, "truncated, or no safetensors", 1, true)
      end
    end)

    it("names what is missing, and what is no file", function()
      assert.error_matches(function() qm.safetensors.open(folder .. "/none") end,
        folder .. "/none: No such file or directory", 1, true)
      assert.error_matches(function() qm.safetensors.open(folder) end, folder .. ": not a regular file", 1, true)
      assert.error_matches(function() qm.safetensors.open(7) end, "argument 'path': expected a string", 1, true)
    end)

    it("lists types that no tensor here can hold, and refuses to read them", function()
      local header = '{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},'
        .. '"b":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[8,9]},'
        .. '"c":{"dtype":"I8","shape":[1],"data_offsets":[9,10]}}'
      write_file(path, u64(#header) .. header .. ("\7"):rep(10))
      local file = qm.safetensors.open(path)
      assert.equal("unsupported", (file:info("a")))
      assert.equal("unsupported", (file:info("b")))
      assert.error_matches(function() file:tensor("a") end, "'a' has a type or shape that no tensor", 1, true)
      assert.error_matches(function() file:read("b", qm.ones({ 1 })) end, "U8 of 5 dimensions", 1, true)
      assert.same({ 7 }, file:tensor("c"):totable())
      file:close()
    end)

    it("names file and tensor where an empty tensor is too wide for any memory", function()
      local header = '{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}'
      write_file(path, u64(#header) .. header)
      qm.safetensors.with(path, function(file)
        assert.error_matches(function() file:tensor("a") end,
          "file:tensor: " .. path .. ": tensor 'a': qm.empty: argument 'shape': expected an integer", 1, true)
      end)
    end)

    it("suggests the name that was meant, and checks what it reads into", function()
      qm.safetensors.save(path, { weight = qm.ones({ 2, 3 }) })
      qm.safetensors.with(path, function(file)
        assert.error_matches(function() file:tensor("wieght") end, "did you mean 'weight'?", 1, true)
        assert.error_matches(function() file:read("weight", qm.ones({ 3, 2 })) end,
          "'weight' is f32 [2, 3], got f32 [3, 2]", 1, true)
      end)
    end)

    it("reports a file that is cut while it is open, and goes on", function()
      qm.safetensors.save(path, { a = qm.ones({ 30000 }), b = qm.ones({ 5 }, { dtype = "f16" }) })
      local file = qm.safetensors.open(path)
      process.run("truncate -s 5000 " .. path)
      local ok, message = pcall(file.tensor, file, "a")
      assert.is_false(ok)
      assert.truthy(message:find(path .. ": tensor 'a': it ends at byte 5000: truncated while it was open", 1, true),
        message)
      file:close()
    end)

    it("lists a hundred thousand metadata entries in no time", function()
      local pairs_of = {}
      for i = 1, 1e5 do pairs_of[i] = ('"%d":"v"'):format(i) end
      local header = '{"__metadata__":{' .. table.concat(pairs_of, ",") .. "}}"
      write_file(path, u64(#header) .. header)
      local file, start = qm.safetensors.open(path), os.clock()
      assert.equal("v", file.metadata["100000"])
      file:close()
      assert.is_true(os.clock() - start < 10)
    end)

    it("survives random damage", function()
      qm.safetensors.save(path, { a = qm.ones({ 3 }), b = qm.ones({ 2, 2 }, { dtype = "f16" }) }, { k = "v" })
      local whole = process.read(path)
      for _ = 1, 300 do
        local at = math.random(#whole)
        write_file(path, whole:sub(1, at - 1) .. string.char(math.random(0, 255)) .. whole:sub(at + 1))
        local ok, file = pcall(qm.safetensors.open, path)
        if ok then
          for _, name in ipairs(file:names()) do pcall(file.tensor, file, name) end
          file:close()
        end
      end
    end)
  end)

  describe("save", function()
    it("brings every type back to the bit, in every number of dimensions", function()
      local parts = {}
      for i, dtype in ipairs({ "f32", "f16", "bf16", "i8", "u8", "i16", "i32", "i64" }) do
        local values = {}
        for j = 1, 24 do values[j] = (j * 7 + i) % 100 end
        local tensor = qm.tensor(values, { dtype = dtype })
        for k, shape in ipairs({ { 24 }, { 3, 8 }, { 2, 3, 4 }, { 1, 2, 3, 4 } }) do
          parts[dtype .. k] = tensor:view_as("spec", shape)
        end
        parts[dtype .. "_scalar"] = qm.full({}, 7, { dtype = dtype })
        parts[dtype .. "_empty"] = qm.empty({ 0, 3 }, { dtype = dtype })
      end
      qm.safetensors.save(path, parts, { a = "1", ["key with \"quotes\""] = "ü\n" })
      local file = qm.safetensors.open(path)
      assert.same({ a = "1", ["key with \"quotes\""] = "ü\n" }, file.metadata)
      local count = 0
      for name, tensor in pairs(parts) do
        local dtype, shape = file:info(name)
        assert.equal(tensor.dtype, dtype)
        assert.same(tensor.shape, shape)
        assert.equal(tensor:bytes(), file:tensor(name):bytes())
        count = count + 1
      end
      assert.equal(count, #file:names())
      file:close()
    end)

    it("reads and writes on the device under test", function()
      local x = qm.randn({ 513, 7 }, { device = testing.device })
      qm.safetensors.save(path, { x = x })
      qm.safetensors.with(path, function(file)
        testing.assert_equal(x, file:tensor("x", testing.device))
        testing.assert_equal(x, file:tensor("x", "reference"))
      end)
    end)

    it("keeps the order of a list, and puts the widest first for a table", function()
      local byte, word = qm.ones({ 3 }, { dtype = "u8" }), qm.ones({ 2 })
      qm.safetensors.save(path, { { "z", byte }, { "a", word } })
      qm.safetensors.with(path, function(file) assert.same({ "z", "a" }, file:names()) end)
      qm.safetensors.save(path, { b = byte, z = word, a = word })
      qm.safetensors.with(path, function(file) assert.same({ "a", "z", "b" }, file:names()) end)
    end)

    it("begins the data at a multiple of 8", function()
      for length = 1, 9 do
        qm.safetensors.save(path, { [("n"):rep(length)] = qm.ones({ 1 }) })
        assert.equal(0, (#process.read(path) - 4) % 8)
      end
    end)

    it("gives the same bytes for the same contents, and follows the umask", function()
      local parts, metadata = { a = qm.ones({ 2 }), b = qm.zeros({ 3 }) }, { x = "1", y = "2", z = "3" }
      qm.safetensors.save(path, parts, metadata)
      local first = process.read(path)
      qm.safetensors.save(path, { b = parts.b, a = parts.a }, { z = "3", y = "2", x = "1" })
      assert.equal(first, process.read(path))
      assert.equal("x.safetensors\n", files())
    end)

    it("takes an empty set", function()
      qm.safetensors.save(path, {})
      qm.safetensors.with(path, function(file) assert.same({}, file:names()) end)
    end)

    it("leaves the old file when it fails, and nothing else", function()
      qm.safetensors.save(path, { a = qm.ones({ 2 }) })
      collectgarbage()
      collectgarbage()
      local old, live = process.read(path), qm.handles_live()
      local freed, one = qm.ones({ 2 }), qm.ones({ 1 })
      freed:free()
      local refusals = {
        { { a = 3 }, nil, "argument 'tensors.a': expected a tensor" },
        { { a = freed }, nil, "this tensor was freed" },
        { { ["a\0b"] = one }, nil, "names without NUL bytes" },
        { { ["\255"] = one }, nil, "is not UTF-8" },
        { { __metadata__ = one }, nil, "the name '__metadata__' is taken" },
        { { { "a", one }, { "a", one } }, nil, "the name 'a' is taken" },
        { { a = one }, { step = 3 }, "argument 'metadata.step': expected a string" },
        { { a = one }, { step = "\255" }, "metadata 'step' is not UTF-8" },
      }
      for _, case in ipairs(refusals) do
        assert.error_matches(function() qm.safetensors.save(path, case[1], case[2]) end, case[3], 1, true)
        assert.equal(old, process.read(path))
        assert.equal("x.safetensors\n", files())
      end
      one:free()
      collectgarbage()
      collectgarbage()
      assert.equal(live, qm.handles_live())
    end)

    it("names a folder that does not exist", function()
      assert.error_matches(function() qm.safetensors.save(folder .. "/no/x", { a = qm.ones({ 1 }) }) end,
        folder .. "/no/x.partial: No such file or directory", 1, true)
    end)

    it("says so when a folder stands in its place", function()
      os.execute("mkdir " .. path)
      assert.error_matches(function() qm.safetensors.save(path, { a = qm.ones({ 1 }) }) end,
        path .. ": Is a directory", 1, true)
      assert.equal("x.safetensors\n", files())
    end)

    local function child(script, before)
      write_file(folder .. "/child.lua", "local qm = require('quartermoon')\nlocal path = ...\n" .. script)
      local pipe = io.popen(("%s LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' luajit %s/child.lua %s 2>&1"):format(
        before or "", folder, path))
      local text = pipe:read("*a")
      pipe:close()
      os.remove(folder .. "/child.lua")
      return text
    end

    it("reports a full disk, leaves the old file and nothing else", function()
      qm.safetensors.save(path, { a = qm.ones({ 2 }) })
      local old = process.read(path)
      -- A limit on the file's size of 16 blocks, with its signal ignored, fails as a full disk does.
      local text = child("print(pcall(qm.safetensors.save, path, { a = qm.ones({ 100000 }) }))",
        "trap '' XFSZ; ulimit -f 16;")
      assert.truthy(text:find("false.*" .. "x.safetensors.partial: File too large"), text)
      assert.equal(old, process.read(path))
      assert.equal("x.safetensors\n", files())
    end)

    it("leaves the old file when it is killed half way, and the next run cleans up", function()
      qm.safetensors.save(path, { a = qm.ones({ 2 }) })
      local old = process.read(path)
      -- Without the trap, the first write past the limit kills the process.
      child("qm.safetensors.save(path, { a = qm.ones({ 100000 }) })", "ulimit -f 16; ulimit -c 0;")
      assert.equal(old, process.read(path))
      assert.equal("x.safetensors\nx.safetensors.partial\n", files())
      qm.safetensors.save(path, { b = qm.ones({ 5 }) })
      assert.equal("x.safetensors\n", files())
      qm.safetensors.with(path, function(file) assert.same({ "b" }, file:names()) end)
    end)
  end)
end)
