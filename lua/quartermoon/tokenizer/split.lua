---Splitting text into the pieces that byte-pair tokens never cross.
---
---After GPT-2's rule (Radford et al. 2019), for bytes: a run of letters, of digits or of anything
---else, with the one space before it; a run of white space otherwise. Bytes from 128 up count as
---letters, so UTF-8 stays together. We differ where a regular expression shows: any letters behind
---an apostrophe inside a word are a piece ('s, 'll, 'clock), white space before a word stays one
---piece but for its last space, and no piece is longer than 128 bytes, which bounds the work that
---one piece can cost.

local ffi = require("ffi")

local M = {}

local PIECE_MAX = 128
local SPACE, LETTER, DIGIT, OTHER = 1, 2, 3, 4
local BLANK, APOSTROPHE = 32, 39

local class = ffi.new("uint8_t[256]")
for byte = 0, 255 do
  local char = string.char(byte)
  class[byte] = (byte >= 128 or char:find("%a")) and LETTER or char:find("%d") and DIGIT
    or char:find("[ \t\n\r\v\f]") and SPACE or OTHER
end

---A cut inside a long run stands before a whole UTF-8 character.
local function cut(text, at, stop)
  local back = stop
  while back > at and stop - back < 4 do
    local byte = text:byte(back)
    if byte < 128 or byte >= 192 then return back end
    back = back - 1
  end
  return stop
end

---Index of the last byte of the piece that begins at `at`.
function M.piece_end(text, at)
  local size, i = #text, at
  local kind = class[text:byte(at)]
  if kind == SPACE then
    local joins = text:byte(at) == BLANK and at < size and class[text:byte(at + 1)] ~= SPACE
    if not joins then
      local limit = math.min(size, at + PIECE_MAX - 1)
      while i < limit and class[text:byte(i + 1)] == SPACE do i = i + 1 end
      -- The last blank belongs to the word that follows.
      if i > at and i < size and text:byte(i) == BLANK and class[text:byte(i + 1)] ~= SPACE then i = i - 1 end
      return i
    end
    i = at + 1
    kind = class[text:byte(i)]
  elseif text:byte(at) == APOSTROPHE and at > 1 and at < size and class[text:byte(at - 1)] == LETTER
      and class[text:byte(at + 1)] == LETTER then
    i, kind = at + 1, LETTER
  end
  local limit = math.min(size, at + PIECE_MAX - 1)
  while i < limit and class[text:byte(i + 1)] == kind do i = i + 1 end
  if i == limit and i < size and kind == LETTER then return cut(text, at, i + 1) - 1 end
  return i
end

---The last place up to which text may be encoded on its own: a piece always ends before white space
---that follows anything else. 0 when there is none.
function M.safe_end(text)
  for i = #text, 2, -1 do
    if class[text:byte(i)] == SPACE and class[text:byte(i - 1)] ~= SPACE then return i - 1 end
  end
  return 0
end

return M
