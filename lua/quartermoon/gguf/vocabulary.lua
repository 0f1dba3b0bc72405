---A tokenizer as llama.cpp has it: words, kinds, scores or merges, and how it splits a text.
---
---llama.cpp knows a handful of ways to split a text by name. Where none is that of the tokenizer the export is
---refused: a model would be given other tokens than it learnt.
---
---Source: llama.cpp, src/llama-vocab.cpp, and its converters.

local cjson = require("cjson")
local files = require("quartermoon.files")
local merges_of = require("quartermoon.tokenizer.merges")
local raise = require("quartermoon.ffi").raise
local tokenizers = require("quartermoon.tokenizer")
local unicode = require("quartermoon.tokenizer.unicode")
local without_nulls = require("quartermoon.inspection.report").without_nulls

local M = {}

local NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
local PAIR = merges_of.PAIR
local MARK = "\226\150\129" -- U+2581, which stands for a space
local HINT = "; the option tokenizer = false leaves the tokenizer out"

---llama.cpp's names, by the regular expression before the bytes, and by whether whole words need no merges.
local SPLIT = [[(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|]]
  .. [[\s*[\r\n]+|\s+(?!\S)|\s+]]
local NAMES = {
  [SPLIT:format([[\p{N}{1,3}]])] = { [true] = "llama-bpe", [false] = "smaug-bpe" },
  [SPLIT:format([[\p{N}]])] = { [false] = "qwen2" },
}

---------------------------------------------------------------------------------------------------
-- Byte-level merges
---------------------------------------------------------------------------------------------------

---How the text is split, by name; nil where llama.cpp has no such way.
local function pre_of(description)
  local model, pre = description.model, description.pre_tokenizer or {}
  local steps = pre.type == "Sequence" and pre.pretokenizers or { pre }
  local first, last = steps[1] or {}, steps[#steps] or {}
  local whole = model.ignore_merges == true
  if last.type ~= "ByteLevel" or last.add_prefix_space or #steps > 2 then return nil end
  if #steps == 1 then return last.use_regex ~= false and not whole and "gpt-2" or nil end
  if first.type == "Digits" and first.individual_digits and last.use_regex ~= false and not whole then
    return "smollm"
  end
  local is_split = first.type == "Split" and first.behavior == "Isolated" and not first.invert
  local names = is_split and last.use_regex == false and NAMES[first.pattern and first.pattern.Regex or ""]
  return names and names[whole] or nil
end

---What a normalizer does that llama.cpp does not, as names of its steps.
local function steps_of(normalizer, known, list)
  if not normalizer then return list end
  for _, inner in ipairs(normalizer.normalizers or {}) do steps_of(inner, known, list) end
  if normalizer.type ~= "Sequence" and not known[normalizer.type] then list[#list + 1] = normalizer.type end
  return list
end

local function byte_level(name, description, o, notes)
  local pre = o.pre or pre_of(description)
  if not pre then
    raise(name .. ": the tokenizer splits a text in a way that llama.cpp has no name for that is known here; the "
      .. "option pre gives it one" .. HINT)
  end
  local steps = steps_of(description.normalizer, {}, {})
  if #steps > 0 then notes[#notes + 1] = "llama.cpp leaves out normalizing a text: " .. table.concat(steps, ", ") end
  local lines = {}
  for i, merge in ipairs(description.model.merges) do
    lines[i] = type(merge) == "string" and merge or merge[1] .. " " .. merge[2]
  end
  return { { "tokenizer.ggml.model", "string", "gpt2" }, { "tokenizer.ggml.pre", "string", pre },
    { "tokenizer.ggml.merges", "string[]", lines } }
end

---------------------------------------------------------------------------------------------------
-- Merges of characters, as SentencePiece's
---------------------------------------------------------------------------------------------------

---llama.cpp joins what makes the word of the best score, whichever way it is made: scores from the ranks of the
---merges, where these do the same.
local function scores_of(name, tokenizer)
  local order, scores, last = {}, {}, nil
  for key, rank in pairs(tokenizer.ranks) do order[#order + 1] = { rank, tokenizer.made[key] } end
  table.sort(order, function(a, b) return a[1] < b[1] end)
  local function refuse(word, words)
    raise(("%s: the tokenizer's merges are not SentencePiece's, which llama.cpp wants here: '%s' %s%s"):format(name,
      word, words, HINT))
  end
  for _, merge in ipairs(order) do
    local id = merge[2]
    if scores[id] and id ~= last then refuse(tokenizer.words[id], "comes before and after another word") end
    scores[id], last = scores[id] or -merge[1], id
  end
  for word, id in pairs(tokenizer.ids_of) do
    for cut = 1, scores[id] and #word - 1 or 0 do
      local a, b = tokenizer.ids_of[word:sub(1, cut)], tokenizer.ids_of[word:sub(cut + 1)]
      if a and b and not tokenizer.ranks[a * PAIR + b] then
        refuse(word, ("is not made of '%s' and '%s'"):format(word:sub(1, cut), word:sub(cut + 1)))
      end
    end
  end
  return scores
end

---The type of the step that puts a space before a text, if one does.
local function puts_space(step)
  if not step then return nil end
  for _, inner in ipairs(step.normalizers or step.pretokenizers or {}) do
    if puts_space(inner) then return puts_space(inner) end
  end
  local wanted = step.prepend_scheme ~= "never" and step.add_prefix_space ~= false
  return (step.type == "Prepend" or step.type == "Metaspace" and wanted) and step.type or nil
end

local function character_level(name, tokenizer, description, count, notes)
  local steps = steps_of(description.normalizer, { Prepend = true, Replace = true }, {})
  if #steps > 0 then
    raise(("%s: llama.cpp does not normalize a text by %s%s"):format(name, table.concat(steps, ", "), HINT))
  end
  for byte = 0, 255 do
    if not tokenizer.by_byte[byte] then
      raise(("%s: llama.cpp needs a word for every byte, and <0x%02X> is missing%s"):format(name, byte, HINT))
    end
  end
  local by_id, scores = scores_of(name, tokenizer), {}
  for id = 0, count - 1 do scores[id + 1] = by_id[id] or 0 end
  local space = puts_space(description.normalizer) or puts_space(description.pre_tokenizer)
  if space == "Metaspace" then
    notes[#notes + 1] = "llama.cpp puts a space before a text that begins with one, too, and behind special words"
  end
  return { { "tokenizer.ggml.model", "string", "llama" }, { "tokenizer.ggml.pre", "string", "default" },
    { "tokenizer.ggml.scores", "f32[]", scores }, { "tokenizer.ggml.add_space_prefix", "bool", space ~= nil } }
end

---------------------------------------------------------------------------------------------------
-- Words, and which of them begin and end a text
---------------------------------------------------------------------------------------------------

---Words and kinds of all ids of the model.
local function words_of(name, tokenizer, count)
  local words, kinds, seen, taken = {}, {}, {}, {}
  for id = 0, count - 1 do
    local word, kind = tokenizer.words[id], NORMAL
    local added, digits = word and tokenizer.added[word], word and word:match("^<0x(%x%x)>$")
    if added and added.id == id then
      kind = id == tokenizer.unk and UNKNOWN or added.special and CONTROL or USER_DEFINED
      if kind == USER_DEFINED and not tokenizer.byte_level then word = word:gsub(MARK, " ") end
    elseif digits and not tokenizer.byte_level and tokenizer.by_byte[tonumber(digits, 16)] == id then
      kind = BYTE
    elseif word and id == tokenizer.unk then
      kind = UNKNOWN
    end
    if word and seen[word] then
      raise(("%s: the tokenizer's ids %d and %d have the same word '%s', which llama.cpp cannot load%s"):format(name,
        seen[word], id, word, HINT))
    end
    words[id + 1], kinds[id + 1] = word or false, word and kind or UNUSED
    if word then seen[word] = id end
  end
  for id = 0, count - 1 do -- rows of the embedding without a word
    local filler = ("[PAD%d]"):format(id)
    while not words[id + 1] and (seen[filler] or taken[filler]) do filler = "[" .. filler .. "]" end
    if not words[id + 1] then words[id + 1], taken[filler] = filler, true end
  end
  return { { "tokenizer.ggml.tokens", "string[]", words }, { "tokenizer.ggml.token_type", "i32[]", kinds } }
end

---The id of a special token: as the tokenizer's own description names it, or else as the model's gives it, or
---else what stands around every text.
local function special_id(tokenizer, described, published, kind, count)
  local word = described[kind .. "_token"]
  if type(word) == "table" then word = word.content end
  local known = type(word) == "string" and (tokenizer.special_ids[word] or (tokenizer.ids_of or {})[word])
  local id = known or published[kind .. "_token_id"]
  if type(id) == "table" then id = id[1] end
  id = id or kind == "bos" and tokenizer.before and tokenizer.before[1]
    or kind == "eos" and tokenizer.after and tokenizer.after[1]
  if type(id) == "number" and id >= 0 and id < count then return id end
end

local function around(name, ids, expected, where)
  if #ids == 0 then return false end
  if #ids == 1 and ids[1] == expected then return true end
  raise(("%s: the tokenizer puts other tokens %s a text than the one that llama.cpp puts there%s"):format(name, where,
    HINT))
end

local function read_object(path)
  local value = files.exists(path) and files.read_json(path)
  return type(value) == "table" and without_nulls(value) or {}
end

local function specials_of(name, tokenizer, folder, model, count)
  local described = folder and read_object(folder .. "/tokenizer_config.json") or {}
  local published = without_nulls(model.published or {})
  local list, ids = {}, {}
  for _, kind in ipairs({ "bos", "eos", "unk", "pad" }) do
    ids[kind] = special_id(tokenizer, described, published, kind, count)
    local key = ({ bos = "bos", eos = "eos", unk = "unknown", pad = "padding" })[kind]
    if ids[kind] then list[#list + 1] = { "tokenizer.ggml." .. key .. "_token_id", "u32", ids[kind] } end
  end
  list[#list + 1] = { "tokenizer.ggml.add_bos_token", "bool", around(name, tokenizer.before or {}, ids.bos, "before") }
  list[#list + 1] = { "tokenizer.ggml.add_eos_token", "bool", around(name, tokenizer.after or {}, ids.eos, "behind") }
  local template, path = described.chat_template, folder and folder .. "/chat_template.jinja"
  if path and files.exists(path) then template = files.read(path) end
  if type(template) == "string" then list[#list + 1] = { "tokenizer.chat_template", "string", template } end
  return list
end

---The byte tokenizer: byte-level merges, of which there are none.
local function bytes_as_words(tokenizer)
  local words, added = {}, {}
  for byte = 0, 255 do words[byte] = unicode.byte_name[byte] end
  for word, id in pairs(tokenizer.special_ids) do words[id], added[word] = word, { id = id, special = true } end
  return { words = words, added = added, byte_level = true, special_ids = tokenizer.special_ids,
    vocab_size = tokenizer.vocab_size, text = cjson.encode({ model = { merges = {} },
      pre_tokenizer = { type = "ByteLevel" } }) }
end

---Where the tokenizer is: a file, and the folder with what else is said of it.
local function find(model, o)
  if o.tokenizer == false then return nil end
  local path = o.tokenizer or model.folder
  if not path then return nil end
  path = path:match("^(.-)/*$")
  if o.tokenizer or files.exists(path .. "/tokenizer.json") or files.exists(path .. "/tokenizer.model") then
    return path, files.list(path) and path or path:match("^(.*)/[^/]*$") or "."
  end
end

---The metadata of a model's tokenizer.
---@param name string    whose errors these are
---@param model qm.models.Decoder
---@param o table        the options tokenizer and pre of qm.gguf.export
---@param notes string[] gets what llama.cpp does otherwise
---@return table[] entries  { key, type, value }
function M.entries(name, model, o, notes)
  local path, folder = find(model, o)
  if not path then
    notes[#notes + 1] = "the file has no tokenizer: llama.cpp takes and gives numbers of tokens"
    return { { "tokenizer.ggml.model", "string", "none" } }
  end
  local tokenizer, count = tokenizers.load(path), model.config.vocab_size
  if tokenizer.kind == "byte" then tokenizer = bytes_as_words(tokenizer) end
  if not tokenizer.words then
    raise(name .. ": llama.cpp has no way to split a text as this library's own tokenizers do" .. HINT)
  end
  if tokenizer.vocab_size > count then
    raise(("%s: %s: %d tokens, and the model has %d"):format(name, path, tokenizer.vocab_size, count))
  end
  local choosy = {}
  for word, token in pairs(tokenizer.added) do
    if token.lstrip or token.rstrip or token.single_word then choosy[#choosy + 1] = word end
  end
  table.sort(choosy)
  if #choosy > 0 then
    notes[#notes + 1] = "llama.cpp finds words whatever stands around them, and leaves blanks there: "
      .. table.concat(choosy, ", ")
  end
  local description = without_nulls(cjson.decode(tokenizer.text))
  local entries = tokenizer.byte_level and byte_level(name, description, o, notes)
    or character_level(name, tokenizer, description, count, notes)
  for _, list in ipairs({ words_of(name, tokenizer, count), specials_of(name, tokenizer, folder, model, count) }) do
    for _, entry in ipairs(list) do entries[#entries + 1] = entry end
  end
  return entries
end

return M
