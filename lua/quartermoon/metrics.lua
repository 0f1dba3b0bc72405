---Metrics of a run in a file, one JSON object a line, for machines to read.
---
---    local metrics = qm.metrics.open("runs/a/metrics.jsonl")
---    metrics:write({ step = step, loss = loss, lr = lr })

local cjson = require("cjson")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local files = require("quartermoon.files")

local M = {}

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
    local ok, text = pcall(cjson.encode, value)
    if not ok then check.fail("metrics:write", key, "a number, a string or a boolean", value) end
    keys[i] = cjson.encode(key) .. ":" .. text
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
function M.read(path)
  check.type("qm.metrics.read", "path", path, "string")
  local records, reason = read_lines(path)
  return records, not records and reason or nil
end

---Open a file of metrics, one JSON object a line. Every line is written through at once.
---@param path string
---@param options table|nil  after: resuming behind this step, keep only the lines up to it, so that no
---  step stands there twice; without, lines go behind what is there
---@return qm.Metrics
---@raise when the file cannot be written, or (with after) cannot be read, naming it
function M.open(path, options)
  local name = "qm.metrics.open"
  check.type(name, "path", path, "string")
  options = check.options(name, options, { after = check.optional })
  if options.after then check.number(name, "after", options.after) end
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
  if not self.file then binding.raise("metrics:write: " .. self.path .. " is closed") end
  local ok, reason = self.file:write(line)
  if ok then ok, reason = self.file:flush() end
  if not ok then binding.raise(("metrics:write: %s: %s"):format(self.path, reason)) end
end

function Metrics:close()
  if self.file then self.file:close() end
  self.file = nil
end

check.methods("qm.Metrics", Metrics)

return M
