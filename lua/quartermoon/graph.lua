---Graphs: record what a function launches on a device once, and replay it without the function.

local check = require("quartermoon.check")

local M = {}

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

---Call `body()` on the host before each replay, the first included: to write the next step's numbers
---into device memory, where the recorded operations read them.
---@param body function
function Recording:before_replay(body)
  check.type("recording:before_replay", "body", body, "function")
  self.hooks[#self.hooks + 1] = body
end

---A function that does what `body` does.
---@param body function
---@return function
function M.graph(body)
  check.type("qm.graph", "body", body, "function")
  return body
end

check.methods("qm.Recording", Recording)

return M
