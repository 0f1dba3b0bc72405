---What a step's gradients say about it, worked out where they lie: their norm, how far the step scales
---them, and whether it is skipped because they are not finite. Only reading a number waits for the device.

local qm = require("quartermoon")

---@class qm.optim.Measure
---@field norm qm.Tensor     f32 {}: of the gradients together
---@field skipped qm.Tensor  i64 {}: how many steps were not finite
---@field places table       of each device the sum of squares and the scale, f32 {}; the first one's decide
local Measure = {}
Measure.__index = Measure

---@param slots qm.optim.Slot[]
---@return qm.optim.Measure
function Measure.new(slots)
  local self = setmetatable({ places = {} }, Measure)
  for _, slot in ipairs(slots) do
    if not self:place(slot.device) then
      local there = { device = slot.device }
      self.places[#self.places + 1] = { device = slot.device, squares = qm.zeros({}, there):keep(),
        scale = qm.ones({}, there):keep() }
    end
  end
  local there = { device = self.places[1].device }
  self.norm = qm.zeros({}, there):keep()
  self.skipped = qm.zeros({}, { dtype = "i64", device = there.device }):keep()
  return self
end

function Measure:place(device)
  for _, place in ipairs(self.places) do
    if place.device == device then return place end
  end
end

---Start anew.
function Measure:clear()
  for _, place in ipairs(self.places) do place.squares:fill(0) end
end

---Count gradients in, those of each device at once.
---@param slots qm.optim.Slot[]  with gradients
function Measure:add(slots)
  for _, place in ipairs(self.places) do
    local gradients = {}
    for _, slot in ipairs(slots) do
      if slot.device == place.device then gradients[#gradients + 1] = slot:gradient() end
    end
    qm.sum_squares(gradients, place.squares)
  end
end

---Count in what another measure of the same slots holds.
function Measure:add_all(other)
  for i, place in ipairs(self.places) do place.squares:add_(other.places[i].squares) end
end

---Bring the sums of all devices together.
local function gather(self)
  local first = self.places[1]
  for i = 2, #self.places do
    local moved = self.places[i].squares:to(first.device)
    first.squares:add_(moved)
    self.places[i].squares:fill(0)
    moved:free()
  end
  return first
end

---Work out norm and scale of factor * gradient, clipped to max_norm; count the step if it is skipped.
function Measure:settle(factor, max_norm)
  local first = gather(self)
  qm.grad_scale(first.squares, self.norm, first.scale, self.skipped, { factor = factor, max_norm = max_norm })
  for i = 2, #self.places do self.places[i].scale:copy(first.scale) end
end

---The scale, where the gradients of `device` can read it.
---@return qm.Tensor f32 {}
function Measure:scale(device) return self:place(device).scale end

---The norm of what was counted in so far. Waits.
function Measure:norm_so_far() return math.sqrt(gather(self).squares:item()) end

---Release the tensors.
function Measure:free()
  for _, place in ipairs(self.places) do
    place.squares:free()
    place.scale:free()
  end
  self.norm:free()
  self.skipped:free()
end

return Measure
