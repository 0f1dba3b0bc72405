---An optimizer's step inside a qm.graph: recorded once, its numbers written anew before each replay.

local raise = require("quartermoon.ffi").raise
local Slot = require("quartermoon.optim.slot")
local qm = require("quartermoon")

local M = {}

---Raise where a step cannot be recorded.
---@param optim qm.Optim
---@param slots qm.optim.Slot[]  those that take a step
function M.refuse(optim, slots)
  if optim.non_finite == "stop" then
    raise("optim:step: non_finite = 'stop' reads every step's norm, which a recording cannot: use 'skip', and look at "
      .. "optim:report().skipped")
  end
  for _, slot in ipairs(slots) do
    if slot.projector then
      raise(("optim:step: the projector of '%s' looks at gradients on the host and cannot be recorded: call this step "
        .. "without qm.graph"):format(slot.name))
    elseif slot.waits then
      raise(("optim:step: grid = 'refit' ('%s') is decided on the host and cannot be recorded"):format(slot.name))
    elseif not slot:is_ready() then
      raise(("optim:step: '%s' would take its very first step inside a recording: let qm.graph warm up, or take one "
        .. "step before"):format(slot.name))
    end
  end
end

---Room for the numbers of the steps that are recorded, a row of `live` to each slot. It must be there
---before a recording, whose own memory serves many tensors in turn.
---@param slots qm.optim.Slot[]
---@return table[] rooms  of each device { slots =, rows = i32 [#slots, 16] }
function M.rooms(slots)
  local rooms, by_device = {}, {}
  for _, slot in ipairs(slots) do
    local room = by_device[slot.device]
    if not room then
      room = { slots = {}, device = slot.device }
      by_device[slot.device], rooms[#rooms + 1] = room, room
    end
    table.insert(room.slots, slot)
  end
  for _, room in ipairs(rooms) do
    room.rows = qm.zeros({ #room.slots, 16 }, { dtype = "i32", device = room.device }):keep()
  end
  return rooms
end

---Write the numbers of every slot's next step.
local function write_numbers(rooms)
  for _, room in ipairs(rooms) do
    local numbers = {}
    for i, slot in ipairs(room.slots) do numbers[i] = slot:next_numbers(slot.options.rates) end
    qm.adam_write(numbers, room.rows)
  end
end

---Record the step of these slots. Replays take it: the recording itself changes nothing.
---@param optim qm.Optim
---@param slots qm.optim.Slot[]
---@param recording qm.Recording
---@param report qm.optim.Report  the coming step's
---@return qm.optim.Report report
function M.step(optim, slots, recording, report)
  local lives = {}
  for _, room in ipairs(optim.rooms) do
    for i, slot in ipairs(room.slots) do lives[slot] = room.rows:narrow(i, 1):reshape(16) end
  end
  Slot.step(slots, optim.measure, lives)
  for _, row in pairs(lives) do row:free() end
  recording:before_replay(function()
    local next_report = optim:begin_report()
    write_numbers(optim.rooms)
    for _, slot in ipairs(slots) do slot.steps = slot.steps + 1 end
    optim:end_step(next_report)
  end)
  return report
end

return M
