-- A mistake is an error on the user's own line that names the function, the argument, what was
-- expected and what came.
local qm = require("quartermoon")

local here = debug.getinfo(1, "S").short_src

---Call `mistake`; the message, which must begin with the line that `mistake` stands on.
local function message_of(mistake)
  local line = debug.getinfo(mistake, "S").linedefined
  local ok, message = pcall(mistake)
  assert(not ok, "no error was raised")
  assert(type(message) == "string", "the error is a " .. type(message))
  local start = ("%s:%d: "):format(here, line)
  assert(message:sub(1, #start) == start, ("expected an error at %s, got: %s"):format(start, message))
  return message:sub(#start + 1)
end

-- One line each: the mistake, and what it says. (Not as a tail call, which would leave no frame.)
local x = qm.ones({ 2, 3 })
local MISTAKES = {
  { function() local _ = qm.swiglu(x, qm.ones({ 3, 2 })) end,
    "qm.swiglu: argument 'up': expected f32 [2, 3], got f32 [3, 2]" },
  { function() local _ = qm.swiglu(x) end, "qm.swiglu: argument 'up': expected a tensor, got nothing" },
  { function() local _ = qm.swiglu("x", x) end, "qm.swiglu: argument 'gate': expected a tensor, got string 'x'" },
  { function() local _ = qm.zeros({ 2, -1 }) end,
    "qm.zeros: argument 'shape': expected an integer from 0 to 1125899906842624, got number -1" },
  { function() local _ = qm.zeros({ 2 }, { dtyp = "f16" }) end,
    "qm.zeros: unknown option 'dtyp', did you mean 'dtype'? (known: device, dtype, requires_grad)" },
  { function() local _ = qm.zeros({ 2 }, { dtype = "f64" }) end,
    "qm.zeros: argument 'dtype': expected one of 'f32', 'f16', 'bf16', 'i8', 'u8', 'i16', 'i32', 'i64', got str" },
  { function() local _ = qm.tensor({ { 1, 2 }, { 3 } }) end,
    "qm.tensor: argument 'data': expected rows of one length, got number 1" },
  { function() local _ = qm.arange(0, 1 / 0) end, "qm.arange: argument 'stop': expected a number from " },
  { function() local _ = qm.arange(0, 1, {}, 0) end,
    "qm.arange: argument 'step': expected a step other than 0, got number 0" },
  { function() local _ = x:at(1) end, "at: argument 'indices': expected 2 indices, got number 1" },
  { function() local _ = x:at(1, 4) end, "at: argument 'index 2': expected an integer from 1 to 3, got number 4" },
  { function() local _ = x:item() end,
    "item: argument 'self': expected a tensor of one element, got qm.Tensor f32 [2, 3]" },
  { function() x:read_elements(1, 1) end,
    "read_elements: argument 'self': expected a tensor of one dimension, got qm.Tensor f32 [2, 3]" },
  { function() qm.QParam.quantize(qm.ones({ 32, 32 })):add_residual(8, x) end,
    "add_residual: argument 'generator': expected a qm.generator, got qm.Tensor f32 [2, 3]" },
  { function() x:backward() end, "backward: this tensor depends on nothing that requires a gradient" },
  { function() x:copy(qm.ones({ 3 })) end, "copy: argument 'out': expected f32 [3], got f32 [2, 3]" },
  { function() x:fill("one") end, "fill: argument 'value': expected a number, got string 'one'" },
  { function() local _ = qm.matmul(x, x) end, "qm.matmul: argument 'b': expected " },
  { function() qm.set_default_device("tpu") end, "qm.set_default_device: no backend 'tpu': " },
  { function() qm.seed(-1) end, "qm.seed: argument 'seed': expected an integer from 0 to 4294967295, got number -1" },
  { function() local _ = qm.checkpoint(qm.ones, 2, 3) end, "qm.ones: " },
  { function() local _ = qm.checkpoint(function() return 1 end, x) end,
    "qm.checkpoint: argument 'body': expected a function that returns tensors, got number 1" },
  { function() local _ = qm.map_file("/no/such/file") end, "qm.map_file: /no/such/file: No such file or directory" },
}

describe("a mistake", function()
  for _, case in ipairs(MISTAKES) do
    it("says: " .. case[2]:sub(1, 70), function()
      local message = message_of(case[1])
      assert(message:sub(1, #case[2]) == case[2], ("expected: %s\ngot: %s"):format(case[2], message))
    end)
  end

  it("with a freed tensor names the freeing", function()
    local y = qm.ones({ 2 })
    y:free()
    assert.truthy(message_of(function() y:totable() end):find("this tensor was freed", 1, true))
    assert.truthy(message_of(function() local _ = qm.swiglu(y, y) end):find("freed", 1, true))
  end)

  it("of a device that is not there returns nil and a reason instead", function()
    local device, reason = qm.device("tpu")
    assert.is_nil(device)
    assert.truthy(reason:find("no backend 'tpu'", 1, true))
  end)

  it("in a module named for the first time leaves the other modules alone", function()
    assert.is_nil(qm.no_such_module)
    assert.is_table(qm.nn)
  end)
end)
