---Tokenizers: text to ids and back, lossless for any bytes.
---
---    local tokenizer = qm.tokenizer.train_bpe(text, { vocab_size = 4096 })
---    tokenizer:decode(tokenizer:encode("In the beginning"))  --> "In the beginning"
---    tokenizer:save("tokenizer.json")

local cjson = require("cjson")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local files = require("quartermoon.files")
local bpe = require("quartermoon.tokenizer.bpe")
local byte = require("quartermoon.tokenizer.byte")
local hf = require("quartermoon.tokenizer.hf")
local sentencepiece = require("quartermoon.tokenizer.sentencepiece")
local train = require("quartermoon.tokenizer.train")

local M = {}

---A token is a byte: 256 ids, then one for each special token.
---@param options table|nil  { specials = {} }
---@return qm.Tokenizer
function M.byte(options)
  options = check.options("qm.tokenizer.byte", options, { specials = {} })
  return byte.new("qm.tokenizer.byte", options.specials)
end

---Byte-pair tokens from merges that are known already.
---@param merges integer[][]  { left, right } pairs; merge i makes id 255 + i
---@param options table|nil  { specials = {} }
---@return qm.Tokenizer
function M.bpe(merges, options)
  options = check.options("qm.tokenizer.bpe", options, { specials = {} })
  return bpe.new("qm.tokenizer.bpe", merges, options.specials)
end

---Learn byte-pair tokens (arXiv 1508.07909) from a text. The same text and options give the same
---tokenizer everywhere.
---@param text string
---@param options table|nil  vocab_size = 4096: bytes, merges and specials together (fewer when the
---  text runs out of pairs); count_min = 2: leave rarer pairs alone; specials = {}
---@return qm.Tokenizer
function M.train_bpe(text, options)
  local name = "qm.tokenizer.train_bpe"
  check.type(name, "text", text, "string")
  options = check.options(name, options, { vocab_size = 4096, count_min = 2, specials = {} })
  check.type(name, "specials", options.specials, "table")
  local fixed = 256 + #options.specials
  check.integer(name, "vocab_size", options.vocab_size, fixed, 2 ^ 20)
  check.integer(name, "count_min", options.count_min, 1)
  local merges = train.learn(text, options.vocab_size - fixed, options.count_min)
  return bpe.new(name, merges, options.specials)
end

---Read a tokenizer: what tokenizer:save wrote, the tokenizer.json of a model folder, a SentencePiece
---tokenizer.model, or the folder that holds one of these.
---@param path string
---@return qm.Tokenizer
---@raise when the file is missing or not in order, naming it
function M.load(path)
  local name = "qm.tokenizer.load"
  check.type(name, "path", path, "string")
  for _, file in ipairs({ "tokenizer.json", "tokenizer.model" }) do
    if files.exists(path .. "/" .. file) then
      path = path .. "/" .. file
      break
    end
  end
  local text, reason = files.read(path)
  if not text then binding.raise(name .. ": " .. reason) end
  local function build()
    if path:find("%.model$") then return hf.new(sentencepiece.convert(text)) end
    local is_json, saved = pcall(cjson.decode, text)
    if not is_json then error("not JSON: " .. saved:gsub("^.-:%d+: ", ""), 0) end
    if type(saved) == "table" and type(saved.model) == "table" then return hf.new(text, saved) end
    if type(saved) ~= "table" or saved.format ~= "quartermoon-tokenizer" or saved.version ~= 1 then
      error("not a tokenizer file of version 1, and no tokenizer.json", 0)
    end
    if saved.kind == "byte" then return byte.new(name .. ": " .. path, saved.specials) end
    if saved.kind == "bpe" then return bpe.new(name .. ": " .. path, saved.merges, saved.specials) end
    error(("unknown kind '%s'"):format(tostring(saved.kind)), 0)
  end
  return binding.naming(name, path, build)
end

return M
