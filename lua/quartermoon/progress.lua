---What a training run tells: one line that a person watches, a file of metrics, the loss curves.
---
---    local progress = qm.progress.new({ steps = 1500, tokens_per_step = 1024, out = "runs/a" })
---    progress:update(step, { loss = loss, lr = lr })
---    progress:evaluated(step, held_out_loss)
---    progress:finish()
---    qm.plot.curves("runs/a/loss.png", progress:curves(), { x = "step", y = "loss" })

local check = require("quartermoon.check")
local clock = require("quartermoon.clock")
local files = require("quartermoon.files")
local metrics = require("quartermoon.metrics")
local terminal = require("quartermoon.terminal")

local M = {}

---@class qm.Progress
---@field loss number|nil  the smoothed loss
local Progress = {}
Progress.__index = Progress

---12.3k, 4.56M: three digits that matter.
function M.short(value)
  check.type("qm.progress.short", "value", value, "number")
  for _, unit in ipairs({ { 1e12, "T" }, { 1e9, "G" }, { 1e6, "M" }, { 1e3, "k" } }) do
    if value >= unit[1] then
      local scaled = value / unit[1]
      return (scaled >= 100 and "%.0f%s" or scaled >= 10 and "%.1f%s" or "%.2f%s"):format(scaled, unit[2])
    end
  end
  return ("%.3g"):format(value)
end

---A span of time: 45 s, 2:05 min, 3:07:20 h, 2 d 5 h.
function M.duration(seconds)
  check.type("qm.progress.duration", "seconds", seconds, "number")
  seconds = math.floor(seconds + 0.5)
  if seconds < 60 then return seconds .. " s" end
  if seconds < 3600 then return ("%d:%02d min"):format(seconds / 60, seconds % 60) end
  if seconds < 172800 then return ("%d:%02d:%02d h"):format(seconds / 3600, seconds / 60 % 60, seconds % 60) end
  return ("%d d %d h"):format(seconds / 86400, seconds / 3600 % 24)
end

---A line that is rewritten in place on a terminal, and printed every `every` steps elsewhere.
---@param options table  steps: how many the run has; tokens_per_step: for the rate; every = steps / 20:
---  how often a line is printed where there is no terminal; smoothing = 0.98: weight of the past in
---  the loss shown; out: a folder, made if need be, whose metrics.jsonl gets a line per step; output =
---  io.stderr; terminal: whether output is one (asked of the system); clock: gives seconds
---@return qm.Progress
function M.new(options)
  local name = "qm.progress.new"
  options = check.options(name, options, { steps = check.required, tokens_per_step = check.optional,
    every = check.optional, out = check.optional, smoothing = 0.98, output = io.stderr, terminal = check.optional,
    clock = clock.now })
  check.integer(name, "steps", options.steps, 1)
  if options.tokens_per_step then check.number(name, "tokens_per_step", options.tokens_per_step, 0) end
  if options.every then check.integer(name, "every", options.every, 1) end
  if options.out then check.type(name, "out", options.out, "string") end
  check.type(name, "clock", options.clock, "function")
  check.number(name, "smoothing", options.smoothing, 0, 0.9999)
  local is_terminal = options.terminal
  if is_terminal == nil then is_terminal = options.output == io.stderr and terminal.is_terminal(2) end
  return setmetatable({ steps = options.steps, tokens_per_step = options.tokens_per_step, out = options.out,
    every = options.every or math.max(1, math.floor(options.steps / 20)), smoothing = options.smoothing,
    output = options.output, terminal = is_terminal, clock = options.clock, losses = {}, evaluations = {},
    width = 0, drawn = -math.huge, loss_sum = 0, loss_weight = 0, time_sum = 0, time_weight = 0 }, Progress)
end

local function is_finite(value) return type(value) == "number" and value == value and math.abs(value) < math.huge end

---The weighted means of loss and time per step, in which the past fades.
local function observe(self, step, values, now)
  local keep = self.smoothing
  if is_finite(values.loss) then
    self.loss_sum = keep * self.loss_sum + values.loss
    self.loss_weight = keep * self.loss_weight + 1
    self.loss = self.loss_sum / self.loss_weight
  end
  if self.time and step > self.step then
    local steps = step - self.step
    self.time_sum = keep ^ steps * self.time_sum + (now - self.time)
    self.time_weight = keep ^ steps * self.time_weight + steps
  end
  self.time, self.step = now, step
end

local function line_of(self, step, values)
  local parts = { ("step %" .. #tostring(self.steps) .. "d/%d"):format(step, self.steps),
    ("%3d %%"):format(math.floor(100 * step / self.steps)) }
  if values.loss then
    parts[#parts + 1] = is_finite(values.loss) and ("loss %.4f"):format(self.loss) or "loss " .. tostring(values.loss)
  end
  local seconds = self.time_weight > 0 and self.time_sum / self.time_weight
  if seconds and seconds > 0 and self.tokens_per_step then
    parts[#parts + 1] = M.short(self.tokens_per_step / seconds) .. " tokens/s"
  end
  if values.lr then parts[#parts + 1] = ("lr %.2e"):format(values.lr) end
  if values.text then parts[#parts + 1] = values.text end
  if seconds and step < self.steps then
    parts[#parts + 1] = M.duration(seconds * (self.steps - step)) .. " left"
  end
  return table.concat(parts, "  ")
end

local function draw(self, line)
  self.output:write("\r", line, (" "):rep(self.width - #line))
  self.output:flush()
  self.width = #line
end

local function note_value(list, step, value)
  if is_finite(value) then list[#list + 1] = { step, value } end
end

---Write a record to the run's file. The first step opens it: what an earlier run of the folder wrote
---up to then stays, and belongs to the curves; what it wrote behind is cut off.
local function record(self, step, values)
  if not self.out then return end
  if not self.metrics then
    files.make_folder(self.out)
    local path = self.out .. "/metrics.jsonl"
    self.metrics = metrics.open(path, { after = step - 1 })
    for _, earlier in ipairs(metrics.read(path) or {}) do
      note_value(self.losses, earlier.step, earlier.loss)
      note_value(self.evaluations, earlier.step, earlier.held_out)
    end
  end
  local line = { step = step }
  for key, value in pairs(values) do line[key] = value end
  self.metrics:write(line)
end

---Tell how a step went.
---@param step integer
---@param values table  loss, lr, text (something more for the line) are shown; all go to the metrics
function Progress:update(step, values)
  local name = "progress:update"
  check.integer(name, "step", step, 0)
  check.type(name, "values", values, "table")
  for _, key in ipairs({ "loss", "lr" }) do
    if values[key] ~= nil then check.type(name, key, values[key], "number") end
  end
  if values.text ~= nil then check.type(name, "text", values.text, "string") end
  local now = self.clock()
  record(self, step, values)
  note_value(self.losses, step, values.loss)
  observe(self, step, values, now)
  local last = step >= self.steps
  if self.terminal then
    if last or now - self.drawn >= 0.1 then -- faster than anyone reads only costs time
      draw(self, line_of(self, step, values))
      self.drawn = now
    end
  elseif last or step % self.every == 0 then
    self.output:write(line_of(self, step, values), "\n")
    self.output:flush()
  end
end

---Tell the held-out loss after a step: printed, and in the metrics as `held_out`.
---@param loss number
function Progress:evaluated(step, loss)
  check.integer("progress:evaluated", "step", step, 0)
  check.type("progress:evaluated", "loss", loss, "number")
  record(self, step, { held_out = loss })
  note_value(self.evaluations, step, loss)
  self:note(("step %" .. #tostring(self.steps) .. "d/%d  held-out loss %.4f"):format(step, self.steps, loss))
  -- Evaluating takes its time; it is none of a step's.
  self.time = self.time and self.clock()
end

---The losses of the run (with `out`, of its earlier parts too) as series for qm.plot.curves.
---@return table[] series  training, and held out where there was an evaluation
function Progress:curves()
  -- More points than pixels only cost time: means of so many steps as there are to a pixel.
  local per_point = math.ceil(#self.losses / 2000)
  local points = {}
  for i = 1, #self.losses, per_point do
    local last = math.min(i + per_point - 1, #self.losses)
    local sum = 0
    for j = i, last do sum = sum + self.losses[j][2] end
    points[#points + 1] = { self.losses[last][1], sum / (last - i + 1) }
  end
  local series = { { name = "training", points = points, smooth = math.max(1, math.floor(#points / 50)) } }
  if #self.evaluations > 0 then
    series[2] = { name = "held out", points = self.evaluations, style = "both" }
  end
  return series
end

---Print a line of its own, above the line that moves.
function Progress:note(text)
  check.type("progress:note", "text", text, "string")
  if self.terminal and self.width > 0 then self.output:write("\r", (" "):rep(self.width), "\r") end
  self.width = 0
  self.output:write(text, "\n")
  self.output:flush()
end

---Leave the line as it stands, and close the metrics.
function Progress:finish()
  if self.metrics then self.metrics:close() end
  self.metrics, self.out = nil, nil
  if self.terminal and self.width > 0 then self.output:write("\n") end
  self.width = 0
  self.output:flush()
end

check.methods("qm.Progress", Progress)

return M
