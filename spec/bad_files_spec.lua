-- Whatever is wrong with a file, the reader's error names the file and the reason, nothing stays open,
-- and the program goes on. What each format refuses in particular stands in its own spec.
local qm = require("quartermoon")
local process = require("spec.support.process")

describe("bad files", function()
  local folder, remove_folder

  before_each(function()
    folder, remove_folder = process.folder()
  end)
  after_each(function() remove_folder() end)

  ---Each reader: a good file of its kind, and how to read it. A reader raises, or returns nil and why.
  local readers = {
    { "qm.safetensors.open", function(path) qm.safetensors.save(path, { x = qm.ones({ 5 }) }) end,
      function(path) qm.safetensors.open(path):close() end },
    { "qm.gguf.open", function(path) qm.gguf.save(path, { { "x", qm.ones({ 8 }) } }, {}) end,
      function(path) qm.gguf.open(path):close() end },
    { "qm.tokenizer.load", function(path) qm.tokenizer.train_bpe("aa aa", { vocab_size = 258 }):save(path) end,
      qm.tokenizer.load },
    { "qm.data.open", function(path) qm.files.write(path, "some text") end,
      function(path) qm.data.open(path):free() end, any_bytes = true },
    { "qm.metrics.read", function(path) qm.files.write(path, '{"step":1}\n{"step":2}\n') end,
      qm.metrics.read, any_prefix = true },
    { "qm.map_file", function(path) qm.files.write(path, ("x"):rep(16)) end,
      function(path) qm.map_file(path, "i32"):free() end, any_bytes = true },
    { "qm.files.read_json", function(path) qm.files.write_json(path, { 1, 2, 3 }) end, qm.files.read_json },
  }

  ---Expect a failure whose sentence holds the path and the reason.
  local function expect_failure(read, path, reason, what)
    local ok, value, message = pcall(read, path)
    assert.is_true(not ok or value == nil, what .. " was accepted")
    message = ok and message or value
    assert.equal("string", type(message), what)
    assert.truthy(message:find(path, 1, true), what .. ": no file is named: " .. message)
    if reason then assert.truthy(message:find(reason, 1, true), what .. ": " .. message) end
  end

  for _, reader in ipairs(readers) do
    local name, write, read = unpack(reader)
    describe("and " .. name, function()
      it("reads a good one", function()
        write(folder .. "/good")
        assert.is_true((pcall(read, folder .. "/good")))
      end)

      it("names one that is missing, a folder, or a link to nowhere", function()
        expect_failure(read, folder .. "/none", "No such file or directory", "a missing file")
        expect_failure(read, folder, nil, "a folder")
        os.execute(("ln -s nowhere %s/link; ln -s loop %s/loop"):format(folder, folder))
        expect_failure(read, folder .. "/link", "No such file or directory", "a link to nowhere")
        expect_failure(read, folder .. "/loop", "Too many levels of symbolic links", "a loop of links")
        expect_failure(read, folder .. "/none/x", "No such file or directory", "a missing folder")
      end)

      if not reader.any_bytes then
        it("names one that is cut short, empty or full of noise", function()
          local path = folder .. "/bad"
          write(path)
          local whole = qm.files.read(path)
          collectgarbage()
          collectgarbage()
          local live = qm.handles_live()
          for length = 0, reader.any_prefix and -1 or #whole - 2 do
            qm.files.write(path, whole:sub(1, length))
            expect_failure(read, path, nil, length .. " bytes of " .. #whole)
          end
          local noises = { ("\0"):rep(100) .. "\n", ("\255"):rep(100) .. "\n", "[[[[\n" .. whole, "nonsense\n" }
          for _, noise in ipairs(noises) do
            qm.files.write(path, noise)
            expect_failure(read, path, nil, "noise")
          end
          collectgarbage()
          collectgarbage()
          assert.equal(live, qm.handles_live())
        end)
      end
    end)
  end

  it("that may not be read are named by every reader", function()
    local path = folder .. "/secret"
    qm.files.write(path, "x")
    os.execute("chmod 000 " .. path)
    local file = io.open(path, "rb")
    if file then
      file:close()
      return pending("this user may read everything")
    end
    for _, reader in ipairs(readers) do expect_failure(reader[3], path, "Permission denied", reader[1]) end
  end)

  it("of half an element are refused by map_file", function()
    qm.files.write(folder .. "/odd", "12345")
    assert.error_matches(function() qm.map_file(folder .. "/odd", "i32") end,
      folder .. "/odd: 5 bytes are no whole number of i32", 1, true)
  end)

  it("in the place of a file to write are named", function()
    local writers = {
      function(path) qm.files.write(path, "x") end,
      function(path) qm.files.write_json(path, { 1 }) end,
      function(path) qm.safetensors.save(path, { x = qm.ones({ 1 }) }) end,
      function(path) qm.gguf.save(path, { { "x", qm.ones({ 1 }) } }, {}) end,
      function(path) qm.tokenizer.byte():save(path) end,
      function(path) qm.metrics.open(path) end,
    }
    for _, write in ipairs(writers) do
      expect_failure(write, folder, "Is a directory", "a folder")
      expect_failure(write, folder .. "/none/x", "No such file or directory", "a missing folder")
      qm.files.write(folder .. "/file", "x")
      expect_failure(write, folder .. "/file/x", "Not a directory", "a file for a folder")
    end
    assert.same({ "file" }, qm.files.list(folder))
  end)
end)
