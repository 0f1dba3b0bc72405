---What a tokenizer.json may hold, by type. All of it is checked here once; who reads it further
---(hf_description.lua, pipeline.lua) looks at meanings only.

local merges = require("quartermoon.tokenizer.merges")

local M = {}

local function fail(format, ...) error(format:format(...), 0) end

local function is_list(x)
  if type(x) ~= "table" then return false end
  local count = 0
  for _ in pairs(x) do count = count + 1 end
  return count == #x
end

local function is_id(x) return type(x) == "number" and x % 1 == 0 and x >= 0 and x < merges.PAIR end

local kinds = {} -- each: (what, x) raises unless x is one

function kinds.object(what, x) if type(x) ~= "table" or #x > 0 then fail("%s is not an object", what) end end

---Check the fields of an object; those in `needed` must be there.
local function fields(what, object, types, needed)
  kinds.object(what, object)
  for key, kind in pairs(types) do
    if object[key] ~= nil then kinds[kind](("%s.%s"):format(what, key), object[key]) end
  end
  for _, key in ipairs(needed or {}) do
    if object[key] == nil then fail("%s has no '%s'", what, key) end
  end
end

for _, kind in ipairs({ "string", "boolean" }) do
  kinds[kind] = function(what, x) if type(x) ~= kind then fail("%s is not a %s", what, kind) end end
end
function kinds.list(what, x) if not is_list(x) then fail("%s is not a list without gaps", what) end end
function kinds.id(what, x) if not is_id(x) then fail("%s is not a token's id", what) end end

---A kind for lists of others.
local function list_of(kind)
  return function(what, x)
    kinds.list(what, x)
    for i, inner in ipairs(x) do kinds[kind](("%s[%d]"):format(what, i - 1), inner) end
  end
end
kinds.ids, kinds.steps, kinds.merges, kinds.added = list_of("id"), list_of("step"), list_of("merge"), list_of("token")
kinds.template = list_of("template_part")

function kinds.merge(what, x)
  local is_pair = is_list(x) and #x == 2 and type(x[1]) == "string" and type(x[2]) == "string"
  if type(x) ~= "string" and not is_pair then fail("%s is neither a string nor two", what) end
end
function kinds.token(what, x)
  fields(what, x, { id = "id", content = "string", special = "boolean", single_word = "boolean", lstrip = "boolean",
    rstrip = "boolean" }, { "id", "content" })
  if x.content == "" then fail("%s.content is empty", what) end
end

local STEP = { type = "string", prepend = "string", content = "string", pattern = "object", behavior = "string",
  invert = "boolean", use_regex = "boolean", add_prefix_space = "boolean", individual_digits = "boolean",
  replacement = "string", prepend_scheme = "string", split = "boolean", strip_left = "boolean", strip_right = "boolean",
  normalizers = "steps", pretokenizers = "steps", decoders = "steps", processors = "steps",
  single = "template", special_tokens = "object", cls = "word", sep = "word" }
local NEEDED = { Prepend = { "type", "prepend" }, Replace = { "type", "pattern", "content" },
  Split = { "type", "pattern", "behavior" }, RobertaProcessing = { "type", "cls", "sep" },
  BertProcessing = { "type", "cls", "sep" } }

function kinds.step(what, x)
  kinds.object(what, x)
  fields(what, x, STEP, NEEDED[x.type] or { "type" })
  for key, known in pairs(x.special_tokens or {}) do
    fields(("%s.special_tokens.%s"):format(what, key), known, { ids = "ids" })
  end
end
function kinds.word(what, x) -- a word and its id
  if not (is_list(x) and #x == 2 and type(x[1]) == "string" and is_id(x[2])) then
    fail("%s is not a word and its id", what)
  end
end
function kinds.special(what, x) fields(what, x, { id = "string" }, { "id" }) end
function kinds.template_part(what, x) fields(what, x, { Sequence = "object", SpecialToken = "special" }) end
function kinds.model(what, x)
  fields(what, x, { type = "string", vocab = "object", merges = "merges", unk_token = "string", fuse_unk = "boolean",
    byte_fallback = "boolean", ignore_merges = "boolean", continuing_subword_prefix = "string",
    end_of_word_suffix = "string" }, { "vocab", "merges" })
  for word, id in pairs(x.vocab) do
    if not is_id(id) then fail("%s.vocab: '%s' has no id", what, tostring(word)) end
  end
end

---Check a description's types.
---@param description table  the decoded file, without nulls
---@raise a sentence that names what is mistyped, and no file: the caller knows it
function M.check(description)
  fields("the file", description, {})
  local places = { model = "model", added_tokens = "added", normalizer = "step", pre_tokenizer = "step",
    post_processor = "step", decoder = "step" }
  if description.model == nil then fail("no model") end
  for key, kind in pairs(places) do
    if description[key] ~= nil then kinds[kind](key, description[key]) end
  end
end

return M
