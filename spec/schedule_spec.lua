local qm = require("quartermoon")
local schedule = qm.schedule

---The values at `steps` are `expected`, within rounding.
local function is(lr, expected)
  for step, value in pairs(expected) do assert.near(value, lr(step), 1e-12, "step " .. step) end
end

describe("qm.schedule", function()
  it("constant", function() is(schedule.constant(0.5), { [1] = 0.5, [1000] = 0.5 }) end)

  it("linear starts at the first value and stays at the last", function()
    is(schedule.linear(1, 0, 4), { [1] = 1, [2] = 0.75, [4] = 0.25, [5] = 0, [9] = 0 })
  end)

  it("cosine falls along half a wave to a fraction of its peak", function()
    local quarter = 0.5 * (1 + math.sqrt(0.5)) -- of the way: (1 + cos 45 degrees) / 2
    is(schedule.cosine(2, 4), { [1] = 2, [2] = 2 * quarter, [3] = 1, [5] = 0, [99] = 0 })
    is(schedule.cosine(2, 4, 0.5), { [1] = 2, [3] = 1.5, [5] = 1 })
  end)

  it("one_cycle rises and falls", function()
    -- 10 steps, 4 of them up: half-way up in step 3, at the peak in step 5, half-way down in step 8.
    is(schedule.one_cycle(1, 10, { warmup = 0.4, start = 0.2, final = 0.1 }),
      { [1] = 0.2, [3] = 0.6, [5] = 1, [8] = 0.55, [11] = 0.1, [50] = 0.1 })
  end)

  it("wsd warms up, stays and decays", function()
    local shape = { warmup = 2, decay = 4, shape = "linear" }
    is(schedule.wsd(8, 10, shape), { [1] = 4, [2] = 8, [3] = 8, [6] = 8, [7] = 8, [8] = 6, [10] = 2, [11] = 0 })
    is(schedule.wsd(8, 10, { warmup = 0.2, decay = 0.4, final = 0.5 }), { [1] = 4, [6] = 8, [8] = 6, [11] = 4 })
    is(schedule.wsd(8, 10, { warmup = 0, decay = 0 }), { [1] = 8, [10] = 8 })
  end)

  it("warmup comes before", function()
    is(schedule.warmup(4, schedule.linear(8, 0, 8)), { [1] = 2, [3] = 6, [4] = 8, [5] = 8, [6] = 7, [13] = 0 })
    is(schedule.warmup(0, 3), { [1] = 3 })
  end)

  it("sequence starts each schedule at its own step 1; the last goes on", function()
    local lr = schedule.sequence({ { 2, 5 }, { 0, 7 }, { 3, function(step) return step end }, { nil, 9 } })
    is(lr, { [1] = 5, [2] = 5, [3] = 1, [5] = 3, [6] = 9, [600] = 9 })
  end)

  it("product multiplies", function()
    is(schedule.product(schedule.warmup(4, 1), schedule.linear(8, 0, 8)), { [1] = 2, [4] = 5, [9] = 0 })
  end)

  it("takes numbers, functions and callable tables", function()
    assert.equal(3, schedule.resolve("f", 3)(1))
    assert.equal(4, schedule.resolve("f", function(step) return 2 * step end)(2))
    assert.equal(5, schedule.resolve("f", setmetatable({}, { __call = function(_, step) return step + 4 end }))(1))
    assert.error_matches(function() schedule.resolve("f", "fast") end,
      "f: argument 'lr': expected a number or a function of the step, got string 'fast'", 1, true)
    assert.error_matches(function() schedule.resolve("f", function() return 0 / 0 end)(7) end,
      "the schedule gave number nan at step 7", 1, true)
  end)

  it("refuses what makes no sense", function()
    assert.error_matches(function() schedule.cosine(1, 0) end, "'steps': expected an integer of at least 1", 1, true)
    assert.error_matches(function() schedule.one_cycle(1, 9, { finale = 1 }) end, "did you mean 'final'", 1, true)
    assert.error_matches(function() schedule.wsd(1, 10, { warmup = 8, decay = 4 }) end,
      "'decay': expected at most the 2 steps", 1, true)
  end)
end)
