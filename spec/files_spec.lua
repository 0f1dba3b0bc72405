local qm = require("quartermoon")
local tensors = require("quartermoon.tensor")

describe("qm.files", function()
  local path
  before_each(function() path = os.tmpname() end)
  after_each(function()
    os.remove(path)
    os.remove(path .. ".partial")
  end)

  it("writes strings and host buffers, and nothing before commit", function()
    local buffer = tensors.host_buffer("i16", 2)
    buffer[0], buffer[1] = 0x4241, 0x4443
    local file = qm.files.create(path)
    file:write("text ")
    file:write(buffer, 3)
    assert.equal("", qm.files.read(path))
    file:commit()
    assert.equal("text ABC", qm.files.read(path))
  end)

  it("writes no byte that is not the caller's", function()
    local file = qm.files.create(path)
    assert.error_matches(function() file:write(tensors.host_buffer("i16", 2), 5) end,
      "file:write: argument 'bytes': expected a string, or a host buffer of 5 bytes", 1, true)
    assert.error_matches(function() file:write(nil) end, "file:write: argument 'bytes': expected ", 1, true)
    file:write("abc", 1000) -- a string is written whole, and no further
    file:commit()
    assert.equal("abc", qm.files.read(path))
  end)

  it("refuses a path that is none and a value that JSON cannot hold", function()
    for _, name in ipairs({ "create", "read", "exists", "size" }) do
      assert.error_matches(function() qm.files[name](7) end,
        ("qm.files.%s: argument 'path': expected a string, got number 7"):format(name), 1, true)
    end
    assert.error_matches(function() qm.files.write_json(path, { print }) end,
      "qm.files.write_json: Cannot serialise function", 1, true)
  end)
end)
