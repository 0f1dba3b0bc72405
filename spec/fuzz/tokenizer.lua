-- Tokenizer files: tokenizer.json of either kind, or, where the input begins no JSON, tokenizer.model.
-- What can be read encodes some texts and decodes them.
local qm = require("quartermoon")

local TEXTS = { "", "Hello, w\195\182rld!  It's 2024.\n", "\255\0\226\150\129 a", "<s>x</s><|a|>" }

local function use(tokenizer)
  for _, text in ipairs(TEXTS) do
    local ids = tokenizer:ids(text)
    tokenizer:decode(ids)
    tokenizer:encode(text):free()
  end
  tokenizer:fingerprint()
end

return function(bytes, fuzz)
  local name = bytes:find("^%s*{") and "tokenizer.json" or "tokenizer.model"
  local tokenizer = qm.tokenizer.load(fuzz.write(name, bytes))
  fuzz.use(use, tokenizer)
end
