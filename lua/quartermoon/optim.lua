---The optimizer: AdamW for dense and quantized parameters together.
---
---    local optim = qm.optim.new(model, { lr = qm.schedule.cosine(1e-3, 2000), weight_decay = 0.1 })
---    model:loss(tokens, targets):backward()
---    optim:clip_grad_norm(1)
---    local report = optim:step()     -- { step =, lr =, grad_norm =, skipped = ... }
---    optim:zero_grad()
---
---A quantized parameter's weight never exists outside its codes, so how a step is rounded decides
---whether anything is learnt: a step below half a grid cell is lost when rounded to nearest. The
---defaults round stochastically and pay the rounding error back (`feedback`).

local check = require("quartermoon.check")
local raise = require("quartermoon.ffi").raise
local attaching = require("quartermoon.optim.attach")
local graph = require("quartermoon.graph")
local grouping = require("quartermoon.optim.groups")
local Measure = require("quartermoon.optim.measure")
local recorded = require("quartermoon.optim.recorded")
local Report = require("quartermoon.optim.report")
local Slot = require("quartermoon.optim.slot")
local qm = require("quartermoon")

local M = {}

---@class qm.Optim
---@field steps integer    steps asked for, skipped ones included: where the schedules stand
---@field skipped integer  steps that non-finite gradients cost. Reading it waits for the device
---@field slots table[]    one for each parameter, in order
local Optim = {}
M.Optim = Optim

function Optim.__index(self, key)
  if key == "skipped" then return rawget(self, "measure").skipped:item() end
  return Optim[key]
end

---@param parameters qm.Module|table  a model; a list of parameters (or { name =, param = }); or a list of
---   groups { params = (a module or a list), and any option below but non_finite and accumulate }
---@param options table|nil
---   lr = 1e-3                  a number or a schedule, see qm.schedule
---   betas = { 0.9, 0.99 }, eps = 1e-8, weight_decay = 0 (decoupled; not for tensors of one dimension),
---   correct_bias = true
---   moments = "f32"            or "bf16", rounded stochastically
---   rounding = "stochastic"    of quantized parameters; "nearest" loses small steps
---   feedback = "auto"          "none", "momentum" (arXiv 2601.22101), "residual"; auto: none at 8 bits,
---                              momentum at 4, residual below and under a projector
---   residual_bits = 8          or 4
---   mode = "own"               "bie": the original system's step, to the bit
---   grid = "fixed"             "refit": fit scales and zeros anew every refit_every = 100 steps by
---                              refit_method = "minmax" or "mse"
---   projector = nil            function(param) -> projector or nil, see qm.projector
---   seed = 0                   of the rounding
---   non_finite = "skip"        what to do with a step whose gradients hold NaN or infinity; "stop" raises
---   accumulate = 1             gradients are the sum of so many backward passes: take their mean
---@return qm.Optim
function M.new(parameters, options)
  local name = "qm.optim.new"
  local groups, own = grouping.resolve(name, parameters, options)
  local self = setmetatable({ slots = {}, groups = groups, steps = 0, looked_at = 0, max_norm = math.huge,
    non_finite = own.non_finite, accumulate = own.accumulate }, Optim)
  local seen = {}
  for _, group in ipairs(groups) do
    for _, entry in ipairs(grouping.entries(name, group.params)) do
      local id = #self.slots + 1
      local label = entry.name or "parameter " .. id
      if seen[entry.param] then raise(("%s: '%s' is there twice"):format(name, label)) end
      seen[entry.param] = true
      self.slots[id] = Slot.new(entry.param, label, id, group)
    end
  end
  if #self.slots == 0 then check.fail(name, "parameters", "at least one parameter", parameters) end
  self.measure, self.rooms = Measure.new(self.slots), recorded.rooms(self.slots)
  return self
end

---The slots whose parameter has a gradient.
local function active(self)
  local slots = {}
  for _, slot in ipairs(self.slots) do
    if slot:gradient() then slots[#slots + 1] = slot end
  end
  if #slots == 0 then raise("optim:step: no parameter has a gradient: call loss:backward() first") end
  return slots
end

---Sum the squares of the gradients, once a step.
local function measure(self, slots)
  if self.measured then return end
  qm.no_grad(function()
    self.measure:clear()
    self.measure:add(slots)
  end)
  self.measured = true
end

---The Euclidean norm over all gradients together, dense and quantized. Waits for the device.
---@return number  NaN or infinite where a gradient is
function Optim:grad_norm()
  measure(self, active(self))
  return qm.no_grad(self.measure.norm_so_far, self.measure) / self.accumulate
end

---Let the coming step scale all gradients so that their common norm is at most `max`. The gradients
---themselves are not touched: the update kernels scale as they read, by what the device finds out. The
---norm before clipping is the report's `grad_norm`.
---@param max number
function Optim:clip_grad_norm(max)
  check.number("optim:clip_grad_norm", "max", max, 0)
  if self.attached then
    raise("optim:clip_grad_norm: an attached optimizer never sees all gradients at once: see attach's clip_each")
  end
  self.max_norm = max
end

local function is_finite(x) return x == x and math.abs(x) < math.huge end

---Must a step be skipped? Only where the host has to know is it told; elsewhere the update kernels see
---for themselves. Adds the names of the parameters whose gradients hold NaN or infinity to `bad`.
function Optim:is_bad(gradients, slots, bad)
  check.instance("optim:is_bad", "gradients", gradients, Measure, "measure of gradients")
  check.type("optim:is_bad", "bad", bad, "table")
  for i, slot in ipairs(check.type("optim:is_bad", "slots", slots, "table")) do
    check.instance("optim:is_bad", ("slots[%d]"):format(i), slot, Slot, "slot of an optimizer")
  end
  local waits = self.non_finite == "stop"
  for _, slot in ipairs(slots) do waits = waits or slot.waits end
  if not waits or is_finite(gradients:norm_so_far()) then return false end
  for _, slot in ipairs(slots) do
    if not is_finite(slot:gradient_norm()) then bad[#bad + 1] = slot.name end
  end
  return true
end

local STILL_STEPS = 50

---Which quantized parameters did not move at all since this was last asked? Looked at once in STILL_STEPS
---steps, when a report's warning is read.
function Optim:stillness()
  if math.floor(self.steps / STILL_STEPS) == self.looked_at then return nil end
  self.looked_at = math.floor(self.steps / STILL_STEPS)
  local still, count = nil, 0
  for _, slot in ipairs(self.slots) do
    if slot.health and not slot:moved() then
      still, count = still or slot, count + 1
    end
  end
  if not still then return nil end
  return ("the codes of '%s'%s did not move in %d steps (learning rate %.3g): %s"):format(still.name,
    count > 1 and (" and of %d other parameters"):format(count - 1) or "", STILL_STEPS,
    still.options.schedule(self.steps), still.rounding == "nearest"
      and "rounding to nearest loses every step below half a grid cell; use rounding = 'stochastic'"
      or "is the learning rate high enough, and does a gradient arrive?")
end

---The report of the coming step, with every group's learning rates worked out.
function Optim:begin_report()
  local step, lrs = self.steps + 1, {}
  for i, group in ipairs(self.groups) do
    group.rates = { lr = group.schedule(step), lr_next = group.schedule(step + 1) }
    lrs[i] = group.rates.lr
  end
  return Report.new(self, step, lrs)
end

---Count the step.
function Optim:end_step(report)
  check.instance("optim:end_step", "report", report, Report, "report of optim:begin_report")
  self.steps, self.last = report.step, report
  return report
end

local function stop_if_bad(self, report, bad)
  if #bad == 0 or self.non_finite ~= "stop" then return end
  raise(("optim:step: the gradient of %s is not finite (step %d)"):format(table.concat(bad, ", "), report.step))
end

---Update every parameter that has a gradient. The gradients stay; see zero_grad. Nothing is waited for,
---unless non_finite = "stop", a projector or a grid that is fitted anew wants to know.
---
---Inside a qm.graph the step is recorded; every replay takes the next one: its number and learning rates
---are written before. Then ask optim:report() afterwards.
---@return qm.optim.Report  { step, lr, lrs, grad_norm, skipped, warning }: the latter three are read from
---   the device when asked for, and only until the next step. A skipped step changed nothing, for its
---   gradients were not finite, but it counts, in the schedules and Adam's bias correction too
---@raise when no parameter has a gradient, or with non_finite = "stop" where one is not finite
function Optim:step()
  if self.attached then
    local report, bad = attaching.finish(self)
    stop_if_bad(self, report, bad)
    return self:end_step(report)
  end
  local slots, recording = active(self), graph.recording()
  if recording then recorded.refuse(self, slots) end
  local report, max_norm, bad = self:begin_report(), self.max_norm, {}
  measure(self, slots)
  self.measured, self.max_norm = nil, math.huge
  return qm.no_grad(function()
    local skip = self:is_bad(self.measure, slots, bad)
    stop_if_bad(self, report, bad)
    self.measure:settle(1 / self.accumulate, max_norm)
    if recording then return recorded.step(self, slots, recording, report) end
    if not skip then
      Slot.step(slots, self.measure)
      for _, slot in ipairs(slots) do slot.steps = slot.steps + 1 end
    end
    return self:end_step(report)
  end)
end

---The report of the latest step, a replayed one too.
---@return qm.optim.Report|nil  nil before the first step
function Optim:report() return self.last end

---From now on, update each parameter during backward(), the moment its gradient is complete, and drop
---the gradient: full gradients never coexist, which saves more memory than 4-bit weights take. One
---backward() to a step; optim:step() then only ends the step and reports. A parameter whose gradient is
---not finite is left alone; the others are updated.
---@param options table|nil  { clip_each = nil: scale each gradient to at most this norm by itself }
---@return qm.Optim self
function Optim:attach(options)
  local name = "optim:attach"
  options = check.options(name, options, { clip_each = check.optional })
  if self.accumulate > 1 then raise(name .. ": an attached optimizer cannot accumulate gradients") end
  if options.clip_each then check.number(name, "clip_each", options.clip_each, 0) end
  attaching.attach(self, options.clip_each)
  self.attached = true
  return self
end

---Undo attach.
---@return qm.Optim self
function Optim:detach()
  attaching.detach(self)
  self.attached = nil
  return self
end

---Drop every gradient.
function Optim:zero_grad()
  self.measured, self.max_norm = nil, math.huge
  for _, slot in ipairs(self.slots) do slot.param:zero_grad() end
end

---How the codes of the quantized parameters moved so far, shares of all code updates. Waits.
---@return { name: string, moved: number, clipped: number, non_finite: integer }[]
function Optim:health()
  local list = {}
  for _, slot in ipairs(self.slots) do
    if slot.quantized then
      local totals = slot:read_health()
      local count = math.max(totals.elements, 1)
      list[#list + 1] = { name = slot.name, moved = totals.moved / count, clipped = totals.clipped / count,
        non_finite = totals.non_finite }
    end
  end
  return list
end

---Bytes of moments, projectors and residuals.
function Optim:state_bytes()
  local size_bytes = 0
  for _, slot in ipairs(self.slots) do size_bytes = size_bytes + slot:state_bytes() end
  return size_bytes
end

---Everything a checkpoint must hold. The tensors are the optimizer's own: read them before the next step.
---@return { numbers: table, tensors: table<string, qm.Tensor> }
function Optim:state()
  local state = { numbers = { steps = self.steps, skipped = self.skipped, slots = {} }, tensors = {} }
  for i, slot in ipairs(self.slots) do
    state.numbers.slots[i] = slot:numbers()
    for key, tensor in pairs(slot:tensors()) do state.tensors[slot.name .. "." .. key] = tensor end
  end
  return state
end

---Each slot's part of a state's tensors, without the slot's name before theirs.
local function share_out(self, name, state)
  local parts, by_name = {}, {}
  for _, slot in ipairs(self.slots) do
    parts[slot], by_name[slot.name] = {}, slot
  end
  for key, tensor in pairs(check.type(name, "tensors", state.tensors, "table")) do
    local path, slot = check.type(name, "a tensor's name", key, "string"), nil
    while not slot and path do -- names hold dots: the longest that is a parameter's
      path = path:match("^(.*)%.[^.]*$")
      slot = path and by_name[path]
    end
    if not slot then check.fail(name, "state", "tensors of this optimizer's parameters", key) end
    parts[slot][key:sub(#path + 2)] = tensor
  end
  return parts
end

---Would load_state take this state? Changes nothing.
---@param state table  what `state` returned
---@return table<qm.optim.Slot, table<string, qm.Tensor>> parts
---@raise when it belongs to other parameters
function Optim:check_state(state)
  local name = "optim:load_state"
  local numbers = check.type(name, "numbers", check.type(name, "state", state, "table").numbers, "table")
  if type(numbers.slots) ~= "table" or #numbers.slots ~= #self.slots then
    check.fail(name, "state", ("a state of %d parameters"):format(#self.slots),
      type(numbers.slots) == "table" and #numbers.slots or numbers.slots)
  end
  check.integer(name, "steps", numbers.steps, 0)
  check.integer(name, "skipped", numbers.skipped, 0)
  local parts = share_out(self, name, state)
  for i, slot in ipairs(self.slots) do
    local saved = check.type(name, "slots[" .. i .. "]", numbers.slots[i], "table")
    if saved.name ~= slot.name then check.fail(name, "parameter " .. i, "'" .. slot.name .. "'", saved.name) end
    slot:check(saved, parts[slot])
  end
  return parts
end

---Continue from a state: bit for bit as if never stopped.
---@param state table  what `state` returned; its tensors are copied
---@raise when it belongs to other parameters; nothing changes then
function Optim:load_state(state)
  local parts, numbers = self:check_state(state), state.numbers
  self.steps = numbers.steps
  self.measure.skipped:fill(numbers.skipped)
  self.looked_at = math.floor(self.steps / STILL_STEPS)
  for i, slot in ipairs(self.slots) do slot:load(numbers.slots[i], parts[slot]) end
end

---Release the state.
function Optim:free()
  for _, slot in ipairs(self.slots) do slot:free() end
  attaching.detach(self)
  self.measure:free()
  for _, room in ipairs(self.rooms) do room.rows:free() end
end

function Optim:__tostring()
  return ("qm.Optim: %d parameters, step %d, %d skipped, %.1f MiB of state"):format(#self.slots, self.steps,
    self.skipped, self:state_bytes() / 2 ^ 20)
end

check.methods("qm.Optim", Optim)

return M
