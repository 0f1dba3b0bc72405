---The command line of a script: declared options with types, defaults and help.
---
---    local o = qm.options.parse(arg, {
---      name = "scripts/train_lm.lua",
---      about = "Train a small language model on a text.",
---      arguments = { { "text", nil, "the text to learn" } },
---      { "steps", 1500, "optimizer steps" },
---      { "lr", 3e-3, "peak learning rate", min = 0 },
---      { "dtype", "bf16", "type of the activations", choices = { "f32", "bf16" } },
---      { "resume", false, "continue from the checkpoint" },
---      { "group-size", 64, "weights that share a scale", value = "WEIGHTS" },
---    })
---    o.steps, o.text, o.resume, o.group_size ...
---
---An option is { name, default, help }, then what else there is to say: type, choices, min, max, value
---(its stand-in on the help page), required. Its type is that of the default. A whole default makes a
---whole number of it, but for 0 and 1, beside which a fraction makes sense: type = "integer" or
---"number" says so outright. An argument is the same, and needed unless it has a default.

local check = require("quartermoon.check")

local M = {}

local WIDTH = 100

---A name as it is typed: group_size is --group-size.
local function typed(name) return "--" .. name:gsub("_", "-") end

local POSITIONS = { "name", "default", "help" }
local DECLARED = { name = check.required, help = check.required, default = check.optional, type = check.optional,
  choices = check.optional, min = check.optional, max = check.optional, required = false, value = check.optional }

---The option's declaration, complete. The type is told by the default where it is not given.
local function complete(name, given)
  local named = {}
  for key, value in pairs(check.type(name, "declaration", given, "table")) do
    named[POSITIONS[key] or key] = value
  end
  local option = check.options(name, named, DECLARED)
  option.name = check.type(name, "name", option.name, "string"):gsub("-", "_")
  check.type(name, "help", option.help, "string")
  local default = option.default
  option.type = option.type or type(default) == "boolean" and "flag" or type(default) == "string" and "string"
    or type(default) == "number" and (default % 1 == 0 and math.abs(default) > 1 and "integer" or "number") or "string"
  check.one_of(name, option.name .. ".type", option.type, { "flag", "string", "integer", "number" })
  if option.choices then check.type(name, option.name .. ".choices", option.choices, "table") end
  for _, key in ipairs({ "min", "max" }) do
    if option[key] then check.number(name, option.name .. "." .. key, option[key]) end
  end
  if option.value then check.type(name, option.name .. ".value", option.value, "string") end
  if option.type == "flag" and default == nil then option.default = false end
  return option
end

local function declare(name, declaration)
  local declared = { list = {}, by_name = {}, names = {}, arguments = {} }
  for _, given in ipairs(check.type(name, "declaration", declaration, "table")) do
    local option = complete(name, given)
    if declared.by_name[option.name] then check.fail(name, "declaration", "different names", option.name) end
    declared.list[#declared.list + 1], declared.by_name[option.name] = option, option
    declared.names[#declared.names + 1] = typed(option.name)
    if option.type == "flag" then declared.names[#declared.names + 1] = typed("no_" .. option.name) end
  end
  declared.names[#declared.names + 1] = "--help"
  local arguments = check.type(name, "arguments", declaration.arguments or {}, "table")
  for i, given in ipairs(arguments) do declared.arguments[i] = complete(name, given) end
  return declared
end

---A word as the value of an option; nil and what was expected where it is none.
local function convert(option, word)
  if option.type == "flag" then
    if word == "true" or word == "false" then return word == "true" end
    return nil, "true or false"
  elseif option.type == "string" then
    for _, choice in ipairs(option.choices or {}) do if word == choice then return word end end
    if not option.choices then return word end
    return nil, "one of " .. table.concat(option.choices, ", ")
  end
  local value, kind = tonumber(word), option.type == "integer" and "a whole number" or "a number"
  if option.min and option.max then
    kind = ("%s from %s to %s"):format(kind, option.min, option.max)
  elseif option.min or option.max then
    kind = ("%s of at %s %s"):format(kind, option.min and "least" or "most", option.min or option.max)
  end
  if not value or value ~= value or math.abs(value) == math.huge or (option.type == "integer" and value % 1 ~= 0)
      or (option.min and value < option.min) or (option.max and value > option.max) then
    return nil, kind
  end
  for _, choice in ipairs(option.choices or {}) do if value == choice then return value end end
  if not option.choices then return value end
  local words = {}
  for i, choice in ipairs(option.choices) do words[i] = tostring(choice) end
  return nil, "one of " .. table.concat(words, ", ")
end

---Which option a word like --no-resume means, and whether it says no.
local function find(declared, word)
  local key = word:gsub("-", "_")
  if declared.by_name[key] then return declared.by_name[key] end
  local plain = key:match("^no_(.*)$")
  local option = plain and declared.by_name[plain]
  if option and option.type == "flag" then return option, true end
end

local function read_words(declared, words, values)
  for _, word in ipairs(words) do check.type("qm.options.read", "words", word, "string") end
  local i, only_arguments, count = 1, false, 0
  while words[i] do
    local word = words[i]
    if only_arguments or word:sub(1, 1) ~= "-" or word == "-" or tonumber(word) then
      count = count + 1
      local argument = declared.arguments[count]
      if not argument then return nil, ("one argument too many: '%s'"):format(word) end
      local value, expected = convert(argument, word)
      if value == nil then return nil, ("%s: expected %s, got '%s'"):format(argument.name, expected, word) end
      values[argument.name] = value
    elseif word == "--" then
      only_arguments = true
    elseif word == "--help" or word == "-h" then
      return nil, "help"
    else
      local name, text = word:match("^%-%-([^=]+)=(.*)$")
      name = name or word:match("^%-%-(.+)$") or ""
      local option, negated = find(declared, name)
      if not option then
        local near = #name > 1 and check.nearest("--" .. name, declared.names)
        return nil, ("unknown option '%s'%s"):format(word:match("^[^=]*"),
          near and ", did you mean " .. near .. "?" or "")
      end
      local value, expected
      if option.type == "flag" and not text then
        value = not negated
      elseif negated then
        return nil, ("%s takes no value"):format(word:match("^[^=]*"))
      else
        if not text then
          i = i + 1
          text = words[i]
          if not text or (text:sub(1, 2) == "--") then return nil, typed(option.name) .. " needs a value" end
        end
        value, expected = convert(option, text)
        if value == nil then return nil, ("%s: expected %s, got '%s'"):format(typed(option.name), expected, text) end
      end
      values[option.name] = value
    end
    i = i + 1
  end
  return values
end

---Read the words of a command line.
---@param words string[]
---@param declaration table  see the top of this file
---@return table|nil values, string|nil reason  nil and "help", or nil and what is wrong
function M.read(words, declaration)
  local name = "qm.options.read"
  local declared = declare(name, declaration)
  for i, word in ipairs(check.type(name, "words", words, "table")) do
    check.type(name, "words[" .. i .. "]", word, "string")
  end
  local values, reason = read_words(declared, words, {})
  if not values then return nil, reason end
  for _, option in ipairs(declared.list) do
    if values[option.name] == nil then values[option.name] = option.default end
    if option.required and values[option.name] == nil then return nil, typed(option.name) .. " is needed" end
  end
  for _, argument in ipairs(declared.arguments) do
    if values[argument.name] == nil then values[argument.name] = argument.default end
    if values[argument.name] == nil then return nil, argument.name:upper() .. " is needed" end
  end
  return values
end

---A paragraph in lines that begin at column `indent` and end before column WIDTH.
local function wrap(text, indent)
  local lines, line = {}, ""
  for word in text:gmatch("%S+") do
    if #line > 0 and indent + #line + 1 + #word > WIDTH then
      lines[#lines + 1], line = line, word
    else
      line = #line > 0 and line .. " " .. word or word
    end
  end
  lines[#lines + 1] = line
  return table.concat(lines, "\n" .. (" "):rep(indent))
end

local function left_column(option)
  if option.type == "flag" then return (option.default and "--no-" or "--") .. option.name:gsub("_", "-") end
  local kinds = { string = "TEXT", integer = "N", number = "X" }
  return typed(option.name) .. " " .. (option.value or kinds[option.type])
end

local function right_column(option)
  local text = option.help
  if option.choices then
    local words = {}
    for i, choice in ipairs(option.choices) do words[i] = tostring(choice) end
    text = text .. ": " .. table.concat(words, ", ")
  end
  if option.required then return text .. " (needed)" end
  if option.default == nil or option.default == "" or option.type == "flag" then return text end
  return ("%s (default %s)"):format(text, tostring(option.default))
end

---The help of a declaration, its columns aligned.
---@return string
function M.help(declaration)
  local name = "qm.options.help"
  local declared = declare(name, declaration)
  if declaration.name then check.type(name, "name", declaration.name, "string") end
  if declaration.about then check.type(name, "about", declaration.about, "string") end
  local out, rows = {}, {}
  local usage = { "usage: " .. (declaration.name or "script"), "[options]" }
  for _, argument in ipairs(declared.arguments) do
    local word = argument.name:upper()
    usage[#usage + 1] = argument.default == nil and word or "[" .. word .. "]"
  end
  out[1] = table.concat(usage, " ") .. "\n"
  if declaration.about then out[2] = "\n" .. wrap(declaration.about, 0) .. "\n" end
  for _, argument in ipairs(declared.arguments) do
    rows[#rows + 1] = { argument.name:upper(), right_column(argument) }
  end
  local first_option = #rows + 1
  for _, option in ipairs(declared.list) do rows[#rows + 1] = { left_column(option), right_column(option) } end
  rows[#rows + 1] = { "-h, --help", "this page" }
  local wide = 0
  for _, row in ipairs(rows) do wide = math.max(wide, #row[1]) end
  for i, row in ipairs(rows) do
    if i == 1 and first_option > 1 then out[#out + 1] = "\narguments:\n" end
    if i == first_option then out[#out + 1] = "\noptions:\n" end
    out[#out + 1] = ("  %-" .. wide .. "s  %s\n"):format(row[1], wrap(row[2], wide + 4))
  end
  return table.concat(out)
end

---Read the command line of a script. --help prints the help and ends the program; a mistake is
---printed and ends it with status 2.
---@param words string[]     the script's `arg`
---@param declaration table  see the top of this file
---@return table values
function M.parse(words, declaration)
  local values, reason = M.read(words, declaration)
  if values then return values end
  if reason == "help" then
    io.stdout:write(M.help(declaration))
    io.stdout:flush()
    os.exit(0)
  end
  io.stderr:write(("%s: %s\n--help tells what there is.\n"):format(declaration.name or "script", reason))
  os.exit(2)
end

return M
