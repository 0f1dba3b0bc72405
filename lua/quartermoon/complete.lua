---Completion of names at the prompt: globals, fields, methods, modules that load when named.

local M = {}

local KEYWORDS = { "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local",
  "nil", "not", "or", "repeat", "return", "then", "true", "until", "while" }

---Every string key that can be read from a value, through the tables its metatable leads to.
local function names_of(value)
  local names, depth = {}, 0
  while type(value) == "table" and depth < 8 do
    for key in pairs(value) do
      if type(key) == "string" and key:find("^[%a_][%w_]*$") then names[key] = true end
    end
    local class = getmetatable(value)
    if type(class) ~= "table" then break end
    for key in pairs(type(class.__modules) == "table" and class.__modules or {}) do names[key] = true end
    value, depth = class.__index, depth + 1
  end
  return names
end

---The value of a chain of names, without running any metamethod that is a function.
local function value_of(chain, globals)
  local value = globals
  for part in chain:gmatch("[^.:]+") do
    local holder, found, depth = value, nil, 0
    while type(holder) == "table" and found == nil and depth < 8 do
      found = rawget(holder, part)
      local class = getmetatable(holder)
      holder, depth = type(class) == "table" and class.__index or nil, depth + 1
    end
    if type(value) == "string" then found = string[part] end
    value = found
  end
  return value
end

---Completions of the last name in `text`, each a whole replacement for `text`.
---@param text string
---@param globals table|nil  default _G
---@return string[] sorted
function M.complete(text, globals)
  globals = globals or _G
  local before, chain = text:match("^(.-)([%a_][%w_.:]*)$")
  if not chain then before, chain = text, "" end
  local path, separator, start = chain:match("^(.*[%w_])([.:])([%w_]*)$")
  if not path and chain:find("[.:]") then return {} end
  local names
  if path then
    local value = value_of(path, globals)
    names = names_of(type(value) == "string" and string or value)
    before = before .. path .. separator
  else
    start, names = chain, names_of(globals)
    for _, word in ipairs(KEYWORDS) do names[word] = true end
  end
  local found = {}
  for name in pairs(names) do
    local is_private = name:sub(1, 1) == "_" and start:sub(1, 1) ~= "_"
    if name:sub(1, #start) == start and not is_private then found[#found + 1] = before .. name end
  end
  table.sort(found)
  return found
end

return M
