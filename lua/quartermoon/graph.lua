---Graphs: what a function asks of a device, recorded once and replayed without the function. A training
---step is hundreds of kernel calls; on a GPU a replay launches them at once.

local ffi = require("ffi")
local autograd = require("quartermoon.autograd")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local devices = require("quartermoon.device")
local scopes = require("quartermoon.scope")
local tensors = require("quartermoon.tensor")
local lib = binding.lib

local M = {}

---------------------------------------------------------------------------------------------------
-- Recordings
---------------------------------------------------------------------------------------------------

---A recording in progress.
---@class qm.Recording
---@field device qm.Device
---@field hooks function[]
local Recording = {}
Recording.__index = Recording

local current -- the recording in progress

---The recording in progress, or nil. While there is one, operations on its device are noted and not
---run: values cannot be read, and host memory cannot be written to the device.
---@return qm.Recording|nil
function M.recording() return current end

---Call `body()` on the host before each replay, the first one (right behind the recording) included: to
---write the next step's numbers into device memory, where the recorded operations read them.
---@param body function
function Recording:before_replay(body)
  check.type("recording:before_replay", "body", body, "function")
  self.hooks[#self.hooks + 1] = body
end

function Recording.describe(recording) return "a recording on " .. tostring(recording.device) end

---------------------------------------------------------------------------------------------------
-- Graphs
---------------------------------------------------------------------------------------------------

---A function that is recorded after a few calls.
---@class qm.Graph
---@field body function
---@field device qm.Device
---@field warmup integer
---@field calls integer          how often it was called
---@field inputs table|nil       the tensors that the function gets, and the values of other arguments
---@field results table|nil      what the recorded function returned
---@field handle ffi.cdata*|nil  the recording
local Graph = {}
Graph.__index = Graph

---A function that does what `body` does, and after some calls without running it: its operations are
---recorded and replayed, on the same memory.
---
---    local step = qm.graph(function(tokens, targets)
---      local loss = model:loss(tokens, targets)
---      loss:backward()
---      optim:step()
---      optim:zero_grad()
---      return loss
---    end)
---    for tokens, targets in batches do print(step(tokens, targets):item()) end
---
---`body` runs in a qm.scope, so what it does not return or :keep() is released. Its results are tensors
---(or tables and numbers, which stay those of the recording), in memory that each call overwrites; they
---are no part of the gradient tape. Its arguments are tensors of shapes, types and other values that
---stay; every call copies them to where `body` reads them. What decides what is launched (Lua's `if`s,
---numbers, shapes) is that of the recording. Reading a value (:item(), printing) or making a tensor of
---Lua numbers inside `body` raises while it is recorded: return the tensor, pass it in.
---
---@param body function  tensors -> tensors
---@param options table|nil  { warmup = 2: calls that just run, so that states and caches exist;
---   eager = false: true never records; device = default }
---@return qm.Graph  call it; :free() it
function M.graph(body, options)
  local name = "qm.graph"
  check.type(name, "body", body, "function")
  options = check.options(name, options, { warmup = 2, eager = false, device = check.optional })
  check.integer(name, "warmup", options.warmup, 0)
  check.type(name, "eager", options.eager, "boolean")
  return setmetatable({ body = body, device = devices.resolve(name, options.device), calls = 0,
    warmup = options.eager and math.huge or options.warmup }, Graph)
end

---A place for each argument, which every call fills.
local function make_inputs(self, ...)
  local inputs = { count = select("#", ...) }
  for i = 1, inputs.count do
    local value = (select(i, ...))
    if check.is_tensor(value) then
      value:alive("graph")
      value = tensors.empty(value.shape, { dtype = value.dtype, device = self.device }):keep()
    end
    inputs[i] = value
  end
  return inputs
end

local function fill_inputs(self, ...)
  self.inputs = self.inputs or make_inputs(self, ...)
  local inputs = self.inputs
  if select("#", ...) ~= inputs.count then
    check.fail("graph", "arguments", ("%d of them, as in the first call"):format(inputs.count), select("#", ...))
  end
  for i = 1, inputs.count do
    local value, input = (select(i, ...)), inputs[i]
    local name = "argument " .. i
    if not check.is_tensor(input) then
      if value ~= input then check.fail("graph", name, check.describe(input) .. ", as in the first call", value) end
    else
      check.desc("graph", name, value)
      if value.dtype ~= input.dtype or table.concat(value.shape, ",") ~= table.concat(input.shape, ",") then
        check.fail("graph", name, check.describe(input) .. ", as in the first call", value)
      end
      input:copy(value)
      if autograd.needs_grad(value) then
        check.fail("graph", name, "a tensor that no gradient flows to (use parameters inside)", value)
      end
    end
  end
end

local function check_results(...)
  for i = 1, select("#", ...) do
    local result = (select(i, ...))
    if check.is_tensor(result) and result.node then
      check.fail("graph", "body", "a function that calls backward() itself, or runs under qm.no_grad: result "
        .. i .. " is still on the gradient tape", result)
    end
  end
  return ...
end

local function run(self)
  return scopes.scope(function(...) return check_results(self.body(...)) end,
    unpack(self.inputs, 1, self.inputs.count))
end

local function pack(...) return { count = select("#", ...), ... } end

local out_graph = ffi.new("qm_graph *[1]")

---Note what `body` does; nothing runs yet.
local function record(self)
  binding.check(lib.qm_graph_begin(self.device.handle), "graph")
  current = setmetatable({ device = self.device, hooks = {} }, Recording)
  local results = pack(pcall(run, self))
  self.hooks, current = current.hooks, nil
  if not results[1] then
    lib.qm_graph_end(self.device.handle, nil)
    error(results[2], 0)
  end
  binding.check(lib.qm_graph_end(self.device.handle, out_graph), "graph")
  self.handle = ffi.gc(out_graph[0], lib.qm_graph_release)
  for i = 2, results.count do
    if check.is_tensor(results[i]) then results[i]:keep() end
  end
  self.results = results
end

---The results, tensors as new views: freeing them does no harm.
local function share(results, i)
  if i > results.count then return end
  local result = results[i]
  if check.is_tensor(result) then result = result:share() end
  return result, share(results, i + 1)
end

function Graph:__call(...)
  if self.freed then binding.raise("graph: this graph was freed") end
  if current or self.warmup == math.huge then return scopes.scope(self.body, ...) end
  fill_inputs(self, ...)
  self.calls = self.calls + 1
  if not self.handle then
    if self.calls <= self.warmup then return run(self) end
    record(self)
  end
  for _, hook in ipairs(self.hooks) do hook() end
  binding.check(lib.qm_graph_launch(self.handle), "graph")
  return share(self.results, 2)
end

---Release the recording, its memory and its results. Results that were handed out stay as they are.
function Graph:free()
  if self.freed then return end
  self.freed = true
  if self.handle then lib.qm_graph_release(ffi.gc(self.handle, nil)) end
  for _, list in pairs({ self.inputs or {}, self.results or {} }) do
    for i = 1, list.count or 0 do
      if check.is_tensor(list[i]) then list[i]:free() end
    end
  end
  self.handle, self.inputs, self.results, self.hooks = nil, nil, nil, nil
end

function Graph.describe(graph)
  if not graph.handle then return "qm.Graph, " .. (graph.freed and "freed" or "not recorded yet") end
  return ("qm.Graph of %d kernel calls, %.1f MiB of its own"):format(tonumber(lib.qm_graph_count(graph.handle)),
    tonumber(lib.qm_graph_bytes(graph.handle)) / 2 ^ 20)
end
Graph.__tostring = Graph.describe

M.Recording, M.Graph = Recording, Graph
check.methods("qm.Recording", Recording, { describe = true })
check.methods("qm.Graph", Graph, { describe = true })

return M
