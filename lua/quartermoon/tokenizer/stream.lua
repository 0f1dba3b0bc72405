---Text of tokens that come one at a time, in whole UTF-8 characters: a token may end inside one.

local check = require("quartermoon.check")
local unicode = require("quartermoon.tokenizer.unicode")

---@class qm.TokenStream
---@field tokenizer qm.Tokenizer
---@field held string  bytes of a character whose rest is still to come
local Stream = {}
Stream.__index = Stream

local M = {}

---@param tokenizer qm.Tokenizer
---@param options table|nil  { skip_special = true: special tokens give no text }
function M.new(tokenizer, options)
  options = check.options("tokenizer:stream", options, { skip_special = true })
  check.type("tokenizer:stream", "skip_special", options.skip_special, "boolean")
  local silent = {}
  if options.skip_special then
    for _, id in pairs(tokenizer.special_ids or {}) do silent[id] = true end
  end
  return setmetatable({ tokenizer = tokenizer, silent = silent, held = "" }, Stream)
end

---One token more.
---@param id integer
---@return string text  what is certain by now, perhaps nothing; bytes that make no character come as they are
function Stream:push(id)
  check.type("stream:push", "id", id, "number")
  if self.silent[id] then return "" end
  -- A token's text may depend on the one before: the first of a text may lose its space.
  local before, decode = self.before, self.tokenizer.decode
  local text = before and decode(self.tokenizer, { before, id }):sub(#decode(self.tokenizer, { before }) + 1)
    or decode(self.tokenizer, { id })
  self.before = id
  text = self.held .. text
  local tail = unicode.incomplete_tail(text)
  self.held = text:sub(#text - tail + 1)
  return text:sub(1, #text - tail)
end

---The bytes that are left when no more tokens come. The stream begins anew.
---@return string
function Stream:finish()
  local rest = self.held
  self.held, self.before = "", nil
  return rest
end

function Stream:describe() return "a stream of " .. tostring(self.tokenizer) end

check.methods("qm.TokenStream", Stream, { describe = true })

return M
