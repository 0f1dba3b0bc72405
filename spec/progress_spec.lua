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
      line:update({ step = step, loss = 100 / (step + 1), lr = 3e-4, text = step == 100 and "done" or nil })
      pass(0.5)
    end
    line:finish()
    assert.equal("step   0/100    0 %  loss 100.0000  lr 3.00e-04\n"
      .. "step  50/100   50 %  loss 1.9608  2.00k tokens/s  lr 3.00e-04  25 s left\n"
      .. "step 100/100  100 %  loss 0.9901  2.00k tokens/s  lr 3.00e-04  done\n", seen())
  end)

  it("rewrites the line on a terminal, covering what was longer", function()
    local line, seen, pass = stage({ steps = 3, terminal = true })
    line:update({ step = 1, loss = 2, text = "something long" })
    pass(0.01)
    line:update({ step = 2, loss = 2 }) -- too soon to be seen
    pass(1)
    line:update({ step = 3, loss = 2 })
    line:note("saved")
    line:finish()
    local first, second = "step 1/3   33 %  loss 2.0000  something long", "step 3/3  100 %  loss 2.0000"
    assert.equal("\r" .. first .. "\r" .. second .. (" "):rep(#first - #second) .. "\r" .. (" "):rep(#second)
      .. "\rsaved\n", seen())
  end)

  it("smooths the loss without a bias at the start, and shows NaN as it comes", function()
    local line, seen = stage({ steps = 10, every = 1, smoothing = 0.5, terminal = false })
    line:update({ step = 1, loss = 4 })
    assert.equal(4, line.loss)
    line:update({ step = 2, loss = 1 })
    assert.near((0.5 * 4 + 1) / 1.5, line.loss, 1e-12)
    line:update({ step = 3, loss = 0 / 0 })
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

  describe("metrics", function()
    local path
    before_each(function() path = os.tmpname() end)
    after_each(function() os.remove(path) end)

    it("writes one line of JSON a record, at once", function()
      local metrics = progress.metrics(path)
      metrics:write({ loss = 1.5, step = 1, note = "a\"b" })
      assert.equal('{"step":1,"loss":1.5,"note":"a\\"b"}\n', qm.files.read(path))
      metrics:write({ step = 2, loss = 0 / 0, lr = math.huge })
      assert.equal('{"step":2,"loss":null,"lr":null}\n', qm.files.read(path):match("\n(.*)$"))
      metrics:close()
      local records = progress.read_metrics(path)
      assert.equal(2, #records)
      assert.equal(1.5, records[1].loss)
    end)

    it("goes on behind what is there, or behind a step", function()
      qm.files.write(path, '{"step":1,"loss":3.00}\n{"note":"x"}\n{"step":2}\n{"step":3}\n{"step":4,"lo')
      progress.metrics(path, { after = 2 }):write({ step = 3, again = true })
      assert.equal('{"step":1,"loss":3.00}\n{"note":"x"}\n{"step":2}\n{"step":3,"again":true}\n', qm.files.read(path))
      progress.metrics(path):write({ step = 4 })
      assert.equal(5, #progress.read_metrics(path))
    end)

    it("names the file that is full, missing or damaged", function()
      local full = progress.metrics("/dev/full")
      assert.error_matches(function() full:write({ step = 1 }) end, "/dev/full: No space left on device", 1, true)
      assert.error_matches(function() progress.metrics("/no/such") end, "/no/such: No such file", 1, true)
      local records, reason = progress.read_metrics("/no/such")
      assert.is_nil(records)
      assert.truthy(reason:find("/no/such: No such file", 1, true))
      qm.files.write(path, '{"step":1}\nnonsense\n')
      records, reason = progress.read_metrics(path)
      assert.is_nil(records)
      assert.equal(path .. ": line 2 is no JSON object", reason)
      assert.error_matches(function() progress.metrics(path) end, "line 2 is no JSON object", 1, true)
    end)
  end)
end)
