local qm = require("quartermoon")
local testing = require("spec.support.testing")

local reference = { device = "reference" }

---Positions r = 0 .. rows - 1 in a scrambled order, below `count`.
local function scrambled(rows, count)
  local values = {}
  for r = 1, rows do values[r] = (r * 7 + 3) % count end
  return qm.tensor(values, { dtype = "i32", device = "reference" })
end

describe("qm.rope_append", function()
  ---@param sizes table  R, H, HK, D, V
  local function operands(sizes, dtype)
    local rows, heads, kv_heads, size, room = unpack(sizes)
    local cos, sin = qm.rope_tables(size, 11, 10000, reference)
    local places = {}
    for r = 1, rows do places[r] = (r * 5 + 2) % room end
    local function draw(...) return qm.randn({ ... }, reference):to(dtype) end
    return { draw(rows, heads, size), draw(rows, kv_heads, size), draw(rows, kv_heads, size), cos, sin,
      scrambled(rows, 11), qm.tensor(places, { dtype = "i32", device = "reference" }), draw(room, kv_heads, size),
      draw(room, kv_heads, size) }
  end

  for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
    it("turns queries, and puts keys, turned, and values to their places, in " .. dtype, function()
      for _, sizes in ipairs({ { 1, 1, 1, 2, 1 }, { 3, 4, 2, 6, 7 }, { 1, 32, 8, 128, 64 }, { 17, 9, 3, 80, 18 },
        { 2, 300, 2, 16, 3 }, { 2, 2, 1, 2050, 4 }, { 0, 2, 1, 4, 3 } }) do
        for _, move in ipairs({ false, testing.shifted }) do
          local all = operands(sizes, dtype)
          local moved = {}
          for i, x in ipairs(all) do
            moved[i] = x:to(testing.device)
            if move then moved[i] = move(moved[i]) end
          end
          local q, k, v, cos, sin, positions, places, keys, values = unpack(all)
          local out = qm.rope_append(unpack(moved))
          local bound = dtype == "f32" and 1e-6 or 2 ^ -8
          testing.assert_close(qm.rope(q, cos, sin, positions), out, bound)
          local function placed(x, kept)
            local flat = { kept.shape[1], kept.shape[2] * kept.shape[3] }
            qm.scatter(x:reshape(x.shape[1], flat[2]), places, kept:view_as("spec", flat))
            return kept
          end
          testing.assert_close(placed(qm.rope(k, cos, sin, positions), keys), moved[8], bound)
          testing.assert_close(placed(v, values), moved[9], 0)
        end
      end
    end)
  end

  it("says what does not fit", function()
    local function append(change)
      local all = operands({ 2, 4, 2, 8, 3 }, "f32")
      for i = 1, #all do all[i] = all[i]:to(testing.device) end
      change(all)
      return function() qm.rope_append(unpack(all)) end
    end
    local function numbers(x) return qm.tensor(x, { dtype = "i32" }) end
    assert.error_matches(append(function(all) all[2] = qm.ones({ 2, 2, 6 }) end), "argument 'k'", 1, true)
    assert.error_matches(append(function(all) all[9] = qm.ones({ 4, 2, 8 }) end), "argument 'values'", 1, true)
    assert.error_matches(append(function(all) all[1] = all[1]:requires_gradient() end),
      "argument 'q': expected a tensor that needs no gradient", 1, true)
    testing.assert_refused_late(append(function(all) all[7] = numbers({ 0, 3 }) end),
      "argument 'places': expected places from 0 to 2, got 3 in row 1", "rope_append: index 3 is outside 0 .. 2")
    testing.assert_refused_late(append(function(all) all[6] = numbers({ 0, 11 }) end),
      "argument 'positions': expected positions from 0 to 10, got 11 in row 1",
      "rope_append: index 11 is outside 0 .. 10")
  end)
end)

describe("qm.rope", function()
  it("turns (x_i, x_{i+D/2}) by position * theta^(-2i/D)", function()
    local cos, sin = qm.rope_tables(4, 3, 100)
    local x = qm.tensor({ { { 1, 2, 3, 4 } }, { { 1, 2, 3, 4 } } })
    local out = qm.rope(x, cos, sin, qm.tensor({ 0, 2 }, { dtype = "i32" })):totable()
    assert.same({ 1, 2, 3, 4 }, out[1][1])
    local fast, slow = 2, 2 / 10 -- the angles at position 2: theta^(-2/4) = 1/10
    assert.near(1 * math.cos(fast) - 3 * math.sin(fast), out[2][1][1], 1e-6)
    assert.near(2 * math.cos(slow) - 4 * math.sin(slow), out[2][1][2], 1e-6)
    assert.near(3 * math.cos(fast) + 1 * math.sin(fast), out[2][1][3], 1e-6)
    assert.near(4 * math.cos(slow) + 2 * math.sin(slow), out[2][1][4], 1e-6)
  end)

  for _, dtype in ipairs({ "f32", "bf16", "f16" }) do
    it("equals the reference in " .. dtype .. ", on odd sizes", function()
      for _, shape in ipairs({ { 1, 1, 2 }, { 5, 3, 6 }, { 37, 4, 64 }, { 9, 2, 130 }, { 3, 1, 1030 }, { 0, 2, 4 },
        { 60, 32, 128 }, { 19, 9, 80 }, { 2, 300, 16 } }) do
        local cos, sin = qm.rope_tables(shape[3], 11, 10000, reference)
        local x = qm.randn(shape, reference):to(dtype)
        for _, move in ipairs({ false, testing.shifted }) do
          local expected, actual = testing.both({ x, cos, sin, scrambled(shape[1], 11) }, qm.rope, move)
          testing.assert_close(expected[1], actual[1], dtype == "f32" and 1e-6 or 2 ^ -8)
        end
      end
    end)
  end

  it("has the gradient that central differences show", function()
    local cos, sin = qm.rope_tables(6, 11, 10, reference)
    local positions = scrambled(5, 11)
    testing.check_gradients(function(x) return qm.rope(x, cos, sin, positions) end,
      { qm.randn({ 5, 3, 6 }, { device = "reference", requires_grad = true }) })
  end)

  it("gives a gradient on the device under test that turns back", function()
    local cos, sin = qm.rope_tables(6, 11, 10)
    local x = qm.randn({ 5, 3, 6 }):requires_gradient()
    local positions = scrambled(5, 11):to(testing.device)
    local out = qm.rope(x, cos, sin, positions):keep()
    out:backward(out)
    testing.assert_close(x, x.grad, 1e-6)
  end)

  it("stretches long wavelengths on request", function()
    -- theta = 100, D = 4: frequencies 1 and 1/10.
    local _, linear = qm.rope_tables(4, 2, 100, { scaling = { rope_type = "linear", factor = 8 } })
    assert.near(math.sin(1 / 8), linear:at(2, 1), 1e-6)
    assert.near(math.sin(1 / 80), linear:at(2, 2), 1e-6)
    -- 20 positions: the first pair turns 20 / (2 pi) = 3.18 times in them, the second 0.318 times.
    local function llama3(low, high)
      local _, sin = qm.rope_tables(4, 2, 100, { scaling = { rope_type = "llama3", factor = 8, low_freq_factor = low,
        high_freq_factor = high, original_max_position_embeddings = 20 } })
      return math.asin(sin:at(2, 1)), math.asin(sin:at(2, 2))
    end
    local fast, slow = llama3(1, 3)
    assert.near(1, fast, 1e-6)
    assert.near(1 / 80, slow, 1e-6)
    fast, slow = llama3(0, 4) -- both between: kept parts are turns / 4
    assert.near((1 - 20 / (8 * math.pi)) / 8 + 20 / (8 * math.pi), fast, 1e-6)
    assert.near((1 - 2 / (8 * math.pi)) / 80 + 2 / (8 * math.pi) / 10, slow, 1e-6)
    assert.error_matches(function() qm.rope_tables(4, 2, 100, { scaling = { rope_type = "yarn" } }) end,
      "argument 'scaling.rope_type': expected one of 'linear', 'llama3', got string 'yarn'", 1, true)
  end)

  it("says which argument is wrong, what it wanted and what it got", function()
    local cos, sin = qm.rope_tables(4, 3)
    local function rope(shape, positions, cosines)
      return function() qm.rope(qm.ones(shape), cosines or cos, sin, qm.tensor(positions, { dtype = "i32" })) end
    end
    assert.error_matches(rope({ 2, 1, 5 }, { 0, 1 }), "qm.rope: argument 'x': expected an even D, got D=5", 1, true)
    assert.error_matches(rope({ 2, 1, 6 }, { 0, 1 }),
      "argument 'cos': expected f32 [P, D/2=3], got f32 [3, 2]", 1, true)
    assert.error_matches(rope({ 2, 1, 4 }, { 0, 1 }, qm.ones({ 4, 2 })),
      "argument 'sin': expected f32 [P=4, D/2=2], got f32 [3, 2]", 1, true)
    assert.error_matches(rope({ 2, 1, 4 }, { 0 }), "argument 'positions': expected i32 [R=2], got i32 [1]", 1, true)
    for _, wrong in ipairs({ 3, -1 }) do
      testing.assert_refused_late(rope({ 2, 1, 4 }, { 0, wrong }),
        "argument 'positions': expected positions from 0 to 2, got " .. wrong .. " in row 1",
        "rope: index " .. wrong .. " is outside 0 .. 2")
    end
    assert.error_matches(function() qm.rope_tables(5, 3) end, "argument 'head_size': expected an even number", 1, true)
  end)
end)
