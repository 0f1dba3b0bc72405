---Values in words, for the prompt: one line for what is small, a glance at what is large.

local M = {}

local ENTRIES_MAX, TEXT_MAX = 12, 60

local function is_name(key) return type(key) == "string" and key:find("^[%a_][%w_]*$") ~= nil end

---A string in quotes, with control characters escaped.
local function quote(text)
  local short = #text > 2000 and text:sub(1, 2000) or text
  local quoted = ("%q"):format(short):gsub("\\\n", "\\n"):gsub("[%z\1-\31\127]", function(c)
    return ("\\%d"):format(c:byte())
  end)
  return short == text and quoted or ("%s... (%d bytes)"):format(quoted, #text)
end

---A value inside another: never more than a few words.
local function brief(value)
  local kind = type(value)
  if kind == "string" then return quote(#value > TEXT_MAX and value:sub(1, TEXT_MAX) .. "..." or value) end
  if kind == "function" then return "function" end
  if kind ~= "table" then return tostring(value) end
  local class = getmetatable(value)
  if type(class) == "table" and class.describe then return require("quartermoon.check").describe(value) end
  if type(class) == "table" and class.__tostring then return (tostring(value):match("[^\n]*")) end
  return next(value) == nil and "{}" or "{...}"
end

local function sorted_keys(value)
  local keys, length = {}, #value
  for key in pairs(value) do
    if not (type(key) == "number" and key >= 1 and key <= length and key % 1 == 0) then keys[#keys + 1] = key end
  end
  table.sort(keys, function(a, b)
    if type(a) == type(b) and (type(a) == "string" or type(a) == "number") then return a < b end
    return type(a) < type(b)
  end)
  return keys
end

local function table_in_words(value)
  local words, left = {}, 0
  local function add(word)
    if #words < ENTRIES_MAX then words[#words + 1] = word else left = left + 1 end
  end
  for i = 1, #value do add(brief(value[i])) end
  for _, key in ipairs(sorted_keys(value)) do
    add((is_name(key) and key or "[" .. brief(key) .. "]") .. " = " .. brief(value[key]))
  end
  if left > 0 then words[#words + 1] = ("... (%d more)"):format(left) end
  local line = "{ " .. table.concat(words, ", ") .. " }"
  if #line <= 100 then return #words == 0 and "{}" or line end
  return "{\n  " .. table.concat(words, ",\n  ") .. "\n}"
end

---One value as the prompt shows it: tensors and other objects by their own words, tables one level
---deep, strings quoted.
---@param value any
---@return string
function M.inspect(value)
  if type(value) == "string" then return quote(value) end
  if type(value) ~= "table" then return tostring(value) end
  local class = getmetatable(value)
  if type(class) == "table" and class.__tostring then return tostring(value) end
  return table_in_words(value)
end

return M
