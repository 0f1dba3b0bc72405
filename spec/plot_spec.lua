local qm = require("quartermoon")
local process = require("spec.support.process")

local function big_endian(text, at)
  local a, b, c, d = text:byte(at, at + 3)
  return ((a * 256 + b) * 256 + c) * 256 + d
end

describe("qm.plot", function()
  local folder, remove_folder
  before_each(function()
    folder, remove_folder = process.folder()
  end)
  after_each(function() remove_folder() end)

  local function files() return (process.run("ls -A " .. folder)) end

  local function missing(reason) return reason and reason:find("not installed", 1, true) end

  it("draws a PNG of the size asked for", function()
    local path, reason = qm.plot.curves(folder .. "/a.png", { { y = { 3, 2, 1.5 } } }, { width = 640, height = 400 })
    if missing(reason) then return pending(reason) end
    assert.equal(folder .. "/a.png", path, reason)
    local text = qm.files.read(path)
    assert.equal("\137PNG\r\n\26\n", text:sub(1, 8))
    assert.equal(640, big_endian(text, 17))
    assert.equal(400, big_endian(text, 21))
    assert.equal("a.png\n", files())
  end)

  it("writes title, axes, legend and ticks, whatever characters they hold", function()
    local path, reason = qm.plot.curves(folder .. "/a.svg", {
      { name = "held_out 'x' `id`", x = { 1, 10, 100, 20000 }, y = { 4, 3, 0 / 0, 2 }, style = "both", dashed = true },
      { name = "other", x = qm.tensor({ 0, 1, 2 }), y = qm.tensor({ 5, 4, 3 }), smooth = 3 },
    }, { title = "a_b \"c\"\nset output", x = "step", y = "loss", log = "x" })
    if missing(reason) then return pending(reason) end
    local text = qm.files.read(assert(path, reason))
    for _, word in ipairs({ "held_out 'x' `id`", "other", "a_b \"c\" set output", ">step<", ">loss<", "10k" }) do
      local plain = text:gsub("&#39;", "'"):gsub("&quot;", "\""):gsub("&amp;", "&")
      assert.truthy(plain:find(word, 1, true), word)
    end
  end)

  it("draws what is empty, constant or of wide range", function()
    for i, series in ipairs({ { { y = {} } }, { { y = { 2, 2 } } }, { { y = { 1e-12, 1e12 } } }, { { y = { 0 / 0 } } },
      { { y = { -1, 0, 5 }, style = "steps" } }, { { x = { 5 }, y = { 0 }, style = "points" } } }) do
      for _, log in ipairs({ "", "xy" }) do
        local path, reason = qm.plot.curves(("%s/%d.png"):format(folder, i), series, { log = log })
        if missing(reason) then return pending(reason) end
        assert.truthy(path, reason)
      end
    end
  end)

  it("gives nil and the reason when it cannot write", function()
    local path, reason = qm.plot.curves(folder .. "/no/a.png", { { y = { 1, 2 } } })
    assert.is_nil(path)
    if missing(reason) then return pending(reason) end
    assert.truthy(reason:find(folder .. "/no/a.png.partial", 1, true), reason)
    assert.equal("", files())
  end)

  it("gives nil and the reason when there is no gnuplot", function()
    qm.files.write(folder .. "/x.lua",
      ("print(require('quartermoon').plot.curves('%s/a.png', { { y = { 1 } } }))"):format(folder))
    local where = io.popen("command -v luajit"):read("*l")
    os.execute(("ln -s /bin/sh %s/sh; ln -s /bin/rm %s/rm"):format(folder, folder))
    local pipe = io.popen(("PATH=%s LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' %s %s/x.lua 2>&1"):format(folder, where,
      folder))
    assert.equal("nil\tgnuplot is not installed (Debian: apt install gnuplot-nox)\n", pipe:read("*a"))
    pipe:close()
  end)

  it("draws runs from their metrics", function()
    for _, run in ipairs({ "a", "b" }) do
      local metrics = qm.metrics.open(("%s/%s.jsonl"):format(folder, run))
      for step = 1, 5 do metrics:write({ step = step, loss = step > 4 and 0 / 0 or 3 / step, lr = 1 }) end
      metrics:close()
    end
    local runs = { ["run a"] = folder .. "/a.jsonl", ["run b"] = folder .. "/b.jsonl" }
    local path, reason = qm.plot.metrics(folder .. "/a.svg", runs, { title = "two runs", smooth = 3 })
    if missing(reason) then return pending(reason) end
    local text = qm.files.read(assert(path, reason))
    for _, word in ipairs({ "run a", "run b", "two runs", ">step<", ">loss<" }) do
      assert.truthy(text:find(word, 1, true), word)
    end
    assert.error_matches(function() qm.plot.metrics(folder .. "/a.svg", { x = folder .. "/none" }) end,
      folder .. "/none: No such file", 1, true)
  end)

  it("refuses what cannot be drawn", function()
    local function draw(series, options, path)
      return function() qm.plot.curves(path or "x.png", series, options) end
    end
    local one = { { y = { 1, 2 } } }
    assert.error_matches(draw(one, nil, "x.jpg"), "a name ending in .png or .svg, got string 'x.jpg'", 1, true)
    assert.error_matches(draw({}), "at least one series", 1, true)
    assert.error_matches(draw({ { x = { 1 }, y = { 1, 2 } } }), "argument 'series[1].x': expected 2 numbers", 1, true)
    assert.error_matches(draw({ { points = { 1 } } }), "argument 'series[1].points[1]': expected a table", 1, true)
    assert.error_matches(draw({ { name = "x" } }), "argument 'series[1].y': expected a table", 1, true)
    assert.error_matches(draw({ { y = { "a" } } }), "argument 'series[1].y': expected a number", 1, true)
    assert.error_matches(draw({ { y = { 1 }, colour = "red" } }), "unknown option 'colour'", 1, true)
    assert.error_matches(draw(one, { log = "z" }), "argument 'log'", 1, true)
    assert.error_matches(draw(one, { y_range = { 2, 1 } }), "argument 'y_range': expected { low, high }", 1, true)
    assert.error_matches(draw(one, { y_range = { 0, 1 }, log = "y" }), "above 0", 1, true)
    assert.error_matches(draw({ { y = qm.ones({ 2, 2 }) } }), "a tensor of one dimension", 1, true)
  end)
end)
