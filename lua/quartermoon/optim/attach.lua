---Updating each parameter during backward(), the moment its gradient is complete, and dropping the
---gradient at once: full gradients never coexist. Source: the per-layer updates of GaLore, arXiv
---2403.03507, and of LOMO, arXiv 2306.09782.

local raise = require("quartermoon.ffi").raise

local M = {}

local function is_finite(x) return x == x and math.abs(x) < math.huge end

---What the step under way has done so far.
local function open_step(optim)
  if not optim.open then
    optim.open = { report = optim:begin_report(), squares = 0, taken = {}, bad = {} }
  end
  return optim.open
end

local function take(optim, slot, clip_each)
  if not slot:gradient() then return end
  local open = open_step(optim)
  if open.taken[slot] then
    raise(("optim: '%s' got a second gradient before optim:step(): an attached optimizer updates at the first one, "
      .. "so call optim:step() after every backward(), and share no parameter between recomputed parts"):format(
      slot.name))
  end
  open.taken[slot] = true
  local norm = slot:gradient_norm()
  open.squares = open.squares + norm * norm
  if is_finite(norm) then
    slot:step(slot.options.rates, clip_each and norm > clip_each and clip_each / norm or 1)
  else
    open.bad[#open.bad + 1] = slot.name
  end
  slot.param:zero_grad()
end

---See Optim:attach.
function M.attach(optim, clip_each)
  for _, slot in ipairs(optim.slots) do
    slot.param.on_gradient = function() take(optim, slot, clip_each) end
  end
end

---See Optim:detach.
function M.detach(optim)
  for _, slot in ipairs(optim.slots) do slot.param.on_gradient = nil end
end

---End the step that backward() took: the report without its warning.
function M.finish(optim)
  local open = optim.open
  if not open then raise("optim:step: no gradient arrived since the last step: call loss:backward() first") end
  optim.open = nil
  open.report.grad_norm = math.sqrt(open.squares)
  open.report.skipped = #open.bad > 0
  return open.report, open.bad
end

return M
