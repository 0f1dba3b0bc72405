-- What only a CUDA device does: late errors, its memory's end, copies between devices.
local qm = require("quartermoon")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

describe("a CUDA device", function()
  local device, why = qm.device("cuda")
  if not device then
    it("is absent, and that is said", function()
      assert.matches("cuda", why)
      pending(why)
    end)
    return
  end

  it("says what it is and what memory it has", function()
    local info = device:info()
    assert.matches("compute capability", info.description)
    assert(info.free_bytes > 0 and info.free_bytes <= info.total_bytes)
    local absent, reason = qm.device("cuda:99")
    assert.is_nil(absent)
    assert.matches("there is no device 99", reason)
  end)

  it("takes and gives bytes of every size, in order", function()
    for _, count in ipairs({ 1, 63, 1000, 16384, 16385, 2 ^ 20, 2 ^ 20 + 1, 5 * 2 ^ 20 + 3 }) do
      local source = qm.arange(1, count, { dtype = "f32", device = "cpu" })
      local x = source:to(device)
      local y = (x + 1):to("cpu")
      testing.assert_equal(source + 1, y, count .. " elements")
      source:free()
      x:free()
      y:free()
    end
    -- Many small writes: the ring turns, and each is seen by the operation behind it.
    local sum = qm.zeros({ 100 }, { device = device })
    for i = 1, 2000 do
      local values = {}
      for j = 1, 100 do values[j] = i end
      local x = qm.tensor(values, { device = device })
      sum:add_(x)
      x:free()
    end
    assert.equal(2001000, sum:at(100))
  end)

  it("reports an index out of range when somebody waits, with the operation's name, and goes on", function()
    local table_of = qm.zeros({ 4, 3 }, { device = device })
    qm.gather(table_of, qm.tensor({ 1, 7 }, { dtype = "i32", device = device }))
    assert.error_matches(function() device:sync() end, "gather: index 7 is outside 0 .. 3", 1, true)
    device:sync()
    assert.equal(0, table_of:at(1, 1))
  end)

  it("goes on after its memory was not enough, in a recording too", function()
    local huge = device:info().total_bytes
    assert.error_matches(function() qm.empty({ huge }, { device = device }) end, "out of memory on cuda: asked for")
    assert.equal(5, qm.full({}, 5, { device = device }):item())
    local g = qm.graph(function(x) return qm.empty({ huge }, { device = device }), x + 1 end,
      { warmup = 0, device = device })
    local cached = qm.zeros({ 2 ^ 20 }, { device = device })
    cached:free() -- a cache to give back while the recording runs
    assert.error_matches(function() g(qm.zeros({ 3 }, { device = device })) end, "out of memory on cuda")
    assert.equal(5, qm.full({}, 5, { device = device }):item())
  end)

  it("keeps to a limit", function()
    local memory = device:memory()
    device:set_limit(memory.live_bytes + 2 ^ 20)
    local ok, message = pcall(qm.empty, { 2 ^ 20 }, { device = device })
    device:set_limit(0)
    assert.is_false(ok)
    assert.matches("limit", message)
  end)

  it("allocates inside a recording", function()
    device:empty_cache()
    local g = qm.graph(function(x)
      local big = qm.empty({ 2 ^ 22 }, { device = device }):fill(2)
      return x + big
    end, { warmup = 0, device = device })
    for i = 1, 3 do
      local y = g(qm.full({ 1 }, i, { device = device }))
      assert.equal(i + 2, y:at(2 ^ 22))
      y:free()
    end
    g:free()
  end)

  it("copies to another device, in order", function()
    local other, reason = qm.device("cuda:1")
    if not other then return pending(reason) end
    local x = qm.randn({ 3000, 1000 }, { device = device })
    local y = (x * 2):to(other)
    x:fill(0)
    local z = (y * 2):to(device)
    testing.assert_equal((y * 2):to("cpu"), z:to("cpu"))
  end)

  it("times operations where they run", function()
    local x, y = qm.randn({ 300, 300 }, { device = device }), qm.randn({ 300, 300 }, { device = device })
    local profile = qm.profile(function()
      for _ = 1, 20 do qm.swiglu(x, y):free() end
    end)
    local found = profile.kernels[1]
    assert.equal("swiglu", found.name)
    assert.equal(20, found.calls)
    assert.equal(20 * 3 * 4 * 90000, found.bytes)
    assert(found.seconds > 0 and found.seconds <= profile.seconds, found.seconds)
  end)

  it("loses the device to an error in a kernel, and names the operation where it waits for each", function()
    -- In a process of its own, whose tensor gets an address that is none.
    local program = ([[
      local qm = require("quartermoon")
      local ffi = require("ffi")
      local lib = require("quartermoon.ffi").lib
      local x = qm.zeros({ 4 }, { device = "cuda" })
      ffi.cast("char **", x.storage)[2] = ffi.cast("char *", 4096)
      io.stderr:write(select(2, pcall(function() x:fill(1) qm.device("cuda"):sync() end)), "\n")
      os.exit(0, false)
    ]]):gsub("\n%s*", " ")
    local run = "luajit -e " .. process.quote('package.path="./lua/?.lua;./lua/?/init.lua;"..package.path ' .. program)
    assert.matches("one of the operations since the last wait failed, the last of them 'fill'", (process.run(run)))
    assert.matches("cuda: fill: .*lost the device", (process.run("QM_CUDA_SYNC=1 " .. run)))
  end)
end)
