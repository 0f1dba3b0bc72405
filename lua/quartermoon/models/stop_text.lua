---Stop strings in a text that comes in parts: what may be the beginning of one is held back until it is
---certain, so that a stop string is found wherever the parts' borders lie, and never shown.

local check = require("quartermoon.check")

---@class qm.models.StopText
---@field strings string[]
---@field held string
local StopText = {}
StopText.__index = StopText

local M = {}

---@param strings string[]  none empty
function M.new(strings) return setmetatable({ strings = strings, held = "" }, StopText) end

---How many bytes at the end of text may be the beginning of a stop string.
local function open_tail(text, strings)
  local longest = 0
  for _, word in ipairs(strings) do
    for size = math.min(#word - 1, #text), longest + 1, -1 do
      if text:sub(-size) == word:sub(1, size) then
        longest = size
        break
      end
    end
  end
  return longest
end

---One part more.
---@param text string
---@return string text      what is certain to stand before every stop string
---@return boolean stopped  a stop string is complete; what follows it is dropped
function StopText:push(text)
  check.type("stop_text:push", "text", text, "string")
  text = self.held .. text
  local first
  for _, word in ipairs(self.strings) do
    local at = text:find(word, 1, true)
    if at and (not first or at < first) then first = at end
  end
  if first then
    self.held = ""
    return text:sub(1, first - 1), true
  end
  local tail = open_tail(text, self.strings)
  self.held = text:sub(#text - tail + 1)
  return text:sub(1, #text - tail), false
end

---What was held back, when nothing more comes.
---@return string
function StopText:finish()
  local rest = self.held
  self.held = ""
  return rest
end

check.methods("qm.models.StopText", StopText)

return M
