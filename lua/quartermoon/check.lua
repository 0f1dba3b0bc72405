---Argument checks of the Lua surface. Shapes and element types are checked in C (engine/operand.c);
---here stand the checks that C cannot make: is it a tensor at all, a number, a known option.
---
---Every failure reads `function: argument 'name': expected X, got Y` on the user's line.

local raise = require("quartermoon.ffi").raise

local M = {}

---What a value is, in words: "number 3", "string 'f33'", "qm.Tensor f32 [2, 3]", "nothing".
function M.describe(value)
  local kind = type(value)
  if value == nil then return "nothing" end
  if kind == "string" then return "string '" .. (#value > 40 and value:sub(1, 37) .. "..." or value) .. "'" end
  if kind == "number" or kind == "boolean" then return kind .. " " .. tostring(value) end
  local class = kind == "table" and getmetatable(value)
  if type(class) == "table" and class.describe then
    local ok, words = pcall(class.describe, value) -- an object half made may not be able to say
    if ok and type(words) == "string" then return words end
  end
  return "a " .. kind
end

---Raise "name: argument 'argument': expected ..., got ...".
function M.fail(name, argument, expected, got)
  raise(("%s: argument '%s': expected %s, got %s"):format(name, argument, expected, M.describe(got)))
end

local function is_tensor(value)
  return type(value) == "table" and rawget(value, "desc") ~= nil
end
M.is_tensor = is_tensor

---The tensor's descriptor, to hand to C.
function M.desc(name, argument, value)
  if type(value) ~= "table" or rawget(value, "desc") == nil then M.fail(name, argument, "a tensor", value) end
  return value.desc
end

---The same where the tensor may be absent: nil becomes NULL.
function M.optional_desc(name, argument, value)
  if value == nil then return nil end
  return M.desc(name, argument, value)
end

local function numeral(x) return x % 1 == 0 and ("%.0f"):format(x) or tostring(x) end

local function range(min, max)
  if min and max then return " from " .. numeral(min) .. " to " .. numeral(max) end
  return min and " of at least " .. numeral(min) or max and " of at most " .. numeral(max) or ""
end

---@param min number|nil  the smallest allowed value
---@param max number|nil  the largest allowed value
function M.number(name, argument, value, min, max)
  if type(value) ~= "number" or value ~= value or (min and value < min) or (max and value > max) then
    M.fail(name, argument, "a number" .. range(min, max), value)
  end
  return value
end

---The same for whole numbers.
function M.integer(name, argument, value, min, max)
  if type(value) ~= "number" or value % 1 ~= 0 or (min and value < min) or (max and value > max) then
    M.fail(name, argument, "an integer" .. range(min, max), value)
  end
  return value
end

---A value of this Lua type.
function M.type(name, argument, value, kind)
  if type(value) ~= kind then
    M.fail(name, argument, (kind:match("^[aeiou]") and "an " or "a ") .. kind, value)
  end
  return value
end

---@param choices any[]
function M.one_of(name, argument, value, choices)
  local words = {}
  for i, choice in ipairs(choices) do
    if value == choice then return value end
    words[i] = type(choice) == "string" and "'" .. choice .. "'" or tostring(choice)
  end
  M.fail(name, argument, "one of " .. table.concat(words, ", "), value)
end

---An object of this class, or of one that inherits from it?
local function is_instance(value, class)
  local own = getmetatable(value)
  for _ = 1, 8 do
    if own == class then return true end
    local parent = getmetatable(own)
    own = type(parent) == "table" and parent.__index
    if not own then return false end
  end
  return false
end

---An object of a class, or of one that inherits from it.
---@param class_name string  as the user knows it
function M.instance(name, argument, value, class, class_name)
  if not is_instance(value, class) then M.fail(name, argument, "a " .. class_name, value) end
  return value
end

local unguarded = setmetatable({}, { __mode = "k" })

---The function that stands in the source, where `methods` put a guard before it.
function M.source_of(method) return unguarded[method] or method end

---Let every method of a class say so when its object is none of the class, as `x.count()` for
---`x:count()` does.
---@param class_name string   as the user knows it
---@param statics table|nil   set of names that are no methods, { new = true }
function M.methods(class_name, class, statics)
  for key, method in pairs(class) do
    if type(method) == "function" and key:sub(1, 2) ~= "__" and not (statics and statics[key]) then
      class[key] = function(self, ...)
        if getmetatable(self) ~= class then
          M.instance(class_name .. ":" .. key, "self", self, class, class_name .. " (methods are called with ':')")
        end
        return method(self, ...)
      end
      unguarded[class[key]] = method
    end
  end
end

---Edit distance, for "did you mean".
local function distance(a, b)
  local row = {}
  for j = 0, #b do row[j] = j end
  for i = 1, #a do
    local diagonal = row[0]
    row[0] = i
    for j = 1, #b do
      local cost = a:byte(i) == b:byte(j) and 0 or 1
      diagonal, row[j] = row[j], math.min(row[j] + 1, row[j - 1] + 1, diagonal + cost)
    end
  end
  return row[#b]
end

---The known name nearest to a misspelt one, or nil when none is near.
function M.nearest(word, known)
  local best, best_distance
  for _, candidate in ipairs(known) do
    local d = distance(word, candidate)
    if not best_distance or d < best_distance then best, best_distance = candidate, d end
  end
  if best and best_distance <= math.max(2, #word / 3) then return best end
end

---Refuse unknown option names and fill in defaults. A default of `check.required` must be given,
---one of `check.optional` may be absent.
---@param options table|nil
---@param defaults table<string, any>
---@return table  a new table
function M.options(name, options, defaults)
  if options ~= nil and type(options) ~= "table" then M.fail(name, "options", "a table", options) end
  options = options or {}
  local known = {}
  for key in pairs(defaults) do known[#known + 1] = key end
  table.sort(known)
  for key in pairs(options) do
    if defaults[key] == nil then
      local near = type(key) == "string" and M.nearest(key, known)
      raise(("%s: unknown option '%s'%s (known: %s)"):format(name, tostring(key),
        near and ", did you mean '" .. near .. "'?" or "", table.concat(known, ", ")))
    end
  end
  local result = {}
  for key, default in pairs(defaults) do
    local value = options[key]
    if value == nil then
      if default == M.required then raise(("%s: option '%s' is needed"):format(name, key)) end
      if default ~= M.optional then result[key] = default end
    else
      result[key] = value
    end
  end
  return result
end
M.required = setmetatable({}, { __tostring = function() return "required" end })
M.optional = setmetatable({}, { __tostring = function() return "optional" end })

return M
