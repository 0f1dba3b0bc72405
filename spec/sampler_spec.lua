local ffi = require("ffi")
local samplers = require("quartermoon.models.sampler")
local stop_text = require("quartermoon.models.stop_text")
local qm = require("quartermoon")

local function row(values)
  local buffer = ffi.new("float[?]", #values)
  for i, value in ipairs(values) do buffer[i - 1] = value end
  return buffer, #values
end

local function sampler(options, seed, prompt)
  local all = { temperature = 1, top_p = 1, min_p = 0, repetition_penalty = 1 }
  for key, value in pairs(options or {}) do all[key] = value end
  return samplers.new(all, seed or 1, prompt or {})
end

---How often each token comes in so many draws.
local function shares(options, values, draws)
  local one, counts = sampler(options), {}
  for i = 0, #values - 1 do counts[i] = 0 end
  for _ = 1, draws do
    local token = one:pick(row(values))
    counts[token] = counts[token] + 1
  end
  return counts
end

local DRAWS = 4000
local PROBABILITIES = { 0.1, 0.4, 0.05, 0.3, 0.15 } -- of tokens 0 .. 4
local SCORES = {}
for i, p in ipairs(PROBABILITIES) do SCORES[i] = math.log(p) + 3 end

---Five standard errors hold for all but one in two million.
local function assert_shares(expected, options)
  local counts, total = shares(options, SCORES, DRAWS), 0
  for _, p in ipairs(expected) do total = total + p end
  for i, p in ipairs(expected) do
    p = p / total
    if p == 0 then
      assert.equal(0, counts[i - 1])
    else
      assert.near(p * DRAWS, counts[i - 1], 5 * math.sqrt(DRAWS * p * (1 - p)) + 1e-9)
    end
  end
end

describe("a sampler", function()
  it("draws in proportion to exp(score / temperature)", function()
    assert_shares(PROBABILITIES)
    local squares = {}
    for i, p in ipairs(PROBABILITIES) do squares[i] = p * p end
    assert_shares(squares, { temperature = 0.5 })
  end)

  it("takes the largest at temperature 0, the first of equals", function()
    assert.equal(1, sampler({ temperature = 0 }):pick(row({ 1, 5, 5, 2 })))
    assert.equal(3, sampler({ temperature = 1e-30 }):pick(row({ 1, 4, 5, 5.5 })))
  end)

  it("keeps the top_k largest, of equals the lower numbers", function()
    assert_shares({ 0, 0.4, 0, 0.3, 0 }, { top_k = 2 })
    assert_shares(PROBABILITIES, { top_k = 9 })
    for _ = 1, 20 do assert.is_true(sampler({ top_k = 2 }, _):pick(row({ 3, 1, 3, 3 })) ~= 3) end
  end)

  it("keeps the fewest likeliest that come to top_p", function()
    assert_shares({ 0, 0.4, 0, 0.3, 0 }, { top_p = 0.69 })
    assert_shares({ 0, 0.4, 0, 0.3, 0.15 }, { top_p = 0.71 })
    assert_shares({ 0, 1, 0, 0, 0 }, { top_p = 0 })
    -- After top_k = 3 the probabilities are 0.4, 0.3 and 0.15 of 0.85: two come to 0.82.
    assert_shares({ 0, 0.4, 0, 0.3, 0 }, { top_k = 3, top_p = 0.8 })
    assert_shares({ 0, 0.4, 0, 0.3, 0.15 }, { top_k = 3, top_p = 0.85 })
  end)

  it("keeps what is at least min_p times as likely as the likeliest", function()
    assert_shares({ 0, 0.4, 0, 0.3, 0 }, { min_p = 0.5 })
    assert_shares({ 0.1, 0.4, 0, 0.3, 0.15 }, { min_p = 0.2 })
    assert_shares({ 0, 0.4, 0, 0.3, 0 }, { min_p = 0.5, top_k = 3 })
    assert_shares({ 0, 0.4, 0, 0.3, 0 }, { min_p = 0.5, top_p = 0.95 })
  end)

  it("divides positive scores of what was said by the penalty, multiplies negative ones", function()
    local one = sampler({ temperature = 0, repetition_penalty = 2 }, 1, { 1, 1, 3 })
    local scores, count = row({ 2.5, 4, -1, -0.5 })
    assert.equal(0, one:pick(scores, count))
    assert.same({ 2.5, 2, -1, -1 }, { scores[0], scores[1], scores[2], scores[3] }) -- once, not twice
    one:note(0)
    assert.equal(1, one:pick(row({ 2.5, 4, -1, -0.5 })))
  end)

  it("finds the likeliest of a vocabulary however flat it is", function()
    local flat, peaked = {}, {}
    for i = 1, 5000 do flat[i], peaked[i] = i % 7 * 1e-3, i == 4321 and 30 or 0 end
    local seen = {}
    local one = sampler({ top_k = 700 })
    for _ = 1, 300 do
      local token = one:pick(row(flat))
      assert.equal(6, (token + 1) % 7) -- 714 tokens have the largest score
      assert.is_true(token < 4900)     -- and the 700 of the lowest numbers stay
      seen[token] = true
    end
    local different = 0
    for _ in pairs(seen) do different = different + 1 end
    assert.is_true(different > 150)
    for _ = 1, 10 do
      assert.equal(4320, sampler({ top_p = 0.99 }, _):pick(row(peaked)))
      assert.is_true(sampler({ top_p = 0.999999 }, _):pick(row(flat)) < 5000)
    end
  end)

  it("has a stream of its own: the same seed, the same draws", function()
    local function draws(seed)
      local one, made = sampler(nil, seed), {}
      for i = 1, 40 do made[i] = one:pick(row(SCORES)) end
      return made
    end
    local first = draws(7)
    qm.rand({ 3 })
    assert.same(first, draws(7))
    assert.are_not.same(first, draws(8))
  end)

  it("refuses scores that are not numbers", function()
    for _, bad in ipairs({ 0 / 0, 1 / 0 }) do
      assert.error_matches(function() sampler():pick(row({ 1, bad })) end, "are not numbers", 1, true)
    end
    assert.error_matches(function() sampler():pick(row({ -1 / 0, -1 / 0 })) end, "are not numbers", 1, true)
    assert.equal(1, sampler():pick(row({ -1 / 0, 3 }))) -- a token that is ruled out
  end)
end)

describe("stop strings", function()
  ---What comes out of parts, marked where it stops.
  local function run(strings, parts)
    local stop, out = stop_text.new(strings), {}
    for _, part in ipairs(parts) do
      local words, stopped = stop:push(part)
      out[#out + 1] = words
      if stopped then return table.concat(out, "/") .. "|" end
    end
    out[#out + 1] = stop:finish()
    return table.concat(out, "/")
  end

  it("are found across the borders of parts", function()
    assert.equal("ab/|", run({ "END" }, { "abEN", "D and more" }))
    assert.equal("a//|", run({ "END" }, { "aE", "N", "D", "x" }))
    assert.equal("a|", run({ "END", "E" }, { "aEN" }))
    assert.equal("a|", run({ "c", "bcd" }, { "abcd" })) -- the one that begins first
  end)

  it("hold back only what may still become one", function()
    assert.equal("a/ENx/", run({ "END" }, { "aEN", "x" }))
    assert.equal("a/EN", run({ "END" }, { "aEN" }))
    assert.equal("aa/|", run({ "aab" }, { "aaaa", "b" }))
    assert.equal("plain/ text/", run({}, { "plain", " text" }))
  end)
end)

describe("tokenizer:stream", function()
  it("gives whole characters, special tokens no text", function()
    local tokenizer = qm.tokenizer.byte({ specials = { "<end>" } })
    local stream, parts = tokenizer:stream(), {}
    local text = "aä€😀"
    for i = 1, #text do parts[i] = stream:push(text:byte(i)) end
    assert.same({ "a", "", "ä", "", "", "€", "", "", "", "😀" }, parts)
    assert.equal("", stream:push(256))
    assert.equal("<end>", tokenizer:stream({ skip_special = false }):push(256))
    assert.equal("", stream:push(0xE2))
    assert.equal("\xE2", stream:finish())
    assert.equal("\xFF", stream:push(0xFF)) -- no beginning of anything
    assert.equal("", stream:push(0xE2))
    assert.equal("\xE2a", stream:push(97))
    assert.error_matches(function() stream:push("a") end, "argument 'id': expected a number", 1, true)
    assert.error_matches(function() stream:push(257) end, "ids from 0 to 256", 1, true)
  end)
end)
