---What a training run tells: one line that a person watches, and a file of metrics for machines.
---
---    local progress = qm.progress.new({ steps = 1500, tokens_per_step = 1024 })
---    local metrics = qm.progress.metrics("runs/a/metrics.jsonl")
---    progress:update({ step = step, loss = loss, lr = lr })
---    metrics:write({ step = step, loss = loss, lr = lr })
---    progress:finish()

local cjson = require("cjson")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local clock = require("quartermoon.clock")
local files = require("quartermoon.files")
local terminal = require("quartermoon.terminal")

local M = {}

---------------------------------------------------------------------------------------------------
-- The line
---------------------------------------------------------------------------------------------------

---@class qm.Progress
---@field loss number|nil  the smoothed loss
local Progress = {}
Progress.__index = Progress

---12.3k, 4.56M: three digits that matter.
function M.short(value)
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
  seconds = math.floor(seconds + 0.5)
  if seconds < 60 then return seconds .. " s" end
  if seconds < 3600 then return ("%d:%02d min"):format(seconds / 60, seconds % 60) end
  if seconds < 172800 then return ("%d:%02d:%02d h"):format(seconds / 3600, seconds / 60 % 60, seconds % 60) end
  return ("%d d %d h"):format(seconds / 86400, seconds / 3600 % 24)
end

---A line that is rewritten in place on a terminal, and printed every `every` steps elsewhere.
---@param options table  steps: how many the run has; tokens_per_step: for the rate; every = steps / 20:
---  how often a line is printed where there is no terminal; smoothing = 0.98: weight of the past in
---  the loss shown; output = io.stderr; terminal: whether output is one (asked of the system);
---  clock: a function that gives seconds
---@return qm.Progress
function M.new(options)
  local name = "qm.progress.new"
  options = check.options(name, options, { steps = check.required, tokens_per_step = check.optional,
    every = check.optional, smoothing = 0.98, output = io.stderr, terminal = check.optional, clock = clock.now })
  check.integer(name, "steps", options.steps, 1)
  check.number(name, "smoothing", options.smoothing, 0, 0.9999)
  local is_terminal = options.terminal
  if is_terminal == nil then is_terminal = options.output == io.stderr and terminal.is_terminal(2) end
  return setmetatable({ steps = options.steps, tokens_per_step = options.tokens_per_step, terminal = is_terminal,
    every = options.every or math.max(1, math.floor(options.steps / 20)), smoothing = options.smoothing,
    output = options.output, clock = options.clock, width = 0, drawn = -math.huge,
    loss_sum = 0, loss_weight = 0, time_sum = 0, time_weight = 0 }, Progress)
end

---The weighted means of loss and time per step, in which the past fades.
local function observe(self, status, now)
  local keep = self.smoothing
  if status.loss == status.loss and status.loss and math.abs(status.loss) < math.huge then
    self.loss_sum = keep * self.loss_sum + status.loss
    self.loss_weight = keep * self.loss_weight + 1
    self.loss = self.loss_sum / self.loss_weight
  end
  if self.time and status.step > self.step then
    local steps = status.step - self.step
    self.time_sum = keep ^ steps * self.time_sum + (now - self.time)
    self.time_weight = keep ^ steps * self.time_weight + steps
  end
  self.time, self.step = now, status.step
end

local function line_of(self, status)
  local digits = #tostring(self.steps)
  local parts = { ("step %" .. digits .. "d/%d"):format(status.step, self.steps),
    ("%3d %%"):format(math.floor(100 * status.step / self.steps)) }
  if status.loss then
    local unsound = status.loss ~= status.loss or math.abs(status.loss) == math.huge
    parts[#parts + 1] = unsound and "loss " .. tostring(status.loss) or ("loss %.4f"):format(self.loss)
  end
  local seconds = self.time_weight > 0 and self.time_sum / self.time_weight
  if seconds and seconds > 0 and self.tokens_per_step then
    parts[#parts + 1] = M.short(self.tokens_per_step / seconds) .. " tokens/s"
  end
  if status.lr then parts[#parts + 1] = ("lr %.2e"):format(status.lr) end
  if status.text then parts[#parts + 1] = status.text end
  if seconds and status.step < self.steps then
    parts[#parts + 1] = M.duration(seconds * (self.steps - status.step)) .. " left"
  end
  return table.concat(parts, "  ")
end

local function draw(self, line)
  self.output:write("\r", line, (" "):rep(self.width - #line))
  self.output:flush()
  self.width = #line
end

---Tell how a step went.
---@param status table  step; loss, lr, text (something more for the line): each may be absent
function Progress:update(status)
  check.integer("progress:update", "step", status.step, 0)
  local now = self.clock()
  observe(self, status, now)
  local last = status.step >= self.steps
  if self.terminal then
    if last or now - self.drawn >= 0.1 then -- faster than anyone reads only costs time
      draw(self, line_of(self, status))
      self.drawn = now
    end
  elseif last or status.step % self.every == 0 then
    self.output:write(line_of(self, status), "\n")
    self.output:flush()
  end
end

---Print a line of its own, above the line that moves.
function Progress:note(text)
  if self.terminal and self.width > 0 then self.output:write("\r", (" "):rep(self.width), "\r") end
  self.width = 0
  self.output:write(text, "\n")
  self.output:flush()
end

---Leave the line as it stands.
function Progress:finish()
  if self.terminal and self.width > 0 then self.output:write("\n") end
  self.width = 0
  self.output:flush()
end

---------------------------------------------------------------------------------------------------
-- The file
---------------------------------------------------------------------------------------------------

---@class qm.Metrics
local Metrics = {}
Metrics.__index = Metrics

---One record as a line of JSON: `step` first, then by name. JSON knows no NaN and no infinity: null.
local function encode(record)
  local keys = {}
  for key in pairs(record) do keys[#keys + 1] = check.type("metrics:write", "record", key, "string") end
  table.sort(keys, function(a, b)
    if (a == "step") ~= (b == "step") then return a == "step" end
    return a < b
  end)
  for i, key in ipairs(keys) do
    local value = record[key]
    if type(value) == "number" and (value ~= value or math.abs(value) == math.huge) then value = cjson.null end
    keys[i] = cjson.encode(key) .. ":" .. cjson.encode(value)
  end
  return "{" .. table.concat(keys, ",") .. "}\n"
end

---@return table[]|nil records, string[]|string lines_or_reason
local function read_lines(path)
  local text, reason = files.read(path)
  if not text then return nil, reason end
  local records, lines = {}, {}
  for line in text:gmatch("[^\n]*\n") do
    local ok, record = pcall(cjson.decode, line)
    if not ok or type(record) ~= "table" then
      return nil, ("%s: line %d is no JSON object"):format(path, #records + 1)
    end
    records[#records + 1], lines[#lines + 1] = record, line
  end
  return records, lines
end

---The records of a metrics file. A last line without its end, from a run that was killed, is left out.
---@param path string
---@return table[]|nil records, string|nil reason
function M.read_metrics(path)
  local records, reason = read_lines(path)
  return records, not records and reason or nil
end

---Open a file of metrics, one JSON object a line. Every line is written through at once.
---@param path string
---@param options table|nil  after: resuming behind this step, keep only the lines up to it, so that no
---  step stands there twice; without, lines go behind what is there
---@return qm.Metrics
---@raise when the file cannot be written, or (with after) cannot be read, naming it
function M.metrics(path, options)
  local name = "qm.progress.metrics"
  check.type(name, "path", path, "string")
  options = check.options(name, options, { after = check.optional })
  if (files.size(path) or 0) > 0 then
    local records, lines = read_lines(path)
    if not records then binding.raise(name .. ": " .. lines) end
    local kept = {}
    for i, record in ipairs(records) do
      local step = type(record.step) == "number" and record.step
      if not options.after or not step or step <= options.after then kept[#kept + 1] = lines[i] end
    end
    files.write(path, table.concat(kept))
  end
  local file, reason = io.open(path, "ab")
  if not file then binding.raise(name .. ": " .. reason) end
  return setmetatable({ file = file, path = path }, Metrics)
end

---Append one record.
---@param record table<string, any>  numbers, strings, booleans
---@raise when the disk is full, naming the file
function Metrics:write(record)
  local line = encode(check.type("metrics:write", "record", record, "table"))
  local ok, reason = self.file:write(line)
  if ok then ok, reason = self.file:flush() end
  if not ok then binding.raise(("metrics:write: %s: %s"):format(self.path, reason)) end
end

function Metrics:close()
  if self.file then self.file:close() end
  self.file = nil
end

return M
