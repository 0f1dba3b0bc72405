---The optimizer: AdamW for dense and quantized parameters together.
---
---    local optim = qm.optim.new(model, { lr = qm.schedule.cosine(1e-3, 2000), weight_decay = 0.1 })
---    model:loss(tokens, targets):backward()
---    optim:clip_grad_norm(1)
---    local report = optim:step()     -- { step =, lr =, grad_norm =, skipped = }
---    optim:zero_grad()
---
---A quantized parameter's weight never exists outside its codes, so how a step is rounded decides
---whether anything is learnt: a step below half a grid cell is lost when rounded to nearest. The
---defaults round stochastically and pay the rounding error back (`feedback`).

local check = require("quartermoon.check")
local raise = require("quartermoon.ffi").raise
local attaching = require("quartermoon.optim.attach")
local grouping = require("quartermoon.optim.groups")
local Slot = require("quartermoon.optim.slot")
local qm = require("quartermoon")

local M = {}

---@class qm.Optim
---@field steps integer    steps asked for, skipped ones included: where the schedules stand
---@field skipped integer  steps that non-finite gradients cost
---@field slots table[]    one for each parameter, in order
local Optim = {}
Optim.__index = Optim
M.Optim = Optim

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
  local self = setmetatable({ slots = {}, groups = groups, steps = 0, skipped = 0, scale = 1,
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

local function norm_of(slots)
  return qm.no_grad(function()
    local squares = 0
    local devices = {}
    for _, slot in ipairs(slots) do
      local grad = slot:gradient()
      devices[grad.device] = qm.sum_squares(grad, devices[grad.device])
    end
    for _, total in pairs(devices) do
      squares = squares + total:item()
      total:free()
    end
    return math.sqrt(squares)
  end)
end

---The Euclidean norm over all gradients together, dense and quantized. Waits for the device.
---@return number  NaN or infinite where a gradient is
function Optim:grad_norm()
  self.norm = self.norm or norm_of(active(self)) / self.accumulate
  return self.norm
end

---Let the coming step scale all gradients so that their common norm is at most `max`. The gradients
---themselves are not touched: the update kernels scale as they read.
---@param max number
---@return number norm  before clipping
function Optim:clip_grad_norm(max)
  check.number("optim:clip_grad_norm", "max", max, 0)
  if self.attached then
    raise("optim:clip_grad_norm: an attached optimizer never sees all gradients at once: see attach's clip_each")
  end
  local norm = self:grad_norm()
  self.scale = norm > max and max / norm or 1
  return norm
end

local function is_finite(x) return x == x and math.abs(x) < math.huge end

---Names of the parameters whose gradients hold NaN or infinity.
local function culprits(slots)
  local names = {}
  for _, slot in ipairs(slots) do
    if not is_finite(slot:gradient_norm()) then names[#names + 1] = slot.name end
  end
  return names
end

local STILL_STEPS = 50

---Once in STILL_STEPS steps: which quantized parameters did not move at all?
local function stillness(self)
  if self.steps % STILL_STEPS ~= 0 then return nil end
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
  local step = self.steps + 1
  local report = { step = step, lrs = {} }
  for i, group in ipairs(self.groups) do
    group.rates = { lr = group.schedule(step), lr_next = group.schedule(step + 1) }
    report.lrs[i] = group.rates.lr
  end
  report.lr = report.lrs[1]
  return report
end

---Count the step and look whether codes move.
local function end_step(self, report, bad)
  if report.skipped and self.non_finite == "stop" then
    raise(("optim:step: the gradient of %s is not finite (step %d)"):format(table.concat(bad, ", "), report.step))
  end
  self.steps = report.step
  if report.skipped then self.skipped = self.skipped + 1 else report.warning = stillness(self) end
  return report
end

---Update every parameter that has a gradient. The gradients stay; see zero_grad.
---@return { step: integer, lr: number, lrs: number[], grad_norm: number, skipped: boolean, warning: string|nil }
---   lr is the first group's; skipped: the gradients were not finite and nothing was changed; warning:
---   some quantized parameter's codes have not moved for 50 steps
---@raise when no parameter has a gradient, or with non_finite = "stop" where one is not finite
function Optim:step()
  if self.attached then return end_step(self, attaching.finish(self)) end
  local slots = active(self)
  local norm, scale = self:grad_norm(), self.scale / self.accumulate
  self.norm, self.scale = nil, 1
  local report = self:begin_report()
  report.grad_norm, report.skipped = norm, not is_finite(norm)
  if not report.skipped then
    qm.no_grad(function()
      for _, slot in ipairs(slots) do slot:step(slot.options.rates, scale) end
    end)
  end
  return end_step(self, report, report.skipped and culprits(slots))
end

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
  self.attached, self.open = nil, nil
  return self
end

---Drop every gradient.
function Optim:zero_grad()
  self.norm, self.scale = nil, 1
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

---Continue from a state: bit for bit as if never stopped.
---@param state table  what `state` returned; its tensors are copied
---@raise when it belongs to other parameters
function Optim:load_state(state)
  local name = "optim:load_state"
  local numbers = check.type(name, "numbers", check.type(name, "state", state, "table").numbers, "table")
  if type(numbers.slots) ~= "table" or #numbers.slots ~= #self.slots then
    check.fail(name, "state", ("a state of %d parameters"):format(#self.slots),
      type(numbers.slots) == "table" and #numbers.slots or numbers.slots)
  end
  for i, slot in ipairs(self.slots) do
    local saved = check.type(name, "slots[" .. i .. "]", numbers.slots[i], "table").name
    if saved ~= slot.name then
      check.fail(name, "parameter " .. i, "'" .. slot.name .. "'", saved)
    end
  end
  self.steps = check.integer(name, "steps", numbers.steps, 0)
  self.skipped = check.integer(name, "skipped", numbers.skipped, 0)
  local prefixed = {}
  for key, tensor in pairs(state.tensors) do prefixed[#prefixed + 1] = { key, tensor } end
  for i, slot in ipairs(self.slots) do
    local own, lead = {}, slot.name .. "."
    for _, pair in ipairs(prefixed) do
      if pair[1]:sub(1, #lead) == lead then own[pair[1]:sub(#lead + 1)] = pair[2] end
    end
    slot:load(numbers.slots[i], own)
  end
end

---Release the state.
function Optim:free()
  for _, slot in ipairs(self.slots) do slot:free() end
end

function Optim:__tostring()
  return ("qm.Optim: %d parameters, step %d, %d skipped, %.1f MiB of state"):format(#self.slots, self.steps,
    self.skipped, self:state_bytes() / 2 ^ 20)
end

check.methods("qm.Optim", Optim)

return M
