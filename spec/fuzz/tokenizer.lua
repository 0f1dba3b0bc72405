-- Tokenizer files: tokenizer.json of either kind, or, where the input begins no JSON, tokenizer.model.
-- What can be read encodes some texts and decodes them.
local host_buffer = require("quartermoon.host_buffer")
local qm = require("quartermoon")

local TEXTS = { "", "Hello, w\195\182rld!  It's 2024.\n", "\255\0\226\150\129 a", "<s>x</s><|a|>" }

local function use(tokenizer)
  for _, text in ipairs(TEXTS) do
    local ids = tokenizer:ids(text)
    tokenizer:decode(ids)
    tokenizer:encode(text):free()
    tokenizer:encode_into(text, host_buffer.new("i32", 4 * #text + 64), 0, true)
    tokenizer:safe_end(text)
    local stream = tokenizer:stream()
    for _, id in ipairs(ids) do stream:push(id) end
    stream:finish()
  end
  tokenizer:fingerprint()
end

return function(bytes, fuzz)
  local name = bytes:find("^%s*{") and "tokenizer.json" or "tokenizer.model"
  local tokenizer = qm.tokenizer.load(fuzz.write(name, bytes))
  fuzz.use(use, tokenizer)
end
