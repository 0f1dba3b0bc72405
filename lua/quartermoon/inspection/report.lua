---What an inspection found: tensors, facts, and what is wrong. Nothing here raises over a file's contents.

local cjson = require("cjson")
local files = require("quartermoon.files")

local M = {}

---What `qm.inspection.open` gives, as plain data; its methods are for those who look.
---@class qm.InspectionReport
---@field path string
---@field kind string          "safetensors", "model folder", "checkpoint", "tokenizer", "gguf" ...
---@field facts string[][]     { name, words }
---@field files table[]        { name, size_bytes, tensors }
---@field tensors table[]      { name, dtype, shape, file, begin, stop, size_bytes }
---@field by_name table<string, table>
---@field weights table[]      matrices: { name, format, k, n, bits, group_size, size_bytes, parts }
---@field problems string[]
local Report = {}
Report.__index = Report

local PROBLEMS_MAX = 200

---An empty report.
function M.new(path)
  return setmetatable({ path = path, kind = "file", facts = {}, files = {}, tensors = {}, by_name = {}, weights = {},
    problems = {}, problem_count = 0 }, Report)
end

---What is wrong, with the file that has it. The first PROBLEMS_MAX are kept, the rest are counted.
function Report:problem(file, format, ...)
  local words = select("#", ...) > 0 and format:format(...) or format
  self.problem_count = self.problem_count + 1
  if #self.problems < PROBLEMS_MAX then self.problems[#self.problems + 1] = file .. ": " .. words end
end

function Report:fact(name, format, ...)
  self.facts[#self.facts + 1] = { name, select("#", ...) > 0 and format:format(...) or tostring(format) }
end

---A tensor that a file holds.
function Report:add(tensor)
  local other = self.by_name[tensor.name]
  if other then
    return self:problem(tensor.file, "tensor '%s' is also in %s", tensor.name, other.file)
  end
  self.tensors[#self.tensors + 1], self.by_name[tensor.name] = tensor, tensor
end

local function without_nulls(x)
  if x == cjson.null then return nil end
  if type(x) ~= "table" then return x end
  local copy = {}
  for key, inner in pairs(x) do copy[key] = without_nulls(inner) end
  return copy
end
M.without_nulls = without_nulls

local JSON_BYTES_MAX = 2 ^ 28

---A JSON file's object without its nulls; nil after a problem was noted.
function Report:read_object(path, name)
  local size, reason = files.size(path)
  if not size then return self:problem(name, reason) end
  if size > JSON_BYTES_MAX then return self:problem(name, "%.0f bytes are too many for a description", size) end
  local value
  value, reason = files.read_json(path)
  if value == nil then return self:problem(name, (reason:gsub("^.-: ", "", 1))) end
  if type(value) ~= "table" then return self:problem(name, "not a JSON object") end
  return without_nulls(value)
end

---Extents in words.
function M.extents(shape) return "[" .. table.concat(shape, ", ") .. "]" end

return M
