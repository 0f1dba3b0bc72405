---Reading the description in a tokenizer.json: vocabulary, merges, added words, steps, template.
---Everything is checked (types by hf_types.lua); what we do not know is refused by name.

local cjson = require("cjson")
local hf_types = require("quartermoon.tokenizer.hf_types")
local merges = require("quartermoon.tokenizer.merges")
local pcre2 = require("quartermoon.tokenizer.pcre2")
local pipeline = require("quartermoon.tokenizer.pipeline")
local unicode = require("quartermoon.tokenizer.unicode")

local MARK = "\226\150\129" -- U+2581, which stands for a space
local PAIR = merges.PAIR

local M = {}

local function fail(format, ...) error(format:format(...), 0) end

---JSON's null as nil.
local function value(x)
  if x == cjson.null then return nil end
  return x
end

---A copy without nulls, so that absent and null are one.
local function without_nulls(x)
  if type(x) ~= "table" then return value(x) end
  local copy = {}
  for key, inner in pairs(x) do copy[key] = without_nulls(inner) end
  return copy
end

---Does a step, or one inside a sequence, have this type?
local function has_step(step, kind)
  if not step then return false end
  if step.type == kind then return true end
  for _, list in pairs({ step.normalizers or false, step.pretokenizers or false, step.decoders or false }) do
    for _, inner in ipairs(list or {}) do
      if has_step(inner, kind) then return true end
    end
  end
  return false
end

---The same steps for text that continues an earlier part: nothing is put before it.
local function continued(step)
  if type(step) ~= "table" then return step end
  local copy = {}
  for key, inner in pairs(step) do
    if type(key) == "number" then
      if not (type(inner) == "table" and inner.type == "Prepend") then copy[#copy + 1] = continued(inner) end
    else
      copy[key] = continued(inner)
    end
  end
  if copy.type == "Metaspace" then copy.prepend_scheme = "never" end
  if copy.type == "ByteLevel" then copy.add_prefix_space = false end
  if copy.type == "Prepend" then return { type = "Sequence", normalizers = {} } end
  return copy
end

local function read_vocab(self, model)
  self.ids_of, self.words, self.strings = {}, {}, {}
  local count = 0
  for word, id in pairs(model.vocab) do
    if self.words[id] then fail("model.vocab: id %d belongs to '%s' and '%s'", id, self.words[id], word) end
    self.ids_of[word], self.words[id] = id, word
    count = math.max(count, id + 1)
  end
  self.vocab_size = count
end

local function read_merges(self, model)
  self.ranks, self.made = {}, {}
  for i, merge in ipairs(model.merges) do
    local left, right
    if type(merge) == "string" then left, right = merge:match("^(.-) (.*)$") else left, right = merge[1], merge[2] end
    local a, b = left and self.ids_of[left], right and self.ids_of[right]
    local joined = a and b and self.ids_of[left .. right]
    if not joined then fail("model.merges[%d]: '%s' does not join two words of the vocabulary to a third", i - 1,
      type(merge) == "string" and merge or tostring(left)) end
    local key = a * PAIR + b
    if not self.ranks[key] then self.ranks[key], self.made[key] = i, joined end
  end
end

local function read_added(self, list)
  self.added, self.special_ids, self.specials = {}, {}, {}
  local words = {}
  for _, token in ipairs(list or {}) do
    local id, word = token.id, token.content
    self.added[word] = token
    self.words[id] = word
    self.vocab_size = math.max(self.vocab_size, id + 1)
    if token.special then self.special_ids[word], self.specials[#self.specials + 1] = id, word end
    words[#words + 1] = word
  end
  table.sort(words, function(a, b) return #a > #b or #a == #b and a < b end) -- the longest match wins
  local function matcher(wanted)
    local quoted = {}
    for _, word in ipairs(words) do
      if wanted(self.added[word]) then
        local pattern = "\\Q" .. word:gsub("\\E", "\\E\\\\E\\Q") .. "\\E"
        quoted[#quoted + 1] = self.added[word].single_word and "(?<!\\w)" .. pattern .. "(?!\\w)" or pattern
      end
    end
    if #quoted == 0 then return nil end
    local regex, reason = pcre2.compile(table.concat(quoted, "|"))
    return regex or fail("added_tokens: %s", reason)
  end
  self.find_added = matcher(function() return true end)
  self.find_plain = matcher(function(token) return not token.special end)
end

---What each id says, as bytes.
local function read_strings(self)
  for id, word in pairs(self.words) do
    if self.added[word] and self.added[word].id == id then
      self.strings[id] = word
    elseif self.byte_level then
      self.strings[id] = unicode.bytes_of_names(word) or word
    else
      local byte = word:match("^<0x(%x%x)>$")
      self.strings[id] = byte and string.char(tonumber(byte, 16)) or (word:gsub(MARK, " "))
    end
  end
end

---Ids around a text: { before }, { after }.
local function read_template(self, processor)
  self.before, self.after = self.before or {}, self.after or {}
  if not processor or processor.type == "ByteLevel" then return end
  if processor.type == "Sequence" then
    for _, inner in ipairs(processor.processors or {}) do read_template(self, inner) end
  elseif processor.type == "TemplateProcessing" then
    local list = self.before
    for _, part in ipairs(processor.single or {}) do
      if part.Sequence then
        list = self.after
      elseif part.SpecialToken then
        local known = (processor.special_tokens or {})[part.SpecialToken.id]
        for _, id in ipairs(known and known.ids or fail("post_processor: '%s' is not described",
          tostring(part.SpecialToken.id))) do list[#list + 1] = id end
      end
    end
  elseif processor.type == "RobertaProcessing" or processor.type == "BertProcessing" then
    self.before[1], self.after[1] = processor.cls[2], processor.sep[2]
  else
    fail("a post-processor of type '%s' is not known here", tostring(processor.type))
  end
end

---Words may be merged one by one where none has a mark behind another character.
local function cuts_at_marks(self)
  for word in pairs(self.ids_of) do
    local at = word:find("[^\226\150\129]") or #word + 1
    at = word:find(MARK, at, true)
    if at and not self.added[word] then return false end
  end
  return true
end

---Fill in a tokenizer from a description.
---@param self table         gets vocab_size, words, strings, ranks, steps and what else encoding needs
---@param description table  the decoded file
---@return table self
---@raise a sentence without a place
function M.read(self, description)
  local file = without_nulls(description)
  local model = file.model
  if type(model) == "table" and model.type and model.type ~= "BPE" then
    fail("a model of type '%s' is not known here, only BPE", tostring(model.type))
  end
  hf_types.check(file)
  for _, option in ipairs({ "continuing_subword_prefix", "end_of_word_suffix" }) do
    if model[option] and model[option] ~= "" then fail("model.%s is not known here", option) end
  end
  self.byte_level = has_step(file.pre_tokenizer, "ByteLevel") or has_step(file.decoder, "ByteLevel")
  read_vocab(self, model)
  read_merges(self, model)
  read_added(self, file.added_tokens)
  read_strings(self)
  read_template(self, file.post_processor)
  self.ignore_merges, self.fuse_unk = model.ignore_merges, model.fuse_unk
  self.unk = model.unk_token and self.ids_of[model.unk_token]
  self.by_byte = {}
  for byte = 0, 255 do
    local word = self.byte_level and unicode.byte_name[byte] or model.byte_fallback and ("<0x%02X>"):format(byte)
    self.by_byte[byte] = word and self.ids_of[word]
  end
  self.first = { normalize = pipeline.normalizer(file.normalizer), split = pipeline.pre_tokenizer(file.pre_tokenizer) }
  self.later = { normalize = pipeline.normalizer(continued(file.normalizer)),
    split = pipeline.pre_tokenizer(continued(file.pre_tokenizer)) }
  self.whole_words = not self.byte_level and cuts_at_marks(self)
  self.strips_space = not self.byte_level and (has_step(file.decoder, "Strip") or has_step(file.decoder, "Metaspace"))
  return self
end

return M
