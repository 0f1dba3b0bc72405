---Choosing the next token from a row of scores (logits), on the host.
---
---The order and the definitions are those of Hugging Face's transformers; each works on what the one
---before left:
---
--- 1. repetition_penalty r: the score s of every token that the prompt or the text holds, however often,
---    becomes s / r where it is positive, else s r (arXiv 1909.05858).
--- 2. temperature t: s / t. At 0 the largest score is taken, the first of equals, and that is all.
--- 3. top_k: the k largest stay (arXiv 1805.04833); of equals the lower numbers.
--- 4. top_p: the fewest likeliest stay whose probabilities, among what is there, come to p
---    (arXiv 1904.09751).
--- 5. min_p: those stay that are at least min_p times as likely as the likeliest (arXiv 2407.01082).
--- 6. One of the rest is drawn in proportion to exp(s), with one uniform number of the sequence's own
---    stream: the same seed, the same draws, whatever the other sequences of a batch do.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local random = require("quartermoon.random")

local M = {}

---@class qm.models.Sampler
local Sampler = {}
Sampler.__index = Sampler

---The options and their defaults, all of which do nothing.
M.OPTIONS = { temperature = 1, top_k = check.optional, top_p = 1, min_p = 0, repetition_penalty = 1 }

---Raise unless the options make sense.
function M.check(name, options)
  check.number(name, "temperature", options.temperature, 0)
  if options.top_k then check.integer(name, "top_k", options.top_k, 1) end
  check.number(name, "top_p", options.top_p, 0, 1)
  check.number(name, "min_p", options.min_p, 0, 1)
  if check.number(name, "repetition_penalty", options.repetition_penalty, 0) == 0 then
    check.fail(name, "repetition_penalty", "a number above 0", 0)
  end
end

---Whether the largest score is the answer, which a device finds itself.
function M.takes_largest(options) return options.temperature == 0 and options.repetition_penalty == 1 end

---@param options table     checked, of OPTIONS
---@param seed integer      0 .. 2^32 - 1
---@param prompt integer[]  tokens that count as said
function M.new(options, seed, prompt)
  local self = setmetatable({ options = options, generator = random.generator(seed), said = {}, is_said = {} }, Sampler)
  for _, token in ipairs(prompt) do self:note(token) end
  return self
end

---A token was said.
function Sampler:note(token)
  if self.is_said[token] then return end
  self.is_said[token], self.said[#self.said + 1] = true, token
end

---The k tokens of the largest scores, largest first; of equals the lower number. Most scores fall to
---the first comparison, which spares sorting a whole vocabulary for every token.
local function best(scores, count, k)
  local tokens, size = {}, 0
  local least = -math.huge
  for token = 0, count - 1 do
    local score = scores[token]
    if size < k or score > least then
      if size < k then size = size + 1 end
      local at = size
      while at > 1 and score > scores[tokens[at - 1]] do
        tokens[at] = tokens[at - 1]
        at = at - 1
      end
      tokens[at] = token
      least = scores[tokens[size]]
    end
  end
  return tokens
end

---Tokens whose scores are at least `least`, largest first.
local function sorted_from(scores, count, least)
  local tokens, size = {}, 0
  for token = 0, count - 1 do
    if scores[token] >= least then
      size = size + 1
      tokens[size] = token
    end
  end
  table.sort(tokens, function(a, b)
    local x, y = scores[a], scores[b]
    if x ~= y then return x > y end
    return a < b
  end)
  return tokens
end

local weights, weights_room = nil, 0 -- of a whole vocabulary, for as long as a draw takes

---exp((score - most) / temperature) of every token. @return number total
local function weigh_all(scores, count, most, temperature)
  if weights_room < count then weights, weights_room = ffi.new("double[?]", count), count end
  local total, out = 0, weights
  for token = 0, count - 1 do
    local weight = math.exp((scores[token] - most) / temperature)
    out[token] = weight
    total = total + weight
  end
  return total
end

-- Likely tokens are few: to sort them all is the last resort.
local FLOORS = { 1e-3, 1e-6, 0 }
local INSERTED_MAX = 256 -- for more, sorting is faster

---The likeliest tokens, largest first: top_k of them, or as many as top_p of the total asks for.
local function likeliest(scores, count, most, options, total)
  local k, t = options.top_k, options.temperature
  if k and k <= INSERTED_MAX then return best(scores, count, k) end
  for _, floor in ipairs(FLOORS) do
    local tokens = sorted_from(scores, count, floor == 0 and -math.huge or most + t * math.log(floor))
    local enough = k and #tokens >= k
    if not k then
      local mass = 0
      for i = 1, #tokens do mass = mass + weights[tokens[i]] end
      enough = mass >= options.top_p * total
    end
    if enough or floor == 0 then
      for i = #tokens, (k or #tokens) + 1, -1 do tokens[i] = nil end
      return tokens
    end
  end
end

---Draw among all that are at least min_p as likely as the likeliest.
local function draw_any(count, min_p, total, uniform)
  if min_p > 0 then
    total = 0
    for token = 0, count - 1 do
      if weights[token] >= min_p then total = total + weights[token] end
    end
  end
  local left, last = uniform * total, nil
  for token = 0, count - 1 do
    local weight = weights[token]
    if weight > 0 and weight >= min_p then
      left, last = left - weight, token
      if left < 0 then return token end
    end
  end
  return last -- rounding left a little
end

---Draw among the likeliest, given largest first.
local function draw_first(scores, tokens, most, options, all, uniform)
  local own, sum = {}, 0
  for i = 1, #tokens do
    own[i] = math.exp((scores[tokens[i]] - most) / options.temperature)
    sum = sum + own[i]
  end
  local wanted, size, total = options.top_p * (options.top_k and sum or all), 0, 0
  repeat
    size = size + 1
    total = total + own[size]
  until total >= wanted or size == #tokens
  while size > 1 and own[size] < options.min_p do
    total = total - own[size]
    size = size - 1
  end
  local left = uniform * total
  for i = 1, size do
    left = left - own[i]
    if left < 0 then return tokens[i] end
  end
  return tokens[size]
end

---Choose a token.
---@param scores ffi.cdata*  f32 [count] in host memory; the penalty changes it
---@param count integer
---@return integer token
---@raise when scores are NaN or none is finite
function Sampler:pick(scores, count)
  local options = self.options
  local penalty, t = options.repetition_penalty, options.temperature
  if penalty ~= 1 then
    for _, token in ipairs(self.said) do
      local score = scores[token]
      scores[token] = score > 0 and score / penalty or score * penalty
    end
  end
  local most, at, is_sound = -math.huge, nil, true
  for token = 0, count - 1 do
    local score = scores[token]
    if score > most then most, at = score, token end
    is_sound = is_sound and score == score
  end
  if not is_sound or not at or most == math.huge then
    binding.raise("model:generate: the scores of the next token are not numbers: the model's weights or its "
      .. "activations overflowed")
  end
  if t == 0 then return at end
  local k = options.top_k and options.top_k < count and options.top_k
  if not k and options.top_p == 1 then
    return draw_any(count, options.min_p, weigh_all(scores, count, most, t), self.generator:number())
  end
  local settings = { temperature = t, top_k = k or nil, top_p = options.top_p, min_p = options.min_p }
  local total = not k and weigh_all(scores, count, most, t) or nil
  local tokens = likeliest(scores, count, most, settings, total)
  return draw_first(scores, tokens, most, settings, total, self.generator:number())
end

check.methods("qm.models.Sampler", Sampler)

return M
