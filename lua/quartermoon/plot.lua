---Pictures of curves, PNG or SVG, drawn by gnuplot.
---
---    qm.plot.curves("loss.png", {
---      { name = "training", x = steps, y = losses },
---      { name = "held out", x = eval_steps, y = eval_losses, style = "both" },
---    }, { title = "KJV, 4 bit", x = "step", y = "loss (nats/byte)", log = "x" })

local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local files = require("quartermoon.files")
local metrics = require("quartermoon.metrics")

local M = {}

-- Okabe and Ito's colours, which colour-blind readers tell apart (jfly.uni-koeln.de/color).
local COLOURS = { "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444" }
local STYLES = { line = "lines", points = "points", both = "linespoints", steps = "steps" }
local PAD = 0.04 -- of the range, around linear axes

local function finite(value) return value == value and math.abs(value) < math.huge end

---A gnuplot string: in single quotes nothing is expanded, neither variables nor commands.
local function quote(text) return "'" .. tostring(text):gsub("'", "''"):gsub("[%c]", " ") .. "'" end

---A tick's label: 25k instead of 25000, 1e-4 instead of 0.0001. The unit is that of `like`.
local function label(value, like)
  local size = math.abs(like or value)
  if value == 0 then return "0" end
  for _, unit in ipairs({ { 1e9, "G" }, { 1e6, "M" }, { 1e4, "k" } }) do
    if size >= unit[1] then return ("%.6g%s"):format(value / (unit[2] == "k" and 1e3 or unit[1]), unit[2]) end
  end
  if size > 0 and size < 1e-3 then return (("%.3g"):format(value):gsub("e%-0", "e-")) end
  return ("%.6g"):format(value)
end

---Places for about six ticks of a linear axis.
local function linear_ticks(low, high)
  local raw = (high - low) / 6
  local decade = 10 ^ math.floor(math.log10(raw))
  local step = 10 * decade
  for _, factor in ipairs({ 5, 2.5, 2, 1 }) do if factor * decade >= raw then step = factor * decade end end
  local ticks = {}
  for i = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) do ticks[#ticks + 1] = i * step end
  return ticks
end

---The same for a logarithmic one: powers of ten, with steps between where there are few.
local function log_ticks(low, high)
  local decades = math.log10(high / low)
  local mantissas = decades > 4 and { 1 } or decades > 1.6 and { 1, 2, 5 }
    or decades > 0.7 and { 1, 1.5, 2, 3, 4, 5, 7 } or nil
  if not mantissas then return linear_ticks(low, high) end
  local every, ticks = math.max(1, math.ceil(decades / 8)), {}
  for power = math.floor(math.log10(low)), math.ceil(math.log10(high)), every do
    for _, mantissa in ipairs(mantissas) do
      local value = mantissa * 10 ^ power
      if value >= low * 0.999 and value <= high * 1.001 then ticks[#ticks + 1] = value end
    end
  end
  return ticks
end

---The values of one axis as a list of numbers.
local function numbers(name, argument, values)
  if check.is_tensor(values) then
    if #values.shape ~= 1 then check.fail(name, argument, "a tensor of one dimension", values) end
    values = values:totable()
  end
  check.type(name, argument, values, "table")
  for _, value in ipairs(values) do check.type(name, argument, value, "number") end
  return values
end

local SERIES = { name = check.optional, x = check.optional, y = check.optional, points = check.optional,
  style = "line", dashed = false, smooth = 1 }

---The mean of each point and its neighbours, `width` in all. At the start, where losses fall steeply,
---the window shrinks on both sides, lest the mean lie beside the curve; at the end only on one.
local function smoothed(points, width)
  local reach, result = math.floor(width / 2), {}
  for i = 1, #points do
    local sum, count = 0, 0
    local here = math.min(reach, i - 1)
    for j = i - here, math.min(i + here, #points) do
      if points[j] then sum, count = sum + points[j][2], count + 1 end
    end
    result[i] = points[i] and { points[i][1], sum / count }
  end
  return result
end

---Check the series, and keep of each the points that can be drawn; a gap stands where one cannot.
local function prepare(name, series, log)
  local list = {}
  for i, given in ipairs(check.type(name, "series", series, "table")) do
    local where = ("series[%d]"):format(i)
    given = check.options(name .. ": " .. where, given, SERIES)
    check.one_of(name, where .. ".style", given.style, { "line", "points", "both", "steps" })
    if given.points then
      check.type(name, where .. ".points", given.points, "table")
      given.x, given.y = {}, {}
      for j, point in ipairs(given.points) do
        check.type(name, ("%s.points[%d]"):format(where, j), point, "table")
        given.x[j], given.y[j] = point[1] or false, point[2] or false
      end
    end
    local y = numbers(name, where .. ".y", given.y)
    local x = given.x and numbers(name, where .. ".x", given.x)
    if x and #x ~= #y then check.fail(name, where .. ".x", #y .. " numbers, as in y", #x) end
    local item = { name = given.name, style = given.style, dashed = given.dashed, points = {} }
    for j = 1, #y do
      local at = x and x[j] or j
      local drawn = finite(at) and finite(y[j]) and (at > 0 or not log.x) and (y[j] > 0 or not log.y)
      item.points[j] = drawn and { at, y[j] } or false
    end
    item.smoothed = check.integer(name, where .. ".smooth", given.smooth, 1) > 1 and smoothed(item.points, given.smooth)
    list[i] = item
  end
  return list
end

---The range of one axis: the user's, or the data's with a little room.
local function range(name, argument, list, index, given, is_log)
  if given ~= nil then
    check.type(name, argument, given, "table")
    local low = check.number(name, argument, given[1])
    local high = check.number(name, argument, given[2])
    if high <= low or (is_log and low <= 0) then
      check.fail(name, argument, is_log and "{ low, high }, above 0" or "{ low, high }", low .. ", " .. high)
    end
    return low, high
  end
  local low, high = math.huge, -math.huge
  for _, item in ipairs(list) do
    for _, point in ipairs(item.points) do
      if point then low, high = math.min(low, point[index]), math.max(high, point[index]) end
    end
  end
  if low > high then low, high = 1, 2 end
  if is_log then
    if low == high then low, high = low / 2, high * 2 end
    return low / (high / low) ^ PAD, high * (high / low) ^ PAD
  end
  if low == high then
    local room = math.max(math.abs(low) * 0.1, 1e-12)
    low, high = low - room, high + room
  elseif index == 1 then
    if low > 0 and low < 0.1 * high then low = 0 end
  else
    low, high = low - PAD * (high - low), high + PAD * (high - low)
  end
  return low, high
end

local function axis(letter, low, high, is_log)
  local ticks = {}
  local largest = not is_log and math.max(math.abs(low), math.abs(high)) or nil
  for i, value in ipairs((is_log and log_ticks or linear_ticks)(low, high)) do
    ticks[i] = ("%s %.12g"):format(quote(label(value, largest)), value)
  end
  return ("%sset %srange [%.12g:%.12g]\nset %stics (%s)\n"):format(
    is_log and "set logscale " .. letter .. "\n" or "", letter, low, high, letter, table.concat(ticks, ", "))
end

---The whole gnuplot program, data included.
local function program(output, list, ranges, log, options)
  local svg = output:match("%.svg%.partial$")
  local out = {
    ("set terminal %s size %d,%d enhanced font %s%s\nset encoding utf8\n"):format(svg and "svg" or "pngcairo",
      options.width, options.height, quote("DejaVu Sans," .. options.font_size), svg and " background '#ffffff'" or ""),
    "set output " .. quote(output) .. "\n",
    "set border 3 linewidth 1.2 linecolor '#666666'\n",
    "set tics nomirror out scale 0.6 textcolor '#333333'\n",
    "set grid back linetype 1 linewidth 1 linecolor '#e4e4e4'\n",
    "set lmargin 11\nset rmargin 4\nset bmargin 4\n",
    ("set key %s Left reverse noenhanced opaque width -3 samplen 2.5 spacing 1.3 textcolor '#333333'\n"):format(
      options.legend),
    axis("x", ranges.x[1], ranges.x[2], log.x), axis("y", ranges.y[1], ranges.y[2], log.y),
  }
  local function text(what, value, font)
    if value then
      out[#out + 1] = ("set %s %s noenhanced font %s textcolor '#222222'\n"):format(what, quote(value),
        quote("DejaVu Sans" .. font))
    end
  end
  text("title", options.title, (":Bold,%d"):format(math.floor(options.font_size * 1.25)))
  text("xlabel", options.x, "," .. options.font_size)
  text("ylabel", options.y, "," .. options.font_size)
  local plots = {}
  local function draw(points, item, colour, title)
    local dots = item.style == "points" or item.style == "both"
    local block = {}
    for i, point in ipairs(points) do block[i] = point and ("%.9g %.9g\n"):format(point[1], point[2]) or "\n" end
    out[#out + 1] = ("$series%d << END\n%sEND\n"):format(#plots + 1, table.concat(block))
    plots[#plots + 1] = ("$series%d using 1:2 with %s linewidth 2.4 linecolor rgb '%s'%s%s %s"):format(#plots + 1,
      STYLES[item.style], colour, item.dashed and " dashtype 2" or "", dots and " pointtype 7 pointsize 0.9" or "",
      title and "title " .. quote(title) or "notitle")
  end
  for i, item in ipairs(list) do
    local colour = COLOURS[(i - 1) % #COLOURS + 1]
    -- "#c8rrggbb" is the colour, nearly transparent: the noise behind its mean.
    if item.smoothed then draw(item.points, item, "#c8" .. colour:sub(2)) end
    draw(item.smoothed or item.points, item, colour, item.name)
  end
  out[#out + 1] = "plot " .. table.concat(plots, ", \\\n  ") .. "\nunset output\n"
  return table.concat(out)
end

---Run gnuplot on a program. @return boolean|nil ok, string|nil reason
local function run(text)
  local script = os.tmpname()
  local file = assert(io.open(script, "wb"))
  file:write(text)
  file:close()
  local pipe = io.popen("gnuplot " .. script .. " 2>&1; echo \"status $?\"")
  local output = pipe:read("*a")
  pipe:close()
  os.remove(script)
  local message, status = output:match("^(.*)status (%d+)%s*$")
  if status == "127" then return nil, "gnuplot is not installed (Debian: apt install gnuplot-nox)" end
  if status ~= "0" then return nil, "gnuplot: " .. (message or output):gsub("%s+", " ") end
  return true
end

local OPTIONS = { title = check.optional, x = check.optional, y = check.optional, log = "",
  x_range = check.optional, y_range = check.optional, legend = "top right", width = 1200, height = 720, font_size = 15 }

---Draw curves into a picture. Numbers that cannot be drawn (not finite, or not above 0 on a
---logarithmic axis) leave a gap.
---@param path string  ends in .png or .svg; replaced when the picture is complete
---@param series table[]  each { y = numbers, x = numbers (1, 2, ...) } or { points = { { x, y }, ... } },
---  with name: for the legend; style = "line", "points", "both" or "steps"; dashed = false; smooth = 1:
---  draw the mean over so many points, and the points faintly behind it; numbers: a list or a tensor
---@param options table|nil  title; x, y: what the axes show; log = "x", "y" or "xy"; x_range, y_range =
---  { low, high }; legend = "top right", "bottom left" ...; width, height in pixels; font_size
---@return string|nil path, string|nil reason  nil and the reason when gnuplot is missing or fails
function M.curves(path, series, options)
  local name = "qm.plot.curves"
  check.type(name, "path", path, "string")
  if not path:match("%.png$") and not path:match("%.svg$") then
    check.fail(name, "path", "a name ending in .png or .svg", path)
  end
  options = check.options(name, options, OPTIONS)
  check.one_of(name, "log", options.log, { "", "x", "y", "xy" })
  check.one_of(name, "legend", options.legend, { "top right", "top left", "bottom right", "bottom left", "off" })
  if options.legend == "off" then options.legend = "off top" end
  for _, key in ipairs({ "width", "height", "font_size" }) do check.integer(name, key, options[key], 4, 20000) end
  local log = { x = options.log:find("x") ~= nil, y = options.log:find("y") ~= nil }
  local list = prepare(name, series, log)
  if #list == 0 then check.fail(name, "series", "at least one series", series) end
  local ranges = { x = { range(name, "x_range", list, 1, options.x_range, log.x) },
    y = { range(name, "y_range", list, 2, options.y_range, log.y) } }
  local partial = path .. ".partial"
  local ok, reason = run(program(partial, list, ranges, log, options))
  if ok and (files.size(partial) or 0) == 0 then ok, reason = nil, "gnuplot wrote nothing to " .. partial end
  if ok then ok, reason = os.rename(partial, path) end
  if not ok then
    os.remove(partial)
    return nil, reason
  end
  return path
end

---Draw quantities of one or several runs from their metrics files.
---@param path string  ends in .png or .svg
---@param runs table<string, string>|string  a metrics file, or { [name] = file, ... }
---@param options table|nil  fields = { "step", "loss" }: what stands across, then what is drawn, each a
---  curve; smooth: of the first curve; and all of qm.plot.curves
---@return string|nil path, string|nil reason
function M.metrics(path, runs, options)
  local name = "qm.plot.metrics"
  local single = type(runs) == "string"
  if single then runs = { [runs] = runs } end
  check.type(name, "runs", runs, "table")
  local rest = {}
  for key, value in pairs(options or {}) do rest[key] = value end
  local fields, smooth = rest.fields or { "step", "loss" }, rest.smooth
  rest.fields, rest.smooth = nil, nil
  rest.x, rest.y = rest.x or fields[1], rest.y or fields[2]
  local names, series = {}, {}
  for run_name in pairs(runs) do names[#names + 1] = run_name end
  table.sort(names)
  for _, run_name in ipairs(names) do
    local lines, reason = metrics.read(runs[run_name])
    if not lines then binding.raise(name .. ": " .. reason) end
    for f = 2, #fields do
      local points = {}
      for _, line in ipairs(lines) do
        local x, y = line[fields[1]], line[fields[f]]
        if type(x) == "number" and type(y) == "number" then points[#points + 1] = { x, y } end
      end
      local label_words = single and fields[f] or #fields > 2 and run_name .. ", " .. fields[f] or run_name
      series[#series + 1] = { name = label_words, points = points, smooth = f == 2 and smooth or nil,
        style = f > 2 and "both" or nil }
    end
  end
  return M.curves(path, series, rest)
end

return M
