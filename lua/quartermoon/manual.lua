---The manual at the prompt: the comment that stands above a function or opens a module.

local check = require("quartermoon.check")

local M = {}

local function lines_of(path)
  local file = io.open(path, "r")
  if not file then return nil end
  local lines = {}
  for line in file:lines() do lines[#lines + 1] = line end
  file:close()
  return lines
end

---Comment lines that end at line `last`, as text without their dashes.
local function comment_above(lines, last)
  local words = {}
  for at = last, 1, -1 do
    local text = lines[at]:match("^%s*%-%-%-?%s?(.*)$")
    if not text then break end
    table.insert(words, 1, text)
  end
  return words
end

local function of_function(value)
  local info = debug.getinfo(check.source_of(value), "S")
  local path = info.source:match("^@(.*)")
  local lines = path and lines_of(path)
  if not lines then return nil, "a function written in C, or without a source file" end
  local words = comment_above(lines, info.linedefined - 1)
  words[#words + 1] = ""
  words[#words + 1] = (lines[info.linedefined]:gsub("^%s*local%s+", ""):gsub("%s+$", ""))
  words[#words + 1] = ("(%s:%d)"):format(path, info.linedefined)
  return table.concat(words, "\n")
end

local function of_table(value)
  for name, module in pairs(package.loaded) do
    if module == value and type(name) == "string" then
      local path = package.searchpath(name, package.path)
      local lines = path and lines_of(path)
      if lines then
        local last = 0
        while lines[last + 1] and lines[last + 1]:find("^%-%-") do last = last + 1 end
        return table.concat(comment_above(lines, last), "\n") .. "\n\n(" .. path .. ")"
      end
    end
  end
  return nil, "a table"
end

---Look a dotted name up: "qm.swiglu", "swiglu" (in qm), "Tensor.sum", "x:sum".
---@param name string
---@param globals table
---@return any value, string|nil reason
function M.find(name, globals)
  local function walk(value)
    for part in name:gmatch("[^.:]+") do
      local kind = type(value)
      if kind ~= "table" then return nil end
      value = value[part]
    end
    return value
  end
  local found = walk(globals)
  if found == nil and globals.qm then found = walk(globals.qm) end
  if found == nil and globals.qm then found = walk(globals.qm.Tensor) end
  if found == nil then return nil, "nothing is called '" .. name .. "'" end
  return found
end

---The documentation of a name.
---@param name string
---@param globals table|nil  where names are looked up; default _G
---@return string|nil text, string|nil reason
function M.of(name, globals)
  local value, reason = M.find(name, globals or _G)
  if reason then return nil, reason end
  local text
  if type(value) == "function" then
    text, reason = of_function(value)
  elseif type(value) == "table" then
    text, reason = of_table(value)
  else
    reason = "a " .. type(value)
  end
  if text then return text end
  return nil, name .. " is " .. reason
end

return M
