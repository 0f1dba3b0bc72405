local qm = require("quartermoon")
local progress = qm.progress

-- An output that keeps what was written, and a clock that we turn.
local function stage(options)
  local seen, now = {}, 0
  options.output = { write = function(_, ...) seen[#seen + 1] = table.concat({ ... }) end, flush = function() end }
  options.clock = function() return now end
  return progress.new(options), function() return table.concat(seen) end, function(seconds) now = now + seconds end
end

describe("qm.progress", function()
  it("prints a line every so many steps where there is no terminal", function()
    local line, seen, pass = stage({ steps = 100, tokens_per_step = 1000, every = 50, smoothing = 0, terminal = false })
    for step = 0, 100 do
      line:update(step, { loss = 100 / (step + 1), lr = 3e-4, text = step == 100 and "done" or nil })
      pass(0.5)
    end
    line:finish()
    assert.equal("step   0/100    0 %  loss 100.0000  lr 3.00e-04\n"
      .. "step  50/100   50 %  loss 1.9608  2.00k tokens/s  lr 3.00e-04  25 s left\n"
      .. "step 100/100  100 %  loss 0.9901  2.00k tokens/s  lr 3.00e-04  done\n", seen())
  end)

  it("rewrites the line on a terminal, covering what was longer", function()
    local line, seen, pass = stage({ steps = 3, terminal = true })
    line:update(1, { loss = 2, text = "something long" })
    pass(0.01)
    line:update(2, { loss = 2 }) -- too soon to be seen
    pass(1)
    line:update(3, { loss = 2 })
    line:note("saved")
    line:finish()
    local first, second = "step 1/3   33 %  loss 2.0000  something long", "step 3/3  100 %  loss 2.0000"
    assert.equal("\r" .. first .. "\r" .. second .. (" "):rep(#first - #second) .. "\r" .. (" "):rep(#second)
      .. "\rsaved\n", seen())
  end)

  it("smooths the loss without a bias at the start, and shows NaN as it comes", function()
    local line, seen = stage({ steps = 10, every = 1, smoothing = 0.5, terminal = false })
    line:update(1, { loss = 4 })
    assert.equal(4, line.loss)
    line:update(2, { loss = 1 })
    assert.near((0.5 * 4 + 1) / 1.5, line.loss, 1e-12)
    line:update(3, { loss = 0 / 0 })
    assert.truthy(seen():find("loss %-?nan"))
    assert.near(2, line.loss, 1e-12)
  end)

  it("writes numbers and spans as people read them", function()
    assert.equal("999", progress.short(999))
    assert.equal("1.23k", progress.short(1234))
    assert.equal("12.3M", progress.short(12.34e6))
    assert.equal("59 s", progress.duration(59.4))
    assert.equal("1:00 min", progress.duration(59.6))
    assert.equal("1:01:01 h", progress.duration(3661))
    assert.equal("3 d 2 h", progress.duration(3 * 86400 + 2 * 3600 + 5))
  end)

  it("keeps metrics and curves in the run's folder, over a resumption", function()
    local folder = os.tmpname()
    os.remove(folder)
    local path = folder .. "/metrics.jsonl"
    local function run(first, last)
      local line = stage({ steps = 4, terminal = false, out = folder })
      for step = first, last do
        line:update(step, { loss = 10 - step, lr = 1 })
        if step == 2 then line:evaluated(step, 5) end
      end
      local curves = line:curves()
      line:finish()
      return curves
    end
    run(1, 3)
    local expected = run(1, 4) -- anew: the first run's lines are gone
    assert.same({ { 1, 9 }, { 2, 8 }, { 3, 7 }, { 4, 6 } }, expected[1].points)
    assert.same({ { 2, 5 } }, expected[2].points)
    local text = qm.files.read(path)
    assert.equal('{"step":1,"loss":9,"lr":1}\n{"step":2,"loss":8,"lr":1}\n{"step":2,"held_out":5}\n'
      .. '{"step":3,"loss":7,"lr":1}\n{"step":4,"loss":6,"lr":1}\n', text)
    assert.same(expected, run(3, 4)) -- resumed behind step 2
    assert.equal(text, qm.files.read(path))
    os.execute("rm -r " .. folder)
  end)

  it("draws long runs with means, ending at the last step", function()
    local line = stage({ steps = 5001, terminal = false })
    for step = 1, 5001 do line:update(step, { loss = step }) end
    local points = line:curves()[1].points
    assert.equal(1667, #points)
    assert.same({ 3, 2 }, points[1])
    assert.same({ 5001, 5000 }, points[#points])
  end)
end)
