---Looking into models without loading them: what a file or folder holds, and what is wrong with it.
---
---    local report = qm.inspection.open("models/llama-4bit")
---    print(qm.inspection.text(report), #report.problems)
---
---`quartermoon inspect PATH` prints the same. (The prompt's printing of values is quartermoon.inspect.)

local check = require("quartermoon.check")
local files = require("quartermoon.files")
local container = require("quartermoon.inspection.container")
local folder = require("quartermoon.inspection.folder")
local gguf = require("quartermoon.inspection.gguf")
local matrices = require("quartermoon.inspection.matrices")
local report_of = require("quartermoon.inspection.report")
local values = require("quartermoon.inspection.values")
local words = require("quartermoon.inspection.words")

local made = setmetatable({}, { __mode = "k" }) -- the reports, so that nothing else is taken for one
local M = {}

local function start_of(path)
  local file, reason = io.open(path, "rb")
  if not file then return nil, reason end
  local text, why = file:read(4)
  file:close()
  if not text and why then return nil, path .. ": " .. why end
  return text or ""
end

local function read_file(report, path)
  local _, name = files.split(path)
  local start, reason = start_of(path)
  if not start then return report:problem(name, reason) end
  if start == "GGUF" or name:find("%.gguf$") then
    report.kind = "gguf"
    gguf.read(report, path, name)
    return matrices.find(report, function() return nil end)
  end
  if name:find("%.json$") or name:find("%.model$") then
    report.kind = "tokenizer"
    return folder.tokenizer(report, path, name)
  end
  if name:find("%.bin$") or name:find("%.pth?$") then
    report.kind = "pickle"
    return report:problem(name, "pickles run code when they are read: convert it to safetensors elsewhere")
  end
  report.kind = "safetensors"
  local _, metadata = container.read(report, path, name)
  for key, value in pairs(metadata or {}) do report:fact("metadata", "%s = %s", tostring(key), tostring(value)) end
  table.sort(report.facts, function(a, b) return a[2] < b[2] end)
  matrices.find(report, function() return nil end)
end

---NaN and infinity in any float tensor.
local function check_values(report)
  for _, tensor in ipairs(report.tensors) do
    local found = tensor.element and values.floats(tensor)
    if found and found.bad > 0 then
      report:problem(tensor.file, "tensor '%s' holds %d values that are NaN or infinite", tensor.name, found.bad)
    end
  end
end

---Look into a file or a folder. Whatever is in it, this returns: what is wrong is in `problems`.
---@param path string     a model folder, a checkpoint, a safetensors, GGUF or tokenizer file
---@param options table|nil  { values = false: look for NaN and infinity in every tensor, not in scales only }
---@return qm.InspectionReport
---@raise when there is nothing at that path
function M.open(path, options)
  local name = "qm.inspection.open"
  check.type(name, "path", path, "string")
  options = check.options(name, options, { values = false })
  local report = report_of.new(path)
  if files.list(path) then
    folder.read(report, (path:gsub("(.)/+$", "%1")))
  else
    local start, reason = start_of(path)
    if not start then require("quartermoon.ffi").raise(name .. ": " .. reason) end
    read_file(report, path)
  end
  if options.values then check_values(report) end
  made[report] = true
  return setmetatable(report, nil) -- what was found is data: nobody adds to it from here on
end

---A report in words.
---@param report qm.InspectionReport
---@param all boolean|nil  a row for every tensor, not one for those alike
---@return string
function M.text(report, all)
  if type(report) ~= "table" or not made[report] then
    check.fail("qm.inspection.text", "report", "a report of qm.inspection.open", report)
  end
  return words.text(report, all)
end

---`quartermoon inspect ...`
---@param arguments string[]
---@return integer status  0: nothing wrong, 1: problems, 2: a wrong command line
function M.main(arguments)
  local options = require("quartermoon.options")
  local declaration = { name = "quartermoon inspect",
    about = "What a model folder, checkpoint, safetensors, GGUF or tokenizer file holds, and what is wrong with it.",
    arguments = { { "path", nil, "the folder or file" } },
    { "all", false, "a row for every tensor, not one for those of all layers" },
    { "values", false, "look for NaN and infinity in every tensor, not in scales only" } }
  local o, reason = options.read(arguments, declaration)
  if not o then
    io.stdout:write(options.help(declaration))
    if reason == "help" then return 0 end
    io.stderr:write("quartermoon inspect: ", reason, "\n")
    return 2
  end
  local ok, report = pcall(M.open, o.path, { values = o.values })
  if not ok then
    io.stderr:write("quartermoon: ", tostring(report), "\n")
    return 1
  end
  io.stdout:write(words.text(report, o.all))
  return report.problem_count == 0 and 0 or 1
end

return M
