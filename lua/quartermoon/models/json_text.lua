---JSON as people read it in model folders: sorted keys, two spaces, numbers that read back the same.

local cjson = require("cjson")
local raise = require("quartermoon.ffi").raise

local M = {}

local QUOTE = { ['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r",
  ["\t"] = "\\t" }

local function quote(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return QUOTE[c] or ("\\u%04x"):format(c:byte()) end) .. '"'
end

-- Keys whose value is a fraction by nature: programs with types expect 10000.0 there.
local FRACTIONS = { rope_theta = true, factor = true, low_freq_factor = true, high_freq_factor = true,
  attention_dropout = true, attn_pdrop = true, embd_pdrop = true, resid_pdrop = true }

-- Objects whose keys are widths, in the order of the list beside them (quant_strategy.json).
local DESCENDING = { group_size = true }

local function number(x, key)
  if x ~= x or x == math.huge or x == -math.huge then raise("JSON has no number " .. tostring(x)) end
  if x % 1 == 0 and math.abs(x) < 2 ^ 53 then return (FRACTIONS[key] and "%.1f" or "%.0f"):format(x) end
  for digits = 6, 17 do
    local text = ("%." .. digits .. "g"):format(x)
    if tonumber(text) == x then return text end
  end
end

local encode

local function object(value, indent, name)
  local keys, lines = {}, {}
  for key in pairs(value) do keys[#keys + 1] = tostring(key) end
  table.sort(keys, DESCENDING[name] and function(a, b) return a > b end or nil)
  for i, key in ipairs(keys) do
    local member = value[key]
    lines[i] = indent .. "  " .. quote(key) .. ": " .. encode(member, indent .. "  ", key)
  end
  return "{\n" .. table.concat(lines, ",\n") .. "\n" .. indent .. "}"
end

function encode(value, indent, key)
  if value == cjson.null then return "null" end
  local kind = type(value)
  if kind == "number" then return number(value, key) end
  if kind == "string" then return quote(value) end
  if kind == "boolean" then return tostring(value) end
  if kind ~= "table" then raise("JSON cannot hold a " .. kind) end
  if next(value) == nil then return "{}" end
  if #value == 0 then return object(value, indent, key) end
  local items = {}
  for i, item in ipairs(value) do items[i] = indent .. "  " .. encode(item, indent .. "  ") end
  return "[\n" .. table.concat(items, ",\n") .. "\n" .. indent .. "]"
end

---@param value table  lists, objects, strings, numbers, booleans, cjson.null
---@return string
function M.encode(value) return encode(value, "") .. "\n" end

return M
