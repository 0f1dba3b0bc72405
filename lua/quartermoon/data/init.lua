---Data: a text as tokens, a held-out part of it, and batches that a resumed run continues bit for bit.
---
---    local data = qm.data.open("kjv.txt", { tokenizer = qm.tokenizer.byte() })
---    local batches = data:batches { batch = 16, length = 64, seed = 1 }
---    local tokens, targets, cu_seqlens = batches:next()
---    for tokens, targets, cu_seqlens in data:held_out { length = 64, limit = 65536 } do ... end

local check = require("quartermoon.check")
local random = require("quartermoon.random")
local tensors = require("quartermoon.tensor")
local Base = require("quartermoon.tokenizer.base")
local tokenizers = require("quartermoon.tokenizer")
local cache = require("quartermoon.data.cache")

local M = {}

---@class qm.Dataset
---@field tokens qm.Tensor       u8 or i32 [count], on the CPU
---@field count integer          how many tokens there are
---@field tokenizer qm.Tokenizer|nil
---@field chars_per_token number  of the text (UTF-8), to turn nats per token into nats per character; 1
---  where there is no text
---@field train_count integer, held_out_count integer  tokens on either side
local Dataset = {}
Dataset.__index = Dataset

---The ranges of tokens, { first, count }, on either side: of `blocks` equal blocks the last of every
---`period` is held out; neighbours on the same side make one range.
local function divide(count, blocks, period)
  local train, held = {}, {}
  for block = 0, blocks - 1 do
    local first, behind = math.floor(block * count / blocks), math.floor((block + 1) * count / blocks)
    local side = period and block % period == period - 1 and held or train
    local previous = side[#side]
    if previous and previous.first + previous.count == first then
      previous.count = previous.count + behind - first
    elseif behind > first then
      side[#side + 1] = { first = first, count = behind - first }
    end
  end
  return train, held
end

local function total(ranges)
  local sum = 0
  for _, range in ipairs(ranges) do sum = sum + range.count end
  return sum
end

---Open a text, or tokens in memory.
---
---A text's tokens are written once to "<path>.<tokenizer>.tokens" and mapped from then on; they are
---made anew when the text has changed.
---@param source string|qm.Tensor|integer[]  a text's path; or token ids: u8 or i32 [count], or a list
---@param options table|nil
---  tokenizer = qm.tokenizer.byte();
---  held_out = 0.05: the share of blocks that training never sees, 0 to 0.5, as every 1/held_out-th;
---  blocks = 400: how many equal blocks the tokens are cut into;
---  cache_dir: where the tokens go (a folder, made if need be), default beside the text;
---  delimiter: text that separates documents; each ends with the tokenizer's special token
---    "<|end|>" instead, and no batch's sequence crosses it
---@return qm.Dataset
---@raise when the text cannot be read or the tokens cannot be written, naming the file
function M.open(source, options)
  local name = "qm.data.open"
  options = check.options(name, options, { tokenizer = check.optional, held_out = 0.05, blocks = 400,
    cache_dir = check.optional, delimiter = check.optional })
  check.number(name, "held_out", options.held_out, 0, 0.5)
  check.integer(name, "blocks", options.blocks, 1)
  local tokenizer, end_id = options.tokenizer, nil
  if tokenizer then check.instance(name, "tokenizer", tokenizer, Base, "qm.Tokenizer") end
  if options.cache_dir then check.type(name, "cache_dir", options.cache_dir, "string") end
  if options.delimiter ~= nil then
    if check.type(name, "delimiter", options.delimiter, "string") == "" then
      check.fail(name, "delimiter", "some text", "")
    end
    tokenizer = tokenizer or tokenizers.byte({ specials = { "<|end|>" } })
    end_id = tokenizer:special("<|end|>")
    if not end_id then check.fail(name, "tokenizer", "one with the special token '<|end|>'", tokenizer) end
  end
  local self = setmetatable({ tokenizer = tokenizer, end_id = end_id }, Dataset)
  if type(source) == "string" then
    self.tokenizer = tokenizer or tokenizers.byte()
    self.path = source
    self.tokens, self.characters, self.tokenized = cache.tokens(name, source, self.tokenizer,
      { cache_dir = options.cache_dir, delimiter = options.delimiter, end_id = end_id })
  elseif check.is_tensor(source) then
    if #source.shape ~= 1 or (source.dtype ~= "u8" and source.dtype ~= "i32") then
      check.fail(name, "source", "token ids u8 or i32 [count]", source)
    end
    self.tokens = source:to("cpu")
  elseif type(source) == "table" then
    self.tokens = tensors.tensor(source, { dtype = "i32", device = "cpu" })
  else
    check.fail(name, "source", "a path or token ids", source)
  end
  self.tokens:keep()
  self.count = self.tokens.shape[1]
  self.chars_per_token = self.characters and self.count > 0 and self.characters / self.count or 1
  self.train, self.held = divide(self.count, options.blocks,
    options.held_out > 0 and math.floor(1 / options.held_out + 0.5) or nil)
  self.train_count, self.held_out_count = total(self.train), total(self.held)
  return self
end

---Release the tokens.
function Dataset:free() self.tokens:free() end

function Dataset:describe()
  return ("qm.data '%s', %d tokens, %d held out"):format(self.path or "tokens", self.count, self.held_out_count)
end
Dataset.__tostring = Dataset.describe

---------------------------------------------------------------------------------------------------
-- From windows of tokens to a batch
---------------------------------------------------------------------------------------------------

---What one kind of batch needs again and again.
local function new_maker(dataset, batch, length, device)
  return { dataset = dataset, batch = batch, length = length, device = device,
    window = tensors.host_buffer(dataset.tokens.dtype, length + 1),
    tokens = tensors.host_buffer("i32", batch * length), targets = tensors.host_buffer("i32", batch * length),
    bounds = tensors.host_buffer("i32", batch * length + 1) }
end

local function free_batch(maker)
  for _, tensor in ipairs(maker.last or {}) do if not tensor.kept then tensor:free() end end
  maker.last = nil
end

---A batch of the windows that begin at token starts[1 .. count] (from 0). A window's sequence ends
---behind each end of a document. The tensors are good until the next batch.
local function make(maker, starts, count)
  free_batch(maker)
  local dataset, length = maker.dataset, maker.length
  local window, tokens, targets, bounds = maker.window, maker.tokens, maker.targets, maker.bounds
  local end_id, at, sequences = dataset.end_id, 0, 0
  bounds[0] = 0
  for i = 1, count do
    dataset.tokens:read_elements(starts[i] + 1, length + 1, window)
    for j = 0, length - 1 do
      tokens[at + j], targets[at + j] = window[j], window[j + 1]
    end
    if end_id then
      for j = 0, length - 2 do
        if window[j] == end_id then
          sequences = sequences + 1
          bounds[sequences] = at + j + 1
        end
      end
    end
    at, sequences = at + length, sequences + 1
    bounds[sequences] = at
  end
  local options = { device = maker.device }
  maker.last = { tensors.from_host(tokens, at, "i32", options), tensors.from_host(targets, at, "i32", options),
    tensors.from_host(bounds, sequences + 1, "i32", options) }
  return maker.last[1], maker.last[2], maker.last[3]
end

---------------------------------------------------------------------------------------------------
-- Training: random windows
---------------------------------------------------------------------------------------------------

---An endless source of random training batches.
---@class qm.Batches
local Batches = {}
Batches.__index = Batches

---Batches of random windows, uniform over all places where a window and its last target lie inside
---the training side. Batch number n depends on the seed and n alone.
---@param options table  batch: windows in a batch; length: tokens in a window; seed = 0;
---  device = default
---@return qm.Batches
function Dataset:batches(options)
  local name = "data:batches"
  options = check.options(name, options, { batch = check.required, length = check.required, seed = 0,
    device = check.optional })
  check.integer(name, "batch", options.batch, 1, 2 ^ 24)
  check.integer(name, "length", options.length, 1, 2 ^ 24)
  local places = 0
  for _, range in ipairs(self.train) do places = places + math.max(range.count - options.length, 0) end
  if places == 0 then
    check.fail(name, "length", ("windows that fit: no training block has %d tokens"):format(options.length + 1),
      options.length)
  end
  return setmetatable({ maker = new_maker(self, options.batch, options.length, options.device), places = places,
    generator = random.generator(options.seed) }, Batches)
end

---Token number of a place: places count through the training side's ranges.
local function token_of(ranges, length, place)
  for _, range in ipairs(ranges) do
    local here = math.max(range.count - length, 0)
    if place < here then return range.first + place end
    place = place - here
  end
end

---The next batch. Its tensors are freed by the call after, unless kept with :keep().
---@return qm.Tensor tokens      i32 [batch * length]
---@return qm.Tensor targets     i32 [batch * length], each the token behind
---@return qm.Tensor cu_seqlens  i32 [sequences + 1]: where sequences begin, and the end of the last;
---  a sequence is a window, or with documents a part of one
function Batches:next()
  local maker, starts = self.maker, {}
  -- Two 24-bit uniforms make one of 48 bits, enough for any text.
  local draws = self.generator:rand({ 2 * maker.batch }, { device = "cpu" })
  local values = draws:host()
  draws:free()
  for i = 1, maker.batch do
    local uniform = values[2 * i - 2] + values[2 * i - 1] * 2 ^ -24
    starts[i] = token_of(maker.dataset.train, maker.length, math.floor(uniform * self.places))
  end
  return make(maker, starts, maker.batch)
end

---Where this source stands: { seed, draws }. A source with this state draws what this one would.
function Batches:state() return { seed = self.generator.seed, draws = self.generator.draws } end

---Continue where another source stood.
function Batches:load_state(state)
  check.type("batches:load_state", "state", state, "table")
  self.generator = random.generator(state.seed, state.draws)
end

---Free the last batch.
function Batches:free() free_batch(self.maker) end

---------------------------------------------------------------------------------------------------
-- Evaluation: the held-out side in order
---------------------------------------------------------------------------------------------------

---The held-out side once, always the same: windows one after the other inside each block.
---@param options table  length: tokens in a window; batch = 16: windows in a batch (the last may have
---  fewer); limit: at most so many tokens; device = default
---@return function iterator  -> tokens, targets, cu_seqlens as batches:next() gives them
function Dataset:held_out(options)
  local name = "data:held_out"
  options = check.options(name, options, { length = check.required, batch = 16, limit = check.optional,
    device = check.optional })
  local length = check.integer(name, "length", options.length, 1, 2 ^ 24)
  check.integer(name, "batch", options.batch, 1, 2 ^ 24)
  local left = options.limit and math.floor(check.number(name, "limit", options.limit, length) / length) or math.huge
  local starts = {}
  for _, range in ipairs(self.held) do
    for first = range.first, range.first + range.count - length - 1, length do
      if left >= 1 then
        starts[#starts + 1] = first
        left = left - 1
      end
    end
  end
  if #starts == 0 then
    check.fail(name, "length", ("windows that fit: no held-out block has %d tokens"):format(length + 1), length)
  end
  local maker, at = new_maker(self, options.batch, length, options.device), 0
  return function()
    if at >= #starts then return free_batch(maker) end
    local part = {}
    for i = at + 1, math.min(at + options.batch, #starts) do part[#part + 1] = starts[i] end
    at = at + #part
    return make(maker, part, #part)
  end
end

check.methods("qm.Dataset", Dataset)

check.methods("qm.Batches", Batches)

return M
