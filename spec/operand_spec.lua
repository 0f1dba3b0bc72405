local ffi = require("ffi")
local lib = require("quartermoon.ffi").lib
local qm = require("quartermoon")

---Change a tensor's descriptor behind its back, as a caller in C could, and ask the engine.
local function refusal(change)
  local x, out = qm.zeros({ 2, 3 }), qm.zeros({ 2, 3 })
  change(x.desc)
  local status = lib.qm_copy(x.desc, out.desc)
  return status ~= 0 and ffi.string(lib.qm_last_error()) or nil
end

describe("a tensor's descriptor", function()
  it("is checked against its storage", function()
    local outside = "argument 'x': its extents leave its storage"
    assert.is_nil(refusal(function() end))
    assert.equal(outside, refusal(function(desc) desc.offset_bytes = 4096 end))
    assert.equal(outside, refusal(function(desc) desc.offset_bytes = -4 end))
    assert.equal(outside, refusal(function(desc) desc.offset_bytes = -2LL ^ 63 end))
    assert.equal(outside, refusal(function(desc) desc.offset_bytes = 2 end)) -- between elements
    assert.equal(outside, refusal(function(desc) desc.shape[0] = -2 end))
    assert.equal(outside, refusal(function(desc) desc.shape[0], desc.shape[1] = 0, 2LL ^ 58 end))
    assert.equal(outside, refusal(function(desc) desc.shape[0], desc.shape[1] = 2LL ^ 32, 2LL ^ 32 end))
    assert.equal(outside, refusal(function(desc)
      desc.ndim, desc.shape[0], desc.shape[1], desc.shape[2] = 3, 0, 2LL ^ 40, 2LL ^ 40
    end))
  end)

  it("names itself when it is none", function()
    local none = "argument 'x': not a tensor (or one that was freed)"
    assert.equal(none, refusal(function(desc) desc.storage = nil end))
    assert.equal(none, refusal(function(desc) desc.ndim = 5 end))
    assert.equal(none, refusal(function(desc) desc.dtype = 99 end))
  end)
end)

describe("an output that may be an input", function()
  local function backward(dgate, dup)
    local dout, gate, up = qm.ones({ 4 }), qm.ones({ 4 }), qm.ones({ 4 })
    local status = lib.qm_swiglu_backward(dout.desc, gate.desc, up.desc, (dgate or gate).desc, (dup or up).desc)
    return status ~= 0 and ffi.string(lib.qm_last_error()) or nil
  end

  it("may not be another output", function()
    local both = qm.ones({ 4 })
    assert.is_nil(backward())
    assert.equal("argument 'dgate': overlaps argument 'dup'", backward(both, both))
  end)
end)

describe("a handle", function()
  it("that is NULL crashes no call", function()
    lib.qm_storage_retain(nil)
    lib.qm_device_retain(nil)
    assert.equal(0, tonumber(lib.qm_storage_size(nil)))
    assert.equal(0, lib.qm_storage_references(nil))
    for _, release in ipairs({ "qm_storage_release", "qm_device_release", "qm_file_release", "qm_safetensors_release",
      "qm_safetensors_writer_release" }) do
      lib[release](nil)
    end
    assert.equal(0, tonumber(lib.qm_safetensors_count(nil)))
  end)
end)

describe("an empty tensor", function()
  it("may have a 0 anywhere in its shape", function()
    for _, shape in ipairs({ { 0 }, { 5, 0 }, { 0, 5 }, { 3, 0, 2 ^ 40 } }) do
      assert.equal(0, qm.zeros(shape):clone():count())
    end
  end)

  it("overlaps nothing, wherever it lies", function()
    local x = qm.zeros({ 4, 3 })
    local empty = x:view_rows("spec", 3, 0)
    assert.equal(0, empty:copy(qm.ones({ 0, 3 })):count())
    assert.equal(0, empty:copy(empty):count())
  end)
end)

describe("a device's memory", function()
  it("refuses what no machine has, by a sentence", function()
    assert.error_matches(function() qm.zeros({ 2 ^ 50 }) end, ("out of memory on %s: asked for 4503599627370496 bytes")
      :format(qm.default_device().name), 1, true)
    assert.error_matches(function() qm.zeros({ 2 ^ 40, 2 ^ 40 }) end, "at most 2^50 elements", 1, true)
    assert.error_matches(function() qm.zeros({ 0, 1e300 }) end, "argument 'shape'", 1, true)
    -- Beyond the allocator's largest size class; Lua cannot ask for it, C can.
    local out = ffi.new("qm_storage *[1]")
    for _, size_bytes in ipairs({ 2LL ^ 56, 2LL ^ 60, 2LL ^ 62 }) do
      assert.equal(ffi.C.QM_E_MEMORY, lib.qm_storage_create(qm.device("cpu").handle, size_bytes, out))
    end
  end)

  it("keeps to its limit, and goes on after a refusal", function()
    local device = qm.device("reference")
    local before = device:memory()
    device:empty_cache()
    device:set_limit(before.live_bytes + 2 ^ 20)
    local first = qm.zeros({ 2 ^ 17 }, { device = device }) -- half of it
    assert.error_matches(function() qm.zeros(2 ^ 18, { device = device }) end, "out of memory on reference", 1, true)
    first:free()
    local second = qm.zeros({ 2 ^ 17 }, { device = device }) -- from the cache
    second:free()
    device:set_limit(0)
    assert.equal(before.live_count, device:memory().live_count)
  end)

  it("serves the same size from the cache", function()
    local device = qm.device("reference")
    qm.zeros({ 12345 }, { device = device }):free()
    local cached = device:memory().cached_bytes
    local again = qm.zeros({ 12345 }, { device = device })
    assert(device:memory().cached_bytes < cached)
    again:free()
    assert.equal(cached, device:memory().cached_bytes)
    device:empty_cache()
    assert.equal(0, device:memory().cached_bytes)
  end)
end)

describe("a path that is no file", function()
  local process = require("spec.support.process")
  local folder, remove = process.folder()
  teardown(remove)

  it("is refused at once, even a pipe that nobody writes", function()
    process.run("mkfifo " .. folder .. "/pipe")
    assert.error_matches(function() qm.map_file(folder .. "/pipe") end, "not a regular file", 1, true)
    assert.error_matches(function() qm.safetensors.open(folder .. "/pipe") end, "not a regular file", 1, true)
    assert.error_matches(function() qm.map_file(folder) end, "not a regular file", 1, true)
  end)
end)
