-- The fuzzer: calls everything public with anything at all, until its time is up. Run by
-- spec/fuzz_spec.lua as a process of its own, in an empty folder:
--
--   luajit spec/support/fuzz.lua ROOT SEED SECONDS
--
-- Every call must return or raise a string; a crash leaves the call it died in in ./last_call. What
-- calls return goes into a pool and comes back as arguments and receivers of methods.
local root, seed, seconds = arg[1], tonumber(arg[2]), tonumber(arg[3])
package.path = root .. "/lua/?.lua;" .. root .. "/lua/?/init.lua;" .. package.path

local qm = require("quartermoon")
local now = require("quartermoon.clock").now

-- Not called: what runs programs, deletes or moves files, ends the process, waits for a person, or
-- would lift the limits below.
local SKIPPED = { "^qm%.repl", "^qm%.cli", "^qm%.options%.parse", "^qm%.plot", "^qm%.files", "set_limit",
  "remove", "delete", "rename", "^qm%.profile" }

local LIMIT_BYTES = 256 * 2 ^ 20
for _, name in ipairs({ "cpu", "reference" }) do qm.device(name):set_limit(LIMIT_BYTES) end

---------------------------------------------------------------------------------------------------
-- Random values. The generator is our own, so that a seed gives the same calls again.
---------------------------------------------------------------------------------------------------

local state = seed % 2147483646 + 1
local function random(count)
  state = state * 16807 % 2147483647
  return state % count + 1
end
local function pick(list) return list[random(#list)] end

local DTYPES = { "f32", "f32", "f32", "bf16", "f16", "i32", "i8", "u8", "i16", "i64" }
local EXTENTS = { 0, 1, 2, 3, 4, 5, 8, 32, 64 }
local NUMBERS = { 0, 1, 2, 3, 4, 8, 32, 64, -1, -2, 0.5, 1e-5, -0.5, 7, 100, 255, 2 ^ 31, -2 ^ 31, 2 ^ 32, 2 ^ 40,
  2 ^ 53, 1e300, -1e300, 1 / 0, -1 / 0, 0 / 0, 1LL, -1ULL }
local STRINGS = { "", "f32", "bf16", "i32", "cpu", "reference", "cuda", "cpu:1", "x", "sum", "left", "std", "nearest",
  "stochastic", "minmax", "no/such/file", "a file", "\0", "%s%n%d", "\255\254", ("long"):rep(3000), "train", "{}",
  "hello world", "model.safetensors" }
local KEYS = { "dtype", "device", "requires_grad", "shape", "trans_a", "trans_b", "w_bit", "group_size", "asym",
  "method", "range", "causal", "scale", "window", "lr", "eps", "rank", "hidden_size", "vocab_size", "chunk_rows",
  "ignore_index", "rounding", "feedback", "steps", "path", "weight", "bias", "data", "scales", "zeros", "seed",
  "draws" }

local pool = {} -- what calls returned
local function remember(value)
  if type(value) == "table" then pool[#pool < 60 and #pool + 1 or random(60)] = value end
end

local shared -- this call's usual shape, type and device, so that tensors often fit together

local function shape()
  local extents = {}
  for i = 1, random(5) - 1 do extents[i] = pick(EXTENTS) end
  return extents
end

local function tensor()
  local like = random(3) > 1 and shared
    or { shape = shape(), dtype = pick(DTYPES), device = pick({ "cpu", "reference" }) }
  local dtype = random(8) == 1 and "i32" or like.dtype
  local ok, x = pcall(qm.full, like.shape, random(4) == 1 and random(9) - 5 or random(3) - 1,
    { dtype = dtype, device = like.device, requires_grad = random(4) == 1 and dtype:find("f") ~= nil })
  if not ok then return nil end
  local fate = random(20)
  if fate == 1 then x:free() elseif fate == 2 then x = x:share() elseif fate == 3 and like.shape[1] then
    x = x:view_rows("fuzz", 1, math.floor(like.shape[1] / 2))
  end
  return x
end

local value
local function any_table(depth)
  local result, kind = {}, random(4)
  if kind == 1 then return shape() end
  if depth > 2 then return result end
  for i = 1, random(4) - 1 do
    local key = kind == 2 and i or pick(KEYS)
    result[key] = value(depth + 1)
  end
  if random(40) == 1 then result.self = result end
  return result
end

function value(depth)
  local kind = random(20)
  if kind <= 7 then return tensor() end
  if kind <= 10 then return pick(NUMBERS) end
  if kind <= 12 then return pick(STRINGS) end
  if kind <= 15 then return any_table(depth or 0) end
  if kind <= 17 then return pool[random(60)] end
  if kind == 18 then return random(2) == 1 end
  if kind == 19 then
    local results = { pool[random(60)], pick(NUMBERS) }
    return function() return results[1], results[2] end
  end
  return nil
end

---------------------------------------------------------------------------------------------------
-- What can be called
---------------------------------------------------------------------------------------------------

local function is_skipped(path)
  for _, pattern in ipairs(SKIPPED) do
    if path:find(pattern) then return true end
  end
end

local function sorted_names(holder)
  local names = {}
  for name in pairs(holder) do if type(name) == "string" then names[#names + 1] = name end end
  table.sort(names)
  return names
end

local functions, seen, class_names = {}, {}, {}
local function collect(path, holder, depth)
  if seen[holder] or depth > 4 then return end
  seen[holder] = true
  class_names[holder] = path:match("[^.]*$")
  for _, name in ipairs(sorted_names(holder)) do
    local item, item_path = rawget(holder, name), path .. "." .. name
    if type(item) == "function" and not is_skipped(item_path) and name:sub(1, 2) ~= "__" then
      functions[#functions + 1] = { path = item_path, call = item }
    elseif type(item) == "table" and name:sub(1, 1) ~= "_" then
      collect(item_path, item, depth + 1)
    end
  end
end

local missing = {}
for _, name in ipairs(sorted_names(getmetatable(qm).__modules)) do
  local ok = pcall(function() return qm[name] end)
  if not ok then missing[#missing + 1] = name end
end
pcall(function() return qm.QParam end)
collect("qm", qm, 0)

---Methods of an object: name -> function, through the tables its metatable leads to.
local function method_of(object)
  local class = getmetatable(object)
  local holder = type(class) == "table" and class.__index
  if type(holder) ~= "table" then return nil end
  local names = sorted_names(holder)
  local base = getmetatable(holder)
  if #names == 0 or (base and random(2) == 1) then
    holder = type(base) == "table" and type(base.__index) == "table" and base.__index or holder
    names = sorted_names(holder)
  end
  if #names == 0 then return nil end
  local name = pick(names)
  local path = (class_names[holder] or "object") .. ":" .. name
  if is_skipped(path) or type(holder[name]) ~= "function" or name:sub(1, 2) == "__" then return nil end
  return path, holder[name]
end

---Objects that random arguments would hardly ever make.
local SEEDS = {
  function() return qm.randn({ 3, 5 }, { requires_grad = true }):sum() end,
  function() return qm.generator(1) end,
  function() return qm.device("cpu") end,
  function() return qm.QParam.quantize(qm.randn({ 64, 32 }), { w_bit = 4, group_size = 32 }) end,
  function() return qm.QParam.quantize(qm.randn({ 64, 32 }), { w_bit = 2, group_size = 32, asym = false }) end,
  function() return qm.nn.Linear.new(4, 3) end,
  function() return qm.nn.RMSNorm.new(4) end,
  function() return qm.nn.Embedding.new(7, 4) end,
  function() return qm.tokenizer.byte() end,
  function() return qm.models.llama.new({ vocab_size = 11, hidden_size = 8, intermediate_size = 16,
    num_hidden_layers = 1, num_attention_heads = 2, num_key_value_heads = 1 }) end,
  function() return qm.nn.Attention.new({ hidden_size = 8, heads = 2, linear = qm.nn.linear_factory("dense") }) end,
  function() return qm.nn.SwiGLU.new({ hidden_size = 8, intermediate_size = 16,
    linear = qm.nn.linear_factory("dense") }) end,
  function() return qm.nn.key_values(4, 2, 4) end,
  function() return qm.optim.new(qm.nn.Linear.new(4, 3)) end,
  function() return qm.projector.galore({ rank = 2 }) end,
  function() return qm.tokenizer.train_bpe("a text, a text, a text", { vocab_size = 260 }) end,
  function() return qm.data.open({ 1, 2, 3, 4, 5, 6, 7, 8 }, { held_out = 0.5, blocks = 2 }) end,
  function() return qm.data.open({ 1, 2, 3, 4, 5, 6, 7, 8 }, { held_out = 0 }):batches({ batch = 1, length = 2 }) end,
  function() return qm.progress.new({ steps = 3, output = assert(io.open("progress.txt", "w")) }) end,
  function() return qm.metrics.open("metrics.jsonl") end,
  function()
    qm.safetensors.save("seed.safetensors", { weight = qm.ones({ 2 }) })
    return qm.safetensors.open("seed.safetensors")
  end,
}
local function seed_pool()
  for _, make in ipairs(SEEDS) do
    local ok, object = pcall(make)
    if ok then remember(object) end
  end
end

---------------------------------------------------------------------------------------------------
-- Calling it
---------------------------------------------------------------------------------------------------

local function describe(x)
  if type(x) == "string" then return ("%q"):format(#x > 30 and x:sub(1, 30) .. "..." or x) end
  if type(x) ~= "table" then return tostring(x) end
  if rawget(x, "desc") and type(x.shape) == "table" then
    return ("<%s [%s]%s>"):format(tostring(x.dtype), table.concat(x.shape, ","), x.storage and "" or " freed")
  end
  local words = {}
  for _, name in ipairs(sorted_names(x)) do words[#words + 1] = name .. "=" .. type(x[name]) end
  for i = 1, math.min(#x, 5) do words[#words + 1] = type(x[i]) == "number" and tostring(x[i]) or type(x[i]) end
  return "{" .. table.concat(words, ","):sub(1, 200) .. "}"
end

local last_call = assert(io.open("last_call", "wb"))
local calls, errors, unhelpful, slowest_s, slowest = 0, 0, {}, 0, ""

-- Objects whose insides were overwritten: what they do next must not crash, but may say anything.
local broken = setmetatable({}, { __mode = "k" })

local function judge(path, is_fair, ok, ...)
  if ok then
    for i = 1, math.min(select("#", ...), 4) do
      local result = select(i, ...)
      if type(result) == "table" and not is_fair and not rawget(result, "handle") then broken[result] = true end
      remember(result)
    end
    return
  end
  errors = errors + 1
  local message = ...
  if type(message) ~= "string" then
    print(("FAILED %s raised a %s, not a string"):format(path, type(message)))
    os.exit(1)
  end
  -- An error of Lua's own inside the library: true, but it names no argument.
  local where = message:match("lua/(quartermoon/[%w_/.]+:%d+): ")
  if is_fair and where and not message:find("stack overflow") then
    unhelpful[where] = unhelpful[where] or path .. ": " .. message:match("[^\n]*"):sub(-120)
  end
end

local function is_broken(x, depth)
  if type(x) ~= "table" or broken[x] then return type(x) == "table" end
  if depth < 3 then
    for _, part in pairs(x) do if is_broken(part, depth + 1) then return true end end
  end
  return false
end

local function call_with(path, fn, arguments, count)
  local words, is_fair = {}, true
  for i = 1, count do
    words[i] = describe(arguments[i])
    is_fair = is_fair and not is_broken(arguments[i], 0)
  end
  last_call:seek("set", 0)
  last_call:write((("%s(%s)"):format(path, table.concat(words, ", ")) .. (" "):rep(2000)):sub(1, 2000), "\n")
  last_call:flush()
  local started = now()
  judge(path, is_fair, pcall(fn, unpack(arguments, 1, count)))
  local elapsed_s = now() - started
  if elapsed_s > slowest_s then slowest_s, slowest = elapsed_s, path .. "(" .. table.concat(words, ", ") .. ")" end
  calls = calls + 1
end

---Anything at all for arguments.
local function call(path, fn, receiver)
  shared = { shape = shape(), dtype = pick(DTYPES), device = random(4) == 1 and "reference" or "cpu" }
  local arguments, count = {}, random(6) - 1
  if receiver then arguments[1], count = receiver, count + 1 end
  for i = receiver and 2 or 1, count do arguments[i] = value() end
  call_with(path, fn, arguments, count)
end

local RIGHT_CALLS = {}
for _, name in ipairs({ "cpu", "reference" }) do
  for _, entry in ipairs(dofile(root .. "/spec/support/fuzz_calls.lua")(qm, name)) do
    RIGHT_CALLS[#RIGHT_CALLS + 1] = entry
  end
end
local wrong_before_spoiling = {}

---Arguments that are right but for one, or for one entry of a table among them.
local function call_spoilt(entry)
  local path, make = entry[1], entry[2]
  local made = { pcall(make) }
  if not made[1] then
    wrong_before_spoiling[path] = tostring(made[2])
    return
  end
  local arguments, count = { unpack(made, 2, #made) }, #made - 1
  local fn = path:sub(1, 2) == "x:" and arguments[1][path:sub(3)] or qm
  if fn == qm then for part in path:sub(4):gmatch("[^.]+") do fn = fn[part] end end
  shared = { shape = shape(), dtype = pick(DTYPES), device = "cpu" }
  if random(5) > 1 then
    local at = random(count + 1)
    local target = arguments[at]
    if type(target) == "table" and not rawget(target, "desc") and random(3) > 1 then
      local names = sorted_names(target)
      broken[target] = getmetatable(target) and true
      if #names > 0 then
        local name = random(6) == 1 and pick(KEYS) or pick(names)
        target[name] = value()
      elseif #target > 0 then
        target[random(#target)] = value()
      end
    else
      arguments[at] = value()
      count = math.max(count, at)
    end
  end
  call_with(path, fn, arguments, count)
  if count > 0 and random(3) == 1 then
    for _, result in ipairs(pool) do
      if rawget(result, "node") and random(4) == 1 then
        call_with("backward", result.backward, { result, random(2) == 1 and value() or nil }, 2)
        break
      end
    end
  end
end

io.stdout:setvbuf("line")
local deadline = now() + seconds
while now() < deadline do
  if calls % 2000 == 0 then
    pool = {}
    qm.set_default_device("cpu")
    seed_pool()
    collectgarbage()
  end
  if random(2) == 1 then call_spoilt(pick(RIGHT_CALLS)) end
  local object = random(2) == 1 and (random(2) == 1 and tensor() or pool[random(60)])
  if object and getmetatable(object) then
    local path, method = method_of(object)
    if path then call(path, method, object) end
  else
    local target = pick(functions)
    call(target.path, target.call)
  end
end

print(("%d calls of %d functions and of methods, %d errors, %d unhelpful; slowest %.2f s: %s"):format(calls, #functions,
  errors, #sorted_names(unhelpful), slowest_s, slowest:sub(1, 160)))
if #missing > 0 then print("not there: " .. table.concat(missing, ", ")) end
for _, where in ipairs(sorted_names(unhelpful)) do print("unhelpful: " .. where .. " by " .. unhelpful[where]) end
for _, path in ipairs(sorted_names(wrong_before_spoiling)) do
  print("cannot be made: " .. path .. ": " .. wrong_before_spoiling[path])
end
print("SURVIVED")
