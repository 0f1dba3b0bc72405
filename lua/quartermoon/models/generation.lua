---Generating text with any model that has `cache(rows_max)` and `next_logits(tokens, cache)`.

local check = require("quartermoon.check")
local qm = require("quartermoon")

local M = {}

---The k tokens of the largest scores, largest first; of equals the lower number. Most scores fall to
---the first comparison, which spares sorting a whole vocabulary for every token.
local function best(scores, count, k)
  local tokens = {}
  for token = 0, count - 1 do
    local score = scores[token]
    if #tokens < k or score > scores[tokens[k]] then
      local at = math.min(#tokens + 1, k)
      while at > 1 and score > scores[tokens[at - 1]] do
        tokens[at] = tokens[at - 1]
        at = at - 1
      end
      tokens[at] = token
    end
  end
  return tokens
end

---Draw one token from scores: the largest at temperature 0, else in proportion to
---exp(score / temperature) among the top_k largest.
local function draw(scores, count, options, generator)
  if options.temperature == 0 then return best(scores, count, 1)[1] end
  local tokens = options.top_k and options.top_k < count and best(scores, count, options.top_k)
  local choices, largest = tokens and #tokens or count, -math.huge
  local function token_of(i) return tokens and tokens[i] or i - 1 end
  for i = 1, choices do largest = math.max(largest, scores[token_of(i)]) end
  local total, weights = 0, {}
  for i = 1, choices do
    weights[i] = math.exp((scores[token_of(i)] - largest) / options.temperature)
    total = total + weights[i]
  end
  local left = generator:number() * total
  for i = 1, choices do
    left = left - weights[i]
    if left < 0 then return token_of(i) end
  end
  return token_of(choices)
end

---Continue a text.
---@param prompt integer[]|qm.Tensor  token numbers, at least one
---@param options table|nil  { max_tokens = 100, temperature = 1 (0: always the likeliest), top_k = all,
---   seed = 0, stop = token number or nil, on_token = function(token) or nil }
---@return integer[]  the new tokens, without the prompt; ends before a `stop`
function M.generate(self, prompt, options)
  local name = "model:generate"
  options = check.options(name, options, { max_tokens = 100, temperature = 1, top_k = check.optional, seed = 0,
    stop = check.optional, on_token = check.optional })
  check.number(name, "temperature", options.temperature, 0)
  if options.top_k then check.integer(name, "top_k", options.top_k, 1) end
  if options.on_token then check.type(name, "on_token", options.on_token, "function") end
  if check.is_tensor(prompt) then prompt = prompt:totable() end
  check.type(name, "prompt", prompt, "table")
  if #prompt == 0 then check.fail(name, "prompt", "at least one token", prompt) end
  local room = self.positions_max - #prompt
  local steps = math.min(check.integer(name, "max_tokens", options.max_tokens, 0), room)
  local generator, made, fresh = qm.generator(options.seed), {}, prompt
  if steps < 1 then return made end
  local cache = self:cache(#prompt + steps)
  local ok, problem = pcall(function()
    for i = 1, steps do
      local tokens = qm.tensor(fresh, { dtype = "i32", device = self.device })
      local logits = self:next_logits(tokens, cache)
      local scores, count = logits:host()
      tokens:free()
      logits:free()
      local token = draw(scores, count, options, generator)
      if token == options.stop then break end
      made[i], fresh = token, { token }
      if options.on_token then options.on_token(token) end
    end
  end)
  for _, kept in ipairs(cache) do kept:free() end
  if not ok then error(problem, 0) end
  return made
end

return M
