---One parameter's share of an optimizer: its moments, its projector, how its codes move, and its step.

local check = require("quartermoon.check")
local module = require("quartermoon.nn.module")
local qm = require("quartermoon")

---@class qm.optim.Slot
---@field param qm.Tensor|qm.QParam
---@field name string
---@field id integer           whose random bits its rounding draws
---@field options table        of its group
---@field steps integer        steps taken
local Slot = {}
Slot.__index = Slot

---The rounding error's way back, by width, as measured on text: stochastic rounding alone is enough at
---8 bits; the momentum holds it at 4; below, and under a projector (whose momentum is elsewhere), it
---needs memory of its own.
local function feedback_of(param, options)
  if options.mode == "bie" then return "none" end
  if options.feedback ~= "auto" then return options.feedback end
  if param.residual or options.projector or param.w_bit <= 3 then return "residual" end
  return param.w_bit <= 4 and "momentum" or "none"
end

function Slot.new(param, name, id, options)
  local self = setmetatable({ param = param, name = name, id = id, options = options, steps = 0,
    quantized = module.is_quantized(param) }, Slot)
  self.device = self.quantized and param.data.device or param.device
  -- Norms and biases are not decayed: pulling a gain towards 0 is no regularisation.
  self.weight_decay = (self.quantized or #param.shape > 1) and options.weight_decay or 0
  if self.quantized then
    param.id = id
    self.feedback = feedback_of(param, options)
    self.rounding = options.mode == "bie" and "nearest" or options.rounding
    self.totals, self.moved_before = { elements = 0, moved = 0, clipped = 0, non_finite = 0 }, 0
  end
  if options.projector then self.projector = options.projector(param) end
  -- Finding a subspace or a grid is decided on the host, which then must know that the step is taken.
  self.waits = self.projector ~= nil or (self.quantized and options.grid == "refit")
  return self
end

---What backward() left for this parameter, or nil.
function Slot:gradient()
  if self.quantized then return self.param.privileged_grad end
  return self.param.grad
end

---The Euclidean norm of the gradient. Waits for the device.
function Slot:gradient_norm()
  local total = qm.no_grad(qm.sum_squares, self:gradient())
  local norm = math.sqrt(total:item())
  total:free()
  return norm
end

---Allocate the moments at the gradient's size, projected or not.
local function ensure_moments(self, like)
  if self.exp_avg then return end
  local dtype = self.options.moments
  self.exp_avg, self.exp_avg_sq = like:zeros_like(dtype):keep(), like:zeros_like(dtype):keep()
end

---The tensors that only the quantized step needs.
local function ensure_quantized(self)
  local q = self.param
  if self.feedback == "residual" and not q.residual then
    q:add_residual(self.options.residual_bits, qm.generator(self.options.seed, self.id))
  end
  if not self.health then self.health = qm.zeros({ 4 }, { dtype = "i64", device = q.data.device }):keep() end
end

---The numbers of the next step, as qm.adamw and qm.adam_write take them.
---@param rates { lr: number, lr_next: number }
function Slot:next_numbers(rates)
  local options = self.options
  return { step = self.steps + 1, lr = rates.lr, lr_next = rates.lr_next, beta1 = options.betas[1],
    beta2 = options.betas[2], eps = options.eps, weight_decay = self.weight_decay,
    correct_bias = options.correct_bias, seed = options.seed, parameter = self.id }
end

---Adam's direction of the projected gradient, projected back to the weight's shape.
local function projected_direction(self, grad, adam)
  local low = self.projector:project(grad, self.steps)
  ensure_moments(self, low)
  local direction = qm.adam_direction(low, self.exp_avg, self.exp_avg_sq, adam)
  if low ~= grad then low:free() end
  local full = self.projector:project_back(direction)
  if full ~= direction then direction:free() end
  return full
end

---A projector's step is taken now, others with those of the same device.
local function step_dense(self, grad, adam, together)
  if not self.projector then
    ensure_moments(self, grad)
    together[self.device] = together[self.device] or {}
    table.insert(together[self.device], { param = self.param, grad = grad, exp_avg = self.exp_avg,
      exp_avg_sq = self.exp_avg_sq, options = adam })
    return
  end
  local direction = projected_direction(self, grad, adam)
  qm.adamw(self.param, direction, nil, nil, adam)
  direction:free()
end

local function step_quantized(self, grad, adam)
  ensure_quantized(self)
  local options, own = self.options, self.options.mode == "own"
  local low = self.projector and self.projector:project(grad, self.steps) or grad
  ensure_moments(self, low)
  qm.QParam.update(self.param, { step = self.steps, exp_avg_l = self.exp_avg, exp_avg_s = self.exp_avg_sq,
    grad = low, projector = self.projector, lr = adam.lr, lr_next = adam.lr_next, beta1 = adam.beta1,
    beta2 = adam.beta2, eps = adam.eps, weight_decay = adam.weight_decay, correct_bias = adam.correct_bias,
    seed = adam.seed, live = adam.live, scale = adam.scale, mode = options.mode, rounding = self.rounding,
    feedback = self.feedback, grid = options.grid, refit_every = options.refit_every,
    refit_method = options.refit_method, health = own and self.health or nil })
  if low ~= grad then low:free() end
end

---Take one step of each of these slots with the gradient that is there; dense parameters in one call.
---@param slots qm.optim.Slot[]
---@param measure qm.optim.Measure  whose scale multiplies the gradients; not finite: nothing changes
---@param lives table|nil           of each slot i32 [16]: the step's numbers, then those that lie here, see
---   qm.adam_write
function Slot.step(slots, measure, lives)
  local together = {}
  for _, slot in ipairs(slots) do
    local grad, adam = slot:gradient(), slot:next_numbers(slot.options.rates)
    adam.scale, adam.live = measure:scale(slot.device), lives and lives[slot]
    if slot.quantized then step_quantized(slot, grad, adam) else step_dense(slot, grad, adam, together) end
  end
  for _, steps in pairs(together) do qm.adamw(steps) end
end

---Has it the tensors that a step needs, from an earlier step?
function Slot:is_ready() return self.exp_avg ~= nil and (self.health ~= nil or not self.quantized) end

---Read how the codes moved since the last reading, and add it to the totals. Waits for the device.
function Slot:read_health()
  if not self.health then return self.totals end
  local counts, totals = self.health:host(), self.totals
  totals.elements = totals.elements + tonumber(counts[0])
  totals.moved = totals.moved + tonumber(counts[1])
  totals.clipped = totals.clipped + tonumber(counts[2])
  totals.non_finite = totals.non_finite + tonumber(counts[3])
  self.health:fill(0)
  return totals
end

---Did any code move since this was last asked?
function Slot:moved()
  local moved = self:read_health().moved
  local yes = moved > self.moved_before
  self.moved_before = moved
  return yes
end

---Bytes of the state, the residual of a quantized parameter included.
function Slot:state_bytes()
  local size_bytes = 0
  for _, tensor in pairs(self:tensors()) do size_bytes = size_bytes + tensor:size_bytes() end
  if self.quantized and self.param.residual then size_bytes = size_bytes + self.param.residual:size_bytes() end
  return size_bytes
end

---The tensors that a checkpoint must hold, by name; the residual belongs to the parameter.
---@return table<string, qm.Tensor>
function Slot:tensors()
  local tensors = { exp_avg = self.exp_avg, exp_avg_sq = self.exp_avg_sq }
  local state = self.projector and self.projector.state and self.projector:state()
  for key, tensor in pairs(state and state.tensors or {}) do tensors["projector." .. key] = tensor end
  return tensors
end

---The numbers that a checkpoint must hold.
function Slot:numbers()
  local state = self.projector and self.projector.state and self.projector:state()
  return { name = self.name, steps = self.steps, projector = state and state.numbers }
end

local MOMENTS = { exp_avg = true, exp_avg_sq = true }

---The moments of a file must be those of this parameter; a projector's are smaller.
local function check_moment(name, self, key, tensors)
  local tensor, other = tensors[key], tensors[key == "exp_avg" and "exp_avg_sq" or "exp_avg"]
  if not tensor then return end
  local label, extents = self.name .. "." .. key, table.concat(tensor.shape, ", ")
  local wanted = self.projector and other and other.shape or self.param.shape
  if not other or extents ~= table.concat(wanted, ", ") or tensor.dtype ~= self.options.moments then
    local expected = ("%s [%s] beside its pair"):format(self.options.moments, table.concat(wanted, ", "))
    check.fail(name, label, expected, tensor)
  end
  for i, extent in ipairs(tensor.shape) do
    local most = self.param.shape[i] or 0
    if extent > most then check.fail(name, label, ("at most %d in extent %d"):format(most, i), tensor) end
  end
end

---A projector's own part of the tensors, without copies.
local function projected_part(tensors)
  local projected = {}
  for key, tensor in pairs(tensors) do
    local own = key:match("^projector%.(.*)")
    if own then projected[own] = tensor end
  end
  return projected
end

---Would `load` take this? Changes nothing.
---@param numbers table
---@param tensors table<string, qm.Tensor>
---@raise when it is not this parameter's
function Slot:check(numbers, tensors)
  local name = "optim:load_state"
  check.integer(name, self.name .. ".steps", numbers.steps, 0)
  for key, tensor in pairs(tensors) do
    check.desc(name, self.name .. "." .. key, tensor)
    if not MOMENTS[key] and not (self.projector and key:match("^projector%.")) then
      check.fail(name, "state", "no tensor '" .. self.name .. "." .. key .. "'", tensor)
    end
  end
  for key in pairs(MOMENTS) do check_moment(name, self, key, tensors) end
  if self.projector and self.projector.check_state then
    self.projector:check_state({ numbers = numbers.projector, tensors = projected_part(tensors) })
  end
end

---Continue from what `numbers` and `tensors` gave, and `check` takes.
---@param numbers table
---@param tensors table<string, qm.Tensor>  copied
function Slot:load(numbers, tensors)
  self.steps = numbers.steps
  for key in pairs(MOMENTS) do
    if self[key] then self[key]:free() end
    self[key] = tensors[key] and tensors[key]:to(self.device):keep()
  end
  if self.projector and self.projector.load_state then
    local projected = projected_part(tensors)
    for key, tensor in pairs(projected) do projected[key] = tensor:to(self.device) end -- which keeps copies
    self.projector:load_state({ numbers = numbers.projector, tensors = projected })
    for _, tensor in pairs(projected) do tensor:free() end
  end
end

---Release the state.
function Slot:free()
  for _, key in ipairs({ "exp_avg", "exp_avg_sq", "health" }) do
    if self[key] then self[key]:free() end
    self[key] = nil
  end
  if self.projector and self.projector.free then self.projector:free() end
end

return Slot
