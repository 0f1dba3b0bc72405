---What a step did. Its norm lies on the device until somebody reads it: a loop that shows every tenth
---step waits for the device at every tenth.

local raise = require("quartermoon.ffi").raise

---@class qm.optim.Report
---@field step integer
---@field lr number           the first group's
---@field lrs number[]        each group's
---@field grad_norm number    of all gradients together, before clipping. Reading it waits for the device
---@field skipped boolean     the gradients were not finite, and nothing was changed. Waits
---@field warning string|nil  some quantized parameter's codes have not moved for 50 steps. Waits then
local Report = {}

local function is_finite(x) return x == x and math.abs(x) < math.huge end

local READ = {}
function READ.grad_norm(report, optim)
  report.grad_norm = optim.measure.norm:item()
  return report.grad_norm
end
function READ.skipped(report)
  report.skipped = not is_finite(report.grad_norm)
  return report.skipped
end
function READ.warning(_, optim) return optim:stillness() end

function Report.__index(report, key)
  local read, optim = READ[key], rawget(report, "optim")
  if not read then return nil end
  if optim.last ~= report then
    raise(("report.%s: step %d was taken since this report of step %d, and its numbers are gone: read a report before "
      .. "the next step, or ask optim:report() for the latest"):format(key, optim.steps, report.step))
  end
  return read(report, optim)
end

---The report of a step whose learning rates are these.
---@param optim qm.Optim
---@param step integer
---@param lrs number[]
---@return qm.optim.Report
function Report.new(optim, step, lrs)
  return setmetatable({ optim = optim, step = step, lr = lrs[1], lrs = lrs }, Report)
end

return Report
