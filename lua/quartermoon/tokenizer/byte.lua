---The tokenizer that needs no training: a token is a byte.

local check = require("quartermoon.check")
local Base = require("quartermoon.tokenizer.base")

local Byte = setmetatable({}, { __index = Base })
Byte.__index, Byte.__tostring = Byte, Base.describe

local M = {}

---A byte tokenizer with these special tokens after the 256 bytes.
function M.new(name, specials)
  local self = setmetatable({ kind = "byte", strings = {} }, Byte)
  Base.setup(self, name, 256, specials)
  for byte = 0, 255 do self.strings[byte] = string.char(byte) end
  for word, id in pairs(self.special_ids) do self.strings[id] = word end
  return self
end

---Write ids to buffer[at] and on; it has room for #text more. @return integer  the index behind them
function Byte.encode_into(_, text, buffer, at)
  Base.check_into(text, buffer, at)
  for i = 1, #text do buffer[at + i - 1] = text:byte(i) end
  return at + #text
end

check.methods("qm.Tokenizer", Byte)

return M
