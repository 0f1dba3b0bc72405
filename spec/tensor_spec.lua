local qm = require("quartermoon")
local host_buffer = require("quartermoon.host_buffer")

local device = assert(qm.device(os.getenv("QM_DEVICE") or "cpu"))
local function live() return device:memory().live_bytes end
---What a limit counts once the cache is empty.
local function used() return live() + device:memory().workspace_bytes end

describe("qm.device", function()
  it("gives one object for one device, however it is spelt", function()
    assert.equal(qm.device("cpu"), qm.device("cpu:0"))
    local both = qm.concat({ qm.zeros({ 1 }, { device = "reference" }), qm.zeros({ 2 }, { device = "reference:0" }) })
    assert.same({ 3 }, both.shape)
  end)
end)

describe("making tensors", function()
  it("from tables, numbers and ranges", function()
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, qm.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }):totable())
    assert.equal(2.5, qm.tensor(2.5):item())
    assert.same({}, qm.tensor(2.5).shape)
    assert.same({ 0 }, qm.tensor({}).shape)
    assert.same({ 1, 2, 3, 4 }, qm.arange(1, 4):totable())
    assert.same({ 5, 3 }, qm.arange(5, 2, { dtype = "i64" }, -2):totable())
    assert.same({ { 0, 0 } }, qm.zeros({ 1, 2 }):totable())
    assert.same({ 1, 1 }, qm.ones(2):totable())
    assert.same({ 7 }, qm.full({ 1 }, 7, { dtype = "u8" }):totable())
    assert.same({ 81, 77 }, qm.from_string("QM"):totable())
  end)

  it("of every type, values and bytes", function()
    for dtype, size in pairs({ f32 = 4, f16 = 2, bf16 = 2, i8 = 1, u8 = 1, i16 = 2, i32 = 4, i64 = 8 }) do
      local x = qm.tensor({ 0, 1, 100 }, { dtype = dtype })
      assert.equal(dtype, x.dtype)
      assert.same({ 0, 1, 100 }, x:totable())
      assert.equal(3 * size, x:size_bytes())
      assert.equal(3 * size, #x:bytes())
    end
  end)

  it("refuses ragged tables, wrong types and unknown options", function()
    assert.error_matches(function() qm.tensor({ { 1, 2 }, { 3 } }) end,
      "qm.tensor: argument 'data': expected rows of one length, got number 1", 1, true)
    assert.error_matches(function() qm.tensor({ 1, "x" }) end, "expected numbers, got string 'x'", 1, true)
    assert.error_matches(function() qm.zeros({ 2 }, { dtype = "f64" }) end, "got string 'f64'", 1, true)
    assert.error_matches(function() qm.zeros({ 2 }, { dtpye = "f32" }) end,
      "qm.zeros: unknown option 'dtpye', did you mean 'dtype'?", 1, true)
    assert.error_matches(function() qm.zeros({ 2, -1 }) end,
      "qm.zeros: argument 'shape': expected an integer", 1, true)
    assert.error_matches(function() qm.zeros({ 1, 1, 1, 1, 1 }) end, "expected at most 4 dimensions", 1, true)
    assert.error_matches(function() qm.zeros({ 2 ^ 30, 2 ^ 30 }) end, "expected at most 2^50 elements", 1, true)
  end)
end)

describe("reading back", function()
  local x = qm.tensor({ { 1, 2, 3 }, { 4, 5, 6 } })

  it("gives one element, all of them, or the only one", function()
    assert.equal(6, x:at(2, 3))
    assert.equal(2.5, qm.tensor(2.5):at())
    assert.equal(6, x:count())
    assert.equal(2, x:dims())
    assert.error_matches(function() x:at(1) end, "at: argument 'indices': expected 2 indices, got number 1", 1, true)
    assert.error_matches(function() x:at(1, 4) end,
      "at: argument 'index 2': expected an integer from 1 to 3, got number 4", 1, true)
    assert.error_matches(function() x:item() end, "item: argument 'self': expected a tensor of one element", 1, true)
  end)

  -- The bits that LuaJIT has for nil, false and true are negative NaNs of an f32 or bf16.
  it("gives a number for any bits, NaNs with a payload too", function()
    local function is_nan(value) assert.is_true(type(value) == "number" and value ~= value) end
    for _, case in ipairs({ { "i32", "f32", 65536 }, { "i16", "bf16", 1 } }) do
      local bits = { -4 * case[3], -8 * case[3], -12 * case[3], -64 * case[3], -128 * case[3], 0 }
      qm.scope(function()
        local y = qm.tensor(bits, { dtype = case[1] }):reinterpret(case[2], #bits)
        local values = y:totable()
        for i = 1, 4 do
          is_nan(values[i])
          is_nan(y:at(i))
          is_nan(y:view_rows("spec", i, 1):item())
        end
        assert.same({ -math.huge, 0 }, { values[5], values[6] })
        assert.matches("\n +%-?nan +%-?nan +%-?nan +%-?nan +%-inf +0$", tostring(y))
        if case[2] == "bf16" then return end -- read_elements gives the elements as they are
        local buffer = host_buffer.new("f32", 4)
        y:read_elements(1, 4, buffer)
        for i = 0, 3 do is_nan(buffer[i]) end
      end)
    end
  end)

  it("prints a header and the first rows", function()
    assert.equal("qm.Tensor f32 [2, 3]", tostring(x):match("^[^\n]*"):match("^qm.Tensor f32 %[2, 3%]"))
    assert.matches("\n +1 +2 +3\n +4 +5 +6$", tostring(x))
    assert.matches("^qm.Tensor f32 %[%].*: 2.5$", tostring(qm.tensor(2.5)))
    local long = tostring(qm.zeros({ 20, 30 }))
    assert.matches("%.%.%. %(20 rows%)$", long)
    assert.equal(10, select(2, long:gsub("\n", "\n")) + 1) -- header, eight rows, how many there are
    assert.matches("f32 %[0, 3%]", tostring(qm.zeros({ 0, 3 })))
  end)

  it("prints what was freed without touching it", function()
    local y = qm.ones(2)
    y:free()
    assert.matches("^qm.Tensor f32 %[2%], freed", tostring(y))
  end)
end)

describe("copies and views", function()
  it("a copy is its own, a share is the same memory", function()
    local x = qm.tensor({ 1, 2 })
    local copy, share = x:clone(), x:share()
    x:fill(9)
    assert.same({ 1, 2 }, copy:totable())
    assert.same({ 9, 9 }, share:totable())
    assert.equal(2, x:references())
    x:free()
    assert.same({ 9, 9 }, share:totable())
  end)

  it("convert and move", function()
    local x = qm.tensor({ 1.5, -2 })
    assert.equal("bf16", x:to("bf16").dtype)
    assert.same({ 1.5, -2 }, x:to("bf16"):totable())
    assert.equal("reference", x:to("reference").device.name)
    assert.same({ 1.5, -2 }, x:to("reference"):to(device):totable())
    assert.same({ 1, -2 }, qm.zeros(2, { dtype = "i32" }):copy(x):totable())
  end)

  it("refuse another shape, and operands on two devices", function()
    assert.error_matches(function() qm.ones(2):copy(qm.ones(3)) end,
      "copy: argument 'out': expected f32 [3], got f32 [2]", 1, true)
    local elsewhere = device.name == "reference" and "cpu" or "reference"
    assert.error_matches(function() return qm.ones(2) + qm.ones(2, { device = elsewhere }) end,
      "argument 'b': expected a tensor on " .. device.name .. ", got one on " .. elsewhere, 1, true)
  end)
end)

describe("memory", function()
  before_each(function() -- what earlier specs dropped must not come back in the middle of one
    collectgarbage()
    collectgarbage()
  end)

  it("comes back with :free(), views and twice included", function()
    local before, handles = live(), qm.handles_live()
    local x = qm.zeros({ 1000, 10 })
    local view = x:reshape(10, 1000)
    assert.is_true(live() >= before + 40000)
    x:free()
    x:free()
    assert.is_true(live() >= before + 40000) -- the view still needs it
    view:free()
    assert.equal(before, live())
    assert.equal(handles, qm.handles_live())
  end)

  it("comes back at the end of a scope, but for what it returns and what was kept", function()
    local before = live()
    local kept
    local returned, in_table = qm.scope(function()
      local x = qm.ones(100)
      kept = (x * 2):keep()
      return x + 1, { deep = { x + 2 } }
    end)
    assert.equal(2, returned:at(1))
    assert.equal(3, in_table.deep[1]:at(1))
    assert.equal(2, kept:at(1))
    returned:free()
    in_table.deep[1]:free()
    kept:free()
    assert.equal(before, live())
  end)

  it("comes back when a scope ends in an error, and the error is passed on", function()
    local before = live()
    assert.error_matches(function()
      qm.scope(function()
        local x = qm.ones(100)
        qm.scope(function() return x * 2 + qm.ones(3) end)
      end)
    end, "expected what broadcasts with [100]", 1, true)
    -- `x * 2 + ...` fails after its left side was made; the inner scope had it.
    assert.equal(before, live())
  end)

  it("of inner scopes belongs to the outer one once returned", function()
    local before = live()
    qm.scope(function()
      local inner = qm.scope(function() return qm.ones(50) * 3 end)
      assert.equal(3, inner:at(50))
    end)
    assert.equal(before, live())
  end)

  it("that ran out is an error that says so, and the program goes on", function()
    collectgarbage()
    collectgarbage()
    device:empty_cache()
    device:set_limit(used() + 2 ^ 20)
    local ok, message = pcall(qm.zeros, { 2 ^ 20 })
    local small = pcall(qm.zeros, { 1000 })
    device:set_limit(0)
    assert.is_false(ok)
    assert.matches("4194304", message, 1, true)
    assert.is_true(small)
    assert.equal(2 ^ 20, qm.ones({ 2 ^ 20 }):sum():item())
  end)

  it("that ran out makes the collector look for dropped tensors first", function()
    collectgarbage()
    collectgarbage()
    device:empty_cache()
    device:set_limit(used() + 3 * 2 ^ 20)
    for _ = 1, 8 do qm.ones({ 2 ^ 18 }) end -- eight dropped tensors of 1 MiB where three fit
    device:set_limit(0)
  end)

  it("is counted: handles, live and peak bytes", function()
    local handles = qm.handles_live()
    local x = qm.ones({ 2 ^ 16 })
    assert.equal(handles + 1, qm.handles_live())
    device:reset_peak()
    local before = device:memory().peak_bytes
    local y = qm.ones({ 2 ^ 16 })
    assert.is_true(device:memory().peak_bytes >= before + 2 ^ 18)
    y:free()
    assert.is_true(device:memory().peak_bytes >= before + 2 ^ 18)
    x:free()
    assert.equal(handles, qm.handles_live())
  end)

  it("that was freed cannot be used: the error says what happened", function()
    local x = qm.ones(3)
    x:free()
    for _, use in ipairs({ function() x:totable() end, function() x:reshape(3) end, function() x:fill(1) end,
      function() x:share() end, function() x:at(1) end }) do
      assert.error_matches(use, "this tensor was freed", 1, true)
    end
    assert.error_matches(function() return x + 1 end, "freed", 1, true)
  end)
end)

describe("devices", function()
  it("that are not there are nil and a reason", function()
    local none, why = qm.device("abacus")
    assert.is_nil(none)
    assert.matches("abacus", why)
    assert.error_matches(function() qm.zeros({ 1 }, { device = "abacus" }) end, "abacus", 1, true)
  end)

  it("say what they are", function()
    assert.equal("reference", qm.device("reference"):info().name)
    assert.is_true(#device:info().description > 0)
  end)

  describe("read_later", function()
    it("reads what was there when it was asked, and later calls do not change that", function()
      for _, count in ipairs({ 1, 1000, 100000 }) do
        for _, dtype in ipairs({ "f32", "bf16", "i32", "u8" }) do
          local x = qm.full({ count }, 3, { dtype = dtype })
          local later = x:read_later()
          x:fill(4)
          x:free()
          local y = qm.full({ count }, 5, { dtype = dtype }) -- perhaps in the same memory
          local value = later:get()
          assert.is_true(later:ready())
          assert.equal(3, value[1])
          assert.equal(3, value[count])
          assert.equal(value, later:get())
          y:free()
        end
      end
      assert.equal(7, qm.full({}, 7):read_later():get())
      assert.equal(0, #qm.zeros({ 0, 3 }):read_later():get())
    end)

    it("can be dropped, and a freed tensor is refused", function()
      local handles = qm.handles_live()
      local x = qm.zeros({ 5 })
      x:read_later():free()
      x:free()
      assert.equal(handles, qm.handles_live())
      assert.error_matches(function() x:read_later() end, "freed")
    end)
  end)
end)
