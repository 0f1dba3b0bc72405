---Updating each parameter during backward(), the moment its gradient is complete, and dropping the
---gradient at once: full gradients never coexist. Source: the per-layer updates of GaLore, arXiv
---2403.03507, and of LOMO, arXiv 2306.09782.

local raise = require("quartermoon.ffi").raise
local Measure = require("quartermoon.optim.measure")
local Slot = require("quartermoon.optim.slot")
local graph = require("quartermoon.graph")
local qm = require("quartermoon")

local M = {}

---What the step under way has done so far.
local function open_step(optim)
  if not optim.open then
    if graph.recording() then raise("optim: an attached optimizer's steps cannot be recorded: detach() it") end
    optim.open = { report = optim:begin_report(), taken = {}, bad = {} }
    optim.measure:clear()
  end
  return optim.open
end

local function take(optim, slot, clip_each)
  if not slot:gradient() then return end
  local open, each = open_step(optim), optim.each
  if open.taken[slot] then
    raise(("optim: '%s' got a second gradient before optim:step(): an attached optimizer updates at the first one, "
      .. "so call optim:step() after every backward(), and share no parameter between recomputed parts"):format(
      slot.name))
  end
  open.taken[slot] = true
  each:clear()
  each:add({ slot })
  optim.measure:add_all(each)
  local is_bad = optim:is_bad(each, { slot }, open.bad)
  each:settle(1, clip_each or math.huge)
  if not is_bad then
    Slot.step({ slot }, each)
    slot.steps = slot.steps + 1
  end
  slot.param:zero_grad()
end

---See Optim:attach.
function M.attach(optim, clip_each)
  optim.each = Measure.new(optim.slots)
  for _, slot in ipairs(optim.slots) do
    slot.param.on_gradient = function() qm.no_grad(take, optim, slot, clip_each) end
  end
end

---See Optim:detach.
function M.detach(optim)
  for _, slot in ipairs(optim.slots) do slot.param.on_gradient = nil end
  if optim.each then optim.each:free() end
  optim.each, optim.open = nil, nil
end

---End the step that backward() took.
---@return qm.optim.Report report, string[] bad  names of parameters whose gradients are not finite
function M.finish(optim)
  local open = optim.open
  if not open then raise("optim:step: no gradient arrived since the last step: call loss:backward() first") end
  optim.open = nil
  qm.no_grad(optim.measure.settle, optim.measure, 1, math.huge)
  return open.report, open.bad
end

return M
