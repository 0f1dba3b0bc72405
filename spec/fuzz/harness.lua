-- What a target is and what a finding is: loaded once by spec/fuzz/driver.c, which calls the function
-- that this file returns with each input (so does spec/fuzz/replay.lua, without a fuzzer).
--
-- A target is a file spec/fuzz/<target>.lua that returns a function (bytes, fuzz): it gives the bytes to
-- a reader, by way of files. Whatever is in them, the reader may return, or raise a string that
-- names one of the files. All else is a finding: a crash, a fault of Lua's own ("attempt to index ..."),
-- a place in the library's sources, a handle or a descriptor that stays open, memory that grows, a
-- program that is run, a file read or written that is none of the input's.
local target_name, folder = ...
package.path = "lua/?.lua;lua/?/init.lua;./?.lua;" .. package.path

local qm = require("quartermoon")
local parts = require("spec.fuzz.parts")
local function nothing() return 0 end
local allocated, next_descriptor = _G.allocated or nothing, _G.next_descriptor or nothing -- of the driver

local LIMIT_BYTES = 256 * 2 ^ 20 -- of tensors
for _, name in ipairs({ "cpu", "reference" }) do qm.device(name):set_limit(LIMIT_BYTES) end

---------------------------------------------------------------------------------------------------
-- Findings
---------------------------------------------------------------------------------------------------

local FAULTS = { "quartermoon/[%w_/]+%.lua:%d", "%.lua:%d+: attempt to ", "%.lua:%d+: bad argument #",
  "stack overflow$", "not enough memory$", "error in error handling$" }

local finding, input
local function found(format, ...) finding = finding or format:format(...) end

---A sentence of the library's: what is wrong with the input, or a fault of ours.
local function judge(message, must_name)
  if type(message) ~= "string" then return found("a %s was raised: %s", type(message), tostring(message)) end
  for _, fault in ipairs(FAULTS) do
    local words = message:match(fault)
    -- An input that holds such words may be quoted.
    if words and not input:find(words, 1, true) then return found("a fault: %s", message) end
  end
  if must_name and not message:find(folder, 1, true) then found("no file is named: %s", message) end
end

-- Nothing in a file is executed, and no other file is touched. What the library itself needs is loaded now.
for _, name in ipairs({ "models.llama", "models.gpt2", "models.folder", "qparam_files", "tokenizer", "checkpoints",
  "inspection", "inspection.gguf", "gguf", "optim", "projector", "data" }) do require("quartermoon." .. name) end
qm.tokenizer.byte():ids("x")
require("quartermoon.tokenizer.unicode").normalize("\195\164", "NFC")
require("quartermoon.tokenizer.pcre2").compile("x")

local function forbid(holder, name)
  rawset(holder, name, function(what) found("%s was called with %s", name, tostring(what)) end)
end
local remove, open = os.remove, io.open
for _, name in ipairs({ "loadstring", "load", "loadfile", "dofile" }) do forbid(_G, name) end
for _, name in ipairs({ "execute", "remove", "rename", "exit" }) do forbid(os, name) end
forbid(io, "popen")
rawset(io, "open", function(path, mode)
  if path:sub(1, #folder) ~= folder or path:find("/../", 1, true) then found("%s was opened", path) end
  return open(path, mode)
end)

---------------------------------------------------------------------------------------------------
-- What a target is lent
---------------------------------------------------------------------------------------------------

local fuzz = { folder = folder, parts = parts }
local written = {}

---Write a file of the input. @return string path
function fuzz.write(name, bytes)
  local path = folder .. "/" .. name
  local file = open(path, "wb")
  if not file then return path end
  written[#written + 1] = path
  file:write(bytes)
  file:close()
  return path
end

---Write the files of an input that spec/fuzz/parts.lua takes apart.
---@param bytes string
---@param default string  the first file, where the input names none
function fuzz.write_parts(bytes, default)
  for name, text in pairs(parts.split(bytes, default)) do fuzz.write(name, text) end
end

---Go on with what was read: an error need not name a file any more, but must be no fault.
function fuzz.use(f, ...)
  local ok, message = pcall(f, ...)
  if not ok then judge(message, false) end
end

---A sentence that was not raised.
function fuzz.judge(message) judge(message, false) end

local target = require("spec.fuzz." .. target_name)

---------------------------------------------------------------------------------------------------
-- Running one input
---------------------------------------------------------------------------------------------------

local function once(bytes)
  input = bytes
  local ok, message = pcall(target, bytes, fuzz)
  if not ok then judge(message, true) end
  for i = #written, 1, -1 do
    remove(written[i])
    written[i] = nil
  end
end

local function collect()
  collectgarbage()
  collectgarbage()
end

-- What the collector and malloc leave undecided, in so many runs.
local RUNS, MARGINS = 16, { handles = 0, ["bytes of C"] = 256, ["KiB of Lua"] = 0.8 }

---Does something grow with every run?
local function check_growth(bytes)
  local before, times = {}, {}
  for _ = 1, 4 do
    for _ = 1, RUNS do once(bytes) end
    collect()
    local now = { handles = qm.handles_live(), ["bytes of C"] = allocated(), ["KiB of Lua"] = collectgarbage("count") }
    for what, value in pairs(now) do
      if value > (before[what] or value) + MARGINS[what] then times[what] = (times[what] or 0) + 1 end
      if times[what] == 3 then found("%s grow with every run, now %g, before %g", what, value, before[what]) end
    end
    before = now
  end
end

---Instead of stopping the run: note the first input of each kind of finding in a folder.
local collect_in, collected = os.getenv("QM_FUZZ_COLLECT"), {}
local function note(bytes)
  local kind = finding:gsub("'[^']*'", "''"):gsub("%d+", "#"):gsub("got .*", "")
  if not collected[kind] then
    collected[kind], collected[#collected + 1] = true, kind
    io.stderr:write("FINDING: ", finding, "\n")
    local file = assert(open(("%s/%s-%d"):format(collect_in, target_name, #collected), "wb"))
    file:write(bytes)
    file:close()
  end
  finding = nil
end

local CHECK_EVERY = 5000
local runs = 0

return function(bytes)
  if runs == 0 then once(bytes) end -- what the library keeps for good is made now
  local handles, descriptor = qm.handles_live(), next_descriptor()
  once(bytes)
  if qm.handles_live() > handles or next_descriptor() > descriptor then
    collect()
    if qm.handles_live() > handles then found("%d handles stay alive", qm.handles_live() - handles) end
    if next_descriptor() > descriptor then found("a file stays open") end
  end
  runs = runs + 1
  if runs % CHECK_EVERY == 0 then check_growth(bytes) end
  if finding and collect_in then note(bytes) end
  return finding
end
