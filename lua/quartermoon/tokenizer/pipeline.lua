---The steps before merging that a tokenizer.json describes: normalizers and pre-tokenizers, each a
---function. Steps we do not know are refused by name, never skipped.
---
---Source: the file format of Hugging Face's tokenizers library.

local pcre2 = require("quartermoon.tokenizer.pcre2")
local unicode = require("quartermoon.tokenizer.unicode")

local M = {}

-- What use_regex of a ByteLevel step means (Radford et al. 2019).
local GPT2 = [['(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+]]

local function refuse(what, kind) error(("%s of type '%s' is not known here"):format(what, tostring(kind)), 0) end

---A pattern of the file: { Regex = "..." } or { String = "..." }.
local function compile(pattern)
  local source = pattern.Regex
  if type(source) ~= "string" then
    if type(pattern.String) ~= "string" then error("a pattern is neither Regex nor String", 0) end
    source = "\\Q" .. pattern.String:gsub("\\E", "\\E\\\\E\\Q") .. "\\E"
  end
  local regex, reason = pcre2.compile(source)
  if not regex then error(("pattern %s: %s"):format(source, reason), 0) end
  return regex
end

---------------------------------------------------------------------------------------------------
-- Normalizers: text, bytes that it may grow to -> text
---------------------------------------------------------------------------------------------------

-- Replacements of what replacements made grow without end; Unicode's own forms grow by 18 at most.
local GROWTH_MAX, GROWTH_FREE_BYTES = 64, 4096

local normalizers = {}
local function normalizer(step)
  local make = normalizers[step.type]
  return make and make(step) or refuse("a normalizer", step.type)
end
for _, form in ipairs({ "NFC", "NFD", "NFKC", "NFKD" }) do
  normalizers[form] = function() return function(text) return unicode.normalize(text, form) end end
end
function normalizers.Prepend(step)
  return function(text) return text == "" and text or step.prepend .. text end
end
function normalizers.Replace(step)
  local regex, content = compile(step.pattern), step.content
  return function(text, bytes_max)
    local parts, at, size = {}, 0, #text
    while at <= #text do
      local first, stop = regex:find(text, at)
      if not first or stop == first then break end
      parts[#parts + 1], parts[#parts + 2] = text:sub(at + 1, first), content
      size = size + #content - (stop - first)
      if size > bytes_max then
        error(("the normalizer makes more than %d bytes, %d times a text's own"):format(bytes_max, GROWTH_MAX), 0)
      end
      at = stop
    end
    if at == 0 then return text end
    parts[#parts + 1] = text:sub(at + 1)
    return table.concat(parts)
  end
end
function normalizers.Lowercase() return string.lower end
function normalizers.Strip(step)
  return function(text)
    if step.strip_left then text = text:gsub("^%s+", "") end
    if step.strip_right then text = text:gsub("%s+$", "") end
    return text
  end
end
function normalizers.Sequence(step)
  local steps = {}
  for i, inner in ipairs(step.normalizers or {}) do steps[i] = normalizer(inner) end
  return function(text, bytes_max)
    for _, apply in ipairs(steps) do text = apply(text, bytes_max) end
    return text
  end
end

---@return function|nil  text -> text; nil when there is nothing to do
function M.normalizer(step)
  if step == nil then return nil end
  local apply = normalizer(step)
  return function(text) return apply(text, GROWTH_MAX * #text + GROWTH_FREE_BYTES) end
end

---------------------------------------------------------------------------------------------------
-- Pre-tokenizers: (text, emit) calls emit(piece) in order
---------------------------------------------------------------------------------------------------

---Matches and what lies between them, joined as `behavior` says.
local function splitter(regex, behavior, invert)
  local function each(text, emit) -- emit(piece, is_match)
    local at, size = 0, #text
    local from = 0
    while from < size do
      local first, stop = regex:find(text, from)
      if not first then break end
      if stop == first then
        from = first + 1
      else
        if first > at then emit(text:sub(at + 1, first), invert) end
        emit(text:sub(first + 1, stop), not invert)
        at, from = stop, stop
      end
    end
    if at < size then emit(text:sub(at + 1), invert) end
  end
  if behavior == "Isolated" then return each end
  if behavior == "Removed" then
    return function(text, emit)
      each(text, function(piece, is_match)
        if not is_match then emit(piece) end
      end)
    end
  end
  if behavior == "MergedWithPrevious" or behavior == "MergedWithNext" or behavior == "Contiguous" then
    return function(text, emit)
      local held, held_match
      each(text, function(piece, is_match)
        local join = held and (behavior == "Contiguous" and held_match == is_match
          or behavior == "MergedWithPrevious" and is_match and not held_match
          or behavior == "MergedWithNext" and held_match and not is_match)
        if held and not join then emit(held) end
        held, held_match = join and held .. piece or piece, is_match
      end)
      if held then emit(held) end
    end
  end
  return refuse("a split", behavior)
end

---The pre-tokenizer that leaves a text whole.
function M.whole(text, emit) emit(text) end

local pre_tokenizers = {}
function pre_tokenizers.Split(step) return splitter(compile(step.pattern), step.behavior, step.invert == true) end
function pre_tokenizers.ByteLevel(step)
  local split = step.use_regex ~= false and splitter(compile({ Regex = GPT2 }), "Isolated", false)
  if not step.add_prefix_space then return split or M.whole end
  return function(text, emit)
    if step.add_prefix_space and text:sub(1, 1) ~= " " then text = " " .. text end
    if split then split(text, emit) else emit(text) end
  end
end
function pre_tokenizers.Digits(step)
  return splitter(compile({ Regex = step.individual_digits and "\\p{N}" or "\\p{N}+" }), "Isolated", false)
end
function pre_tokenizers.Punctuation(step)
  return splitter(compile({ Regex = "[\\p{P}$+<=>^`|~]" }), step.behavior or "Isolated", false)
end
function pre_tokenizers.WhitespaceSplit() return splitter(compile({ Regex = "\\s+" }), "Removed", false) end
function pre_tokenizers.Whitespace() return splitter(compile({ Regex = "\\w+|[^\\w\\s]+" }), "Removed", true) end
function pre_tokenizers.Metaspace(step)
  local mark = step.replacement or "\226\150\129"
  local written = mark:gsub("%%", "%%%%") -- as gsub wants a replacement
  local scheme = step.prepend_scheme or (step.add_prefix_space == false and "never" or "always")
  local split = step.split ~= false and splitter(compile({ String = mark }), "MergedWithNext", false)
  return function(text, emit, at_start)
    text = text:gsub(" ", written)
    local wanted = scheme == "always" or scheme == "first" and at_start
    if wanted and text:sub(1, #mark) ~= mark then text = mark .. text end
    if split then split(text, emit) else emit(text) end
  end
end
function pre_tokenizers.Sequence(step)
  local steps = {}
  for _, inner in ipairs(step.pretokenizers or {}) do
    local each = M.pre_tokenizer(inner)
    if each ~= M.whole then steps[#steps + 1] = each end
  end
  local function run(i, text, emit, at_start)
    if i > #steps then return emit(text) end
    local first = at_start
    steps[i](text, function(piece)
      run(i + 1, piece, emit, first)
      first = false
    end, at_start)
  end
  if #steps <= 1 then return steps[1] or M.whole end
  return function(text, emit, at_start) run(1, text, emit, at_start) end
end

---@return function  (text, emit, at_start): at_start says that the whole text begins here
function M.pre_tokenizer(step)
  if step == nil then return M.whole end
  local make = pre_tokenizers[step.type]
  return make and make(step) or refuse("a pre-tokenizer", step.type)
end

return M
