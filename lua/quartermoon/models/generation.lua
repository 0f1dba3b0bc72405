---Generating text with any decoder: many texts at once, each in a place of its own in the cache. Every
---step takes the rows that are due, parts of prompts and last tokens alike, and a text that ends makes
---room for the next.

local check = require("quartermoon.check")
local graph = require("quartermoon.graph")
local samplers = require("quartermoon.models.sampler")
local stop_text = require("quartermoon.models.stop_text")
local tensors = require("quartermoon.tensor")
local qm = require("quartermoon")

local M = {}

local OPTIONS = { max_tokens = 100, seed = 0, stop = check.optional, tokenizer = check.optional,
  on_token = check.optional, on_text = check.optional, batch = 16, prefill_rows = 2048,
  record = check.optional }
for key, default in pairs(samplers.OPTIONS) do OPTIONS[key] = default end

---------------------------------------------------------------------------------------------------
-- What the caller wants
---------------------------------------------------------------------------------------------------

---Stop tokens as a set, stop strings as a list.
local function read_stop(name, options)
  local ids, strings = {}, {}
  local stop = options.stop
  if type(stop) ~= "table" then stop = { stop } end
  for _, one in ipairs(stop) do
    if type(one) == "string" then
      if one == "" then check.fail(name, "stop", "strings that are not empty", one) end
      if not options.tokenizer then check.fail(name, "tokenizer", "the tokenizer, for stop strings", nil) end
      strings[#strings + 1] = one
    else
      ids[check.integer(name, "stop", one, 0)] = true
    end
  end
  return ids, strings
end

local function check_options(name, options)
  options = check.options(name, options, OPTIONS)
  samplers.check(name, options)
  check.integer(name, "max_tokens", options.max_tokens, 0)
  check.integer(name, "seed", options.seed, 0, 2 ^ 32 - 1)
  check.integer(name, "batch", options.batch, 1)
  check.integer(name, "prefill_rows", options.prefill_rows, 1)
  if options.record ~= nil then check.type(name, "record", options.record, "boolean") end
  for _, key in ipairs({ "on_token", "on_text" }) do
    if options[key] then check.type(name, key, options[key], "function") end
  end
  if options.tokenizer and type(options.tokenizer) ~= "table" then
    check.fail(name, "tokenizer", "a qm.Tokenizer", options.tokenizer)
  end
  if options.on_text and not options.tokenizer then
    check.fail(name, "tokenizer", "the tokenizer, for on_text", nil)
  end
  options.stop_ids, options.stop_strings = read_stop(name, options)
  return options
end

---A prompt as a list of token numbers.
local function read_prompt(name, prompt, tokenizer)
  if type(prompt) == "string" and tokenizer then prompt = tokenizer:ids(prompt) end
  if check.is_tensor(prompt) then prompt = prompt:totable() end
  check.type(name, "prompt", prompt, "table")
  if #prompt == 0 then check.fail(name, "prompt", "at least one token", prompt) end
  for i = 1, #prompt do check.integer(name, "prompt", prompt[i], 0, 2 ^ 31 - 1) end
  return prompt
end

---Several prompts, rather than one?
local function is_batch(prompt)
  return type(prompt) == "table" and not check.is_tensor(prompt) and prompt[1] ~= nil and type(prompt[1]) ~= "number"
end

---------------------------------------------------------------------------------------------------
-- One text
---------------------------------------------------------------------------------------------------

---@class qm.models.Text
---@field due integer[]  tokens that the model has not seen, from `at` on
---@field made integer[]
local Text = {}
Text.__index = Text

local function new_text(self, name, number, prompt, options)
  if #prompt > self.positions_max then
    check.fail(name, "prompt", ("at most %d tokens, the model's positions"):format(self.positions_max), #prompt)
  end
  local text = setmetatable({ number = number, due = prompt, at = 1, made = {}, prompt = #prompt, options = options },
    Text)
  text.steps = math.min(options.max_tokens, self.positions_max - #prompt)
  text.sampler = samplers.new(options, (options.seed + number - 1) % 2 ^ 32, prompt)
  text.reason = text.steps < 1 and "length" or nil
  if options.tokenizer then
    text.stream, text.stop = options.tokenizer:stream(), stop_text.new(options.stop_strings)
    text.parts = {}
  end
  return text
end

function Text:say(words)
  if words == "" then return end
  self.parts[#self.parts + 1] = words
  if self.options.on_text then self.options.on_text(words, self.number) end
end

function Text:finish(reason)
  self.reason = reason
  if not self.stream then return end
  local words, stopped = self.stop:push(self.stream:finish())
  self:say(words)
  if not stopped then self:say(self.stop:finish()) end
end

---The model's next token.
function Text:take(token)
  local options = self.options
  if options.stop_ids[token] then return self:finish("stop") end
  self.made[#self.made + 1] = token
  self.due, self.at = { token }, 1
  self.sampler:note(token)
  if options.on_token then options.on_token(token, self.number) end
  if self.stream then
    local words, stopped = self.stop:push(self.stream:push(token))
    self:say(words)
    if stopped then
      self.reason = "stop"
      return
    end
  end
  if #self.made == self.steps then self:finish("length") end
end

---------------------------------------------------------------------------------------------------
-- All of them
---------------------------------------------------------------------------------------------------

---Put waiting texts into places that are free.
local function fill_places(places, waiting, cache)
  for s = 1, cache.sequences do
    if not places[s] or places[s].reason then
      places[s] = nil
      if waiting.next <= #waiting then
        places[s], waiting.next = waiting[waiting.next], waiting.next + 1
        cache:cut(s)
      end
    end
  end
end

---The rows of the next step: every text's last token, and of prompts as much as a step takes.
---@return integer[] counts  of each place
---@return integer[] tokens
---@return boolean is_single no place has more than one
local function next_rows(places, cache, prefill_rows)
  local counts, tokens, left, is_single = {}, {}, prefill_rows, true
  for s = 1, cache.sequences do
    local text, count = places[s], 0
    if text then
      count = #text.due - text.at + 1
      if count > 1 then
        count = math.min(count, left)
        left = left - count
      end
      for i = text.at, text.at + count - 1 do tokens[#tokens + 1] = text.due[i] end
      is_single = is_single and count <= 1
    end
    counts[s] = count
  end
  return counts, tokens, is_single
end

---What a step runs on the device; steps of one row for each text are recorded where that saves launches.
---@return function step, function release
local function stepper(self, cache, decode, largest, records)
  local graphs = {}
  ---Scores or, where that is all that is asked for, the largest's numbers.
  local function body(plan, sizes)
    return qm.no_grad(qm.scope, function()
      local logits = decode(self, cache, plan, sizes)
      if largest then return logits:argmax(2) end
      return logits.dtype == "f32" and logits or logits:to("f32")
    end)
  end
  return function(plan, sizes, is_single)
    if not (is_single and records) then return body(plan, sizes) end
    if not graphs[sizes.rows] then
      graphs[sizes.rows] = graph.graph(function(given) return body(given, sizes) end, { device = self.device })
    end
    return graphs[sizes.rows](plan)
  end, function()
    for _, recorded in pairs(graphs) do recorded:free() end
  end
end

---Read a step's results into host memory that is used again and again.
local function reader()
  local buffer, room, dtype = nil, 0, nil
  return function(result)
    local count = result:count()
    if room < count or dtype ~= result.dtype then
      buffer, room, dtype = tensors.host_buffer(result.dtype, count), count, result.dtype
    end
    local flat = result:view_as("model:generate", { count })
    flat:read_elements(1, count, buffer)
    flat:free()
    return buffer
  end
end

---One step. @return boolean  false when nothing is left to do
local function advance(run)
  local places, cache = run.places, run.cache
  fill_places(places, run.waiting, cache)
  local counts, tokens, is_single = next_rows(places, cache, run.options.prefill_rows)
  if #tokens == 0 then return false end
  local plan, sizes = cache:plan("model:generate", counts, tokens)
  local result = run.step(plan, sizes, is_single)
  plan:free()
  local values = run.read(result)
  local columns, row = result.shape[2] or 1, 0
  result:free()
  cache:advance(counts)
  for s = 1, cache.sequences do
    local text = places[s]
    if counts[s] > 0 then
      text.at = text.at + counts[s]
      if text.at > #text.due then
        text:take(run.largest and values[row] or text.sampler:pick(values + row * columns, columns))
      end
      row = row + 1
    end
  end
  return true
end

---Continue every text to its end.
local function run_all(self, decode, texts, options)
  local waiting, rows = { next = 1 }, 0
  for _, text in ipairs(texts) do
    if not text.reason then
      waiting[#waiting + 1] = text
      rows = math.max(rows, text.prompt + text.steps)
    end
  end
  if #waiting == 0 then return end
  local cache = self:cache(rows, math.min(#waiting, options.batch))
  local largest = samplers.takes_largest(options)
  local records = options.record
  if records == nil then records = self.device.name == "cuda" end
  local step, release = stepper(self, cache, decode, largest, records)
  local run = { options = options, waiting = waiting, cache = cache, places = {}, read = reader(), step = step,
    largest = largest }
  local ok, problem = pcall(function()
    repeat until not advance(run)
  end)
  release()
  cache:free()
  if not ok then error(problem, 0) end
end

---The method `generate` of decoders, which says what it does.
---@param decode function  (model, cache, plan, sizes) -> logits [W, vocab_size]
function M.generate(self, decode, prompt, options)
  local name = "model:generate"
  options = check_options(name, options)
  local several = is_batch(prompt)
  local texts = {}
  for i, one in ipairs(several and prompt or { prompt }) do
    texts[i] = new_text(self, name, i, read_prompt(name, one, options.tokenizer), options)
  end
  if not several and not texts[1] then check.fail(name, "prompt", "at least one token", prompt) end
  run_all(self, decode, texts, options)
  local made, infos = {}, {}
  for i, text in ipairs(texts) do
    made[i] = text.made
    infos[i] = { reason = text.reason, text = text.parts and table.concat(text.parts) }
  end
  if several then return made, infos end
  return made[1], infos[1]
end

check.methods("qm.models.Text", Text)

return M
