---Conversations as tokens: the chat formats of the common model families, and which tokens to learn.
---
---    local ids, learn = qm.chat.encode(tokenizer, {
---      { role = "user", content = "How many moons?" }, { role = "assistant", content = "One." } })
---
---A format is a Lua function from messages to parts; what a model folder brings as a template is never
---executed. Content is text and nothing else: special tokens in it stay words.

local check = require("quartermoon.check")
local Tokenizer = require("quartermoon.tokenizer.base")
local tensors = require("quartermoon.tensor")

local M = {}

local ROLES = { system = true, user = true, assistant = true, tool = true }

local function check_messages(name, messages)
  for i, message in ipairs(check.type(name, "messages", messages, "table")) do
    local at = ("messages[%d]"):format(i)
    check.type(name, at, message, "table")
    if not ROLES[message.role] then check.fail(name, at .. ".role", "system, user, assistant or tool", message.role) end
    check.type(name, at .. ".content", message.content, "string")
  end
end

-- A part is { special = word } or { text = ..., learn = true|nil }; texts side by side are one text,
-- but that what is learnt begins a part of its own, as it does when the model generates it.

---<|im_start|>role\ncontent<|im_end|>\n: Qwen, and many that are tuned after OpenAI's ChatML.
local function chatml(messages, prompt)
  check_messages("qm.chat.formats.chatml", messages)
  local parts = {}
  for _, message in ipairs(messages) do
    local learn = message.role == "assistant" or nil
    parts[#parts + 1] = { special = "<|im_start|>" }
    if learn then
      parts[#parts + 1] = { text = "assistant\n" }
      parts[#parts + 1] = { text = message.content, learn = true }
    else
      parts[#parts + 1] = { text = message.role .. "\n" .. message.content }
    end
    parts[#parts + 1] = { special = "<|im_end|>", learn = learn }
    parts[#parts + 1] = { text = "\n" }
  end
  if prompt then
    parts[#parts + 1] = { special = "<|im_start|>" }
    parts[#parts + 1] = { text = "assistant\n" }
  end
  return parts
end

---Llama 3: <|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|>, behind <|begin_of_text|>.
local function llama3(messages, prompt)
  check_messages("qm.chat.formats.llama3", messages)
  local parts = { { special = "<|begin_of_text|>" } }
  local function header(role)
    parts[#parts + 1] = { special = "<|start_header_id|>" }
    parts[#parts + 1] = { text = role }
    parts[#parts + 1] = { special = "<|end_header_id|>" }
  end
  for _, message in ipairs(messages) do
    local learn, content = message.role == "assistant" or nil, message.content:match("^%s*(.-)%s*$")
    header(message.role)
    if learn then
      parts[#parts + 1] = { text = "\n\n" }
      parts[#parts + 1] = { text = content, learn = true }
    else
      parts[#parts + 1] = { text = "\n\n" .. content }
    end
    parts[#parts + 1] = { special = "<|eot_id|>", learn = learn }
  end
  if prompt then
    header("assistant")
    parts[#parts + 1] = { text = "\n\n" }
  end
  return parts
end

---[INST] question [/INST] answer</s>, the system's words before the first question: Llama 2 between
---<<SYS>> marks, Mistral as a paragraph.
local function instructions(name, opening, closing, each_begins)
  name = "qm.chat.formats." .. name
  return function(messages)
    check_messages(name, messages)
    local parts, system = {}, ""
    for i, message in ipairs(messages) do
      if message.role == "system" then
        if i > 1 then check.fail(name, "messages", "a system message only in the first place", i) end
        system = opening .. message.content .. closing
      elseif message.role == "user" then
        if #parts == 0 or each_begins then parts[#parts + 1] = { special = "<s>" } end
        parts[#parts + 1] = { text = "[INST] " .. system .. message.content:match("^%s*(.-)%s*$") .. " [/INST]" }
        system = ""
      elseif message.role == "assistant" then
        if #parts == 0 then check.fail(name, "messages", "a question before each answer", message.role) end
        parts[#parts + 1] = { text = " " .. message.content:match("^%s*(.-)%s*$"), learn = true }
        parts[#parts + 1] = { special = "</s>", learn = true }
      else
        check.fail(name, "messages", "the roles system, user and assistant", message.role)
      end
    end
    return parts
  end
end

---Formats by name; add your own: function(messages, prompt) -> parts.
---@type table<string, function>
M.formats = { chatml = chatml, llama3 = llama3, llama2 = instructions("llama2", "<<SYS>>\n", "\n<</SYS>>\n\n", true),
  mistral = instructions("mistral", "", "\n\n", false) }

---The format that a tokenizer's special tokens speak of, or nil.
---@param tokenizer qm.Tokenizer
---@return string|nil
function M.format_of(tokenizer)
  check.instance("qm.chat.format_of", "tokenizer", tokenizer, Tokenizer, "qm.Tokenizer")
  if tokenizer:special("<|im_start|>") then return "chatml" end
  if tokenizer:special("<|start_header_id|>") then return "llama3" end
  if tokenizer:special("[INST]") then return "mistral" end
  if tokenizer:special("<s>") and tokenizer:special("</s>") then return "llama2" end
end

local function parts_of(name, tokenizer, messages, options)
  check.instance(name, "tokenizer", tokenizer, Tokenizer, "qm.Tokenizer")
  local format = options.format or M.format_of(tokenizer)
  if not format then check.fail(name, "format", "a format: this tokenizer has none of the known marks", nil) end
  local build = type(format) == "function" and format or M.formats[format]
  if not build then
    local known = {}
    for key in pairs(M.formats) do known[#known + 1] = key end
    table.sort(known)
    check.fail(name, "format", table.concat(known, ", ") .. ", or a function", format)
  end
  return build(messages, options.prompt)
end

local OPTIONS = { format = check.optional, prompt = false }

---A conversation as token ids.
---@param tokenizer qm.Tokenizer
---@param messages table[]    { role = "system"|"user"|"assistant"|"tool", content = text } in order
---@param options table|nil   format: a name in qm.chat.formats or a function, by default what the
---  tokenizer's special tokens say; prompt = false: end where the assistant is to begin
---@return integer[] ids
---@return boolean[] learn    true for the tokens of the assistant's own words and its end of turn
function M.encode(tokenizer, messages, options)
  local name = "qm.chat.encode"
  options = check.options(name, options, OPTIONS)
  local ids, learn, after_text = {}, {}, false
  for _, part in ipairs(parts_of(name, tokenizer, messages, options)) do
    local list
    if part.special then
      local id = tokenizer:special(part.special)
      if not id then check.fail(name, "tokenizer", "one with the special token " .. part.special, tokenizer) end
      list = { id }
    else
      list = tokenizer:ids(part.text, { add_special = false, parse_special = false, continued = after_text,
        after_special = not after_text })
    end
    after_text = not part.special
    for _, id in ipairs(list) do
      ids[#ids + 1] = id
      learn[#ids] = part.learn == true
    end
  end
  return ids, learn
end

---The same conversation as text, for the eye.
---@return string
function M.text(tokenizer, messages, options)
  options = check.options("qm.chat.text", options, OPTIONS)
  local words = {}
  for i, part in ipairs(parts_of("qm.chat.text", tokenizer, messages, options)) do
    words[i] = part.special or part.text
  end
  return table.concat(words)
end

---What a training step needs of such lists: each token's successor, where it is to be learnt.
---@param ids integer[]
---@param learn boolean[]
---@param options table|nil  ignore_index = -100, device = default
---@return qm.Tensor tokens   i32 [#ids - 1]
---@return qm.Tensor targets  i32 [#ids - 1]: the next token, or ignore_index
function M.targets(ids, learn, options)
  local name = "qm.chat.targets"
  options = check.options(name, options, { ignore_index = -100, device = check.optional })
  check.type(name, "ids", ids, "table")
  check.type(name, "learn", learn, "table")
  if #ids < 2 then check.fail(name, "ids", "at least 2 tokens", #ids) end
  local tokens, targets = {}, {}
  for i = 1, #ids - 1 do tokens[i], targets[i] = ids[i], learn[i + 1] and ids[i + 1] or options.ignore_index end
  local made = { dtype = "i32", device = options.device }
  return tensors.tensor(tokens, made), tensors.tensor(targets, made)
end

return M
