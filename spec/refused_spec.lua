-- A refused call leaves nothing behind: no tensor made on the way, no half-written gradient.
local qm = require("quartermoon")
local testing = require("spec.support.testing")

local i32 = { dtype = "i32" }
local matrix, row, column = qm.ones({ 2, 3 }), qm.ones({ 3 }), qm.ones({ 3, 1 })
local narrow = matrix:to("bf16")
local words, outside = qm.zeros({ 2 }, i32), qm.tensor({ 0, 7 }, i32)
local heads, positions = qm.ones({ 4, 2, 2 }), qm.tensor({ 0, 1, 2, 3 }, i32)
local q = qm.QParam.quantize(qm.ones({ 32, 32 }))

local head = qm.ones({ 3, 4 }, { requires_grad = true })
qm.no_grad(qm.linear, narrow, head):free() -- its copy in x's type is made now, and stays with it

-- What passes the checks in Lua and is refused by the engine: a function and its arguments.
local REFUSED = {
  ["an operation of one operand"] = { qm.exp, words },
  ["an operation of two operands"] = { qm.add, words, words },
  ["an operation with a number"] = { qm.maximum, words, 1 },
  ["a sum"] = { qm.sum, words },
  ["a maximum of nothing"] = { qm.max, qm.ones({ 0, 2 }), 1 },
  ["a softmax"] = { qm.softmax, words },
  ["a sum of squares"] = { qm.sum_squares, words },
  ["a sum of a list's squares"] = { qm.sum_squares, { qm.ones({ 3 }), words } },
  ["an embedding of an unknown token"] = { qm.embedding, matrix, outside },
  ["a permutation"] = { qm.permute, matrix, 1, 1 },
  ["a matrix product"] = { qm.matmul, matrix, matrix },
  ["a linear layer"] = { qm.linear, narrow, matrix },
  ["a linear layer, for its bias"] = { qm.linear, narrow, column, qm.zeros({ 1 }, i32) },
  ["a quantized layer, for its bias"] = { qm.qlinear, qm.ones({ 2, 32 }), q, qm.zeros({ 32 }, i32) },
  ["a decomposition"] = { qm.svd, words },
  ["an orthonormal basis"] = { qm.qr, matrix },
  ["a gated product"] = { qm.swiglu, matrix, row },
  ["a normalisation"] = { qm.rms_norm, matrix, matrix },
  ["a normalised sum"] = { qm.add_rms_norm, matrix, row, row },
  ["a rotation beyond its tables"] = { qm.rope, heads, qm.ones({ 2, 1 }), qm.ones({ 2, 1 }), positions },
  ["attention"] = { qm.attention, heads, heads, heads, words, words },
  ["a loss of an unknown class"] = { qm.cross_entropy, matrix, outside },
  ["a fused loss of an unknown class"] = { qm.linear_cross_entropy, narrow,
    head, outside },
  ["Adam's direction"] = { qm.adam_direction, matrix, row, row, { step = 1, lr = 1 } },
  ["random integers"] = { qm.rand, { 2 }, i32 },
  ["a leaf of integers"] = { qm.zeros, { 2 }, { dtype = "i32", requires_grad = true } },
  ["ragged rows"] = { qm.tensor, { { 1, 2 }, { 3 } } },
  ["a quantization with no range"] = { qm.QParam.quantize, qm.ones({ 32, 32 }), { range = 0 } },
}

local device = qm.default_device()

---How many more tensors live after `body`, the collector stopped.
local function left_by(body, ...)
  collectgarbage()
  collectgarbage("stop")
  local before = device:memory().live_count
  body(...)
  local left = device:memory().live_count - before
  collectgarbage("restart")
  return left
end

-- What only the values say. A device that works on its own finds out when the call has returned.
local LATE = {}
for _, what in ipairs({ "an embedding of an unknown token", "a rotation beyond its tables", "attention",
  "a loss of an unknown class", "a fused loss of an unknown class" }) do
  LATE[what] = testing.device ~= "cpu" and testing.device ~= "reference"
end

describe("a refused call", function()
  for what, call in pairs(REFUSED) do
    it("leaves no tensor behind: " .. what, function()
      if LATE[what] then return testing.assert_refused_late(function() call[1](unpack(call, 2)) end, "", "") end
      assert.equal(0, left_by(function() assert.is_false((pcall(unpack(call)))) end))
    end)
  end
end)

describe("a failed backward()", function()
  -- The last node to run finds a freed tensor, when gradients are under way.
  local function failing()
    local w = qm.ones({ 2, 2 }, { requires_grad = true })
    local gone = qm.ones({ 2, 2 })
    local loss = (qm.matmul(gone, w) * 3):exp():sum()
    gone:free()
    return loss, w
  end

  it("releases the gradients that were under way, and leaves none half written", function()
    local loss, w = failing()
    assert.is_true(left_by(function() assert.is_false((pcall(loss.backward, loss))) end) <= 0)
    assert.is_nil(w.grad)
  end)

  it("leaves recording on", function()
    pcall(function() failing():backward() end)
    local x = qm.ones({ 2 }, { requires_grad = true })
    x:sum():backward()
    assert.same({ 1, 1 }, x.grad:totable())
  end)

  it("refuses a gradient of another shape than the tensor's", function()
    local x = qm.ones({ 2, 3 }, { requires_grad = true })
    assert.error_matches(function() (x * 2):backward(qm.ones({ 4, 2, 3 })) end,
      "backward: argument 'grad': expected a gradient of shape [2, 3], got qm.Tensor f32 [4, 2, 3]", 1, true)
  end)
end)
