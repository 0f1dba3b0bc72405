---Learning-rate schedules. A schedule is a function from the step (from 1) to the learning rate, with
---no state: a resumed run needs nothing but its step. Any function of your own will do:
---
---    local lr = qm.schedule.warmup(100, qm.schedule.cosine(1e-3, 2000, 0.02))
---    local mine = function(step) return 1e-3 / math.sqrt(step) end
---
---A decaying schedule starts at its peak in step 1, would reach its final value in the step after its
---last, and stays there.

local check = require("quartermoon.check")
local raise = require("quartermoon.ffi").raise

local M = {}

---A schedule from a number (constant), a function, or a table that can be called.
---@param name string   the function that asks, for the error
---@param value number|function|table
---@return function schedule  step -> learning rate; raises when that is no finite number from 0 on
function M.resolve(name, value)
  if type(value) == "number" then return M.constant(value) end
  local meta = type(value) == "table" and getmetatable(value)
  if type(value) ~= "function" and not (meta and meta.__call) then
    check.fail(name, "lr", "a number or a function of the step", value)
  end
  return function(step)
    local lr = value(step)
    if type(lr) ~= "number" or not (lr >= 0 and lr < math.huge) then
      raise(("%s: the schedule gave %s at step %s, expected a finite number of at least 0"):format(name,
        check.describe(lr), tostring(step)))
    end
    return lr
  end
end

---Always the same.
---@param lr number
function M.constant(lr)
  check.number("qm.schedule.constant", "lr", lr, 0)
  return function() return lr end
end

---How far a phase of `steps` steps has come: 0 in step 1, 1 from step `steps + 1` on.
local function progress(step, steps) return math.min(math.max((step - 1) / steps, 0), 1) end

---From `first` to `last` in a straight line over `steps` steps.
---@param first number
---@param last number
---@param steps integer
function M.linear(first, last, steps)
  local name = "qm.schedule.linear"
  check.number(name, "first", first, 0)
  check.number(name, "last", last, 0)
  check.integer(name, "steps", steps, 1)
  return function(step) return first + (last - first) * progress(step, steps) end
end

---From 1 to 0 along half a cosine wave.
local function half_wave(p) return 0.5 * (1 + math.cos(math.pi * p)) end

---From `peak` to `final * peak` along half a cosine wave. Source: arXiv 1608.03983, without restarts.
---@param peak number
---@param steps integer
---@param final number|nil  a fraction of the peak, default 0
function M.cosine(peak, steps, final)
  local name = "qm.schedule.cosine"
  check.number(name, "peak", peak, 0)
  check.integer(name, "steps", steps, 1)
  final = check.number(name, "final", final or 0, 0)
  return function(step) return peak * (final + (1 - final) * half_wave(progress(step, steps))) end
end

---Up from `start * peak` to `peak` and down to `final * peak`, both along half a cosine wave.
---Source: arXiv 1708.07120 in the form that PyTorch gave it.
---@param peak number
---@param steps integer
---@param options table|nil  { warmup = 0.3 (fraction of the steps), start = 1/25, final = 4e-6 }
function M.one_cycle(peak, steps, options)
  local name = "qm.schedule.one_cycle"
  check.number(name, "peak", peak, 0)
  check.integer(name, "steps", steps, 2)
  options = check.options(name, options, { warmup = 0.3, start = 1 / 25, final = 4e-6 })
  local start, final = check.number(name, "start", options.start, 0), check.number(name, "final", options.final, 0)
  local up = math.floor(check.number(name, "warmup", options.warmup, 0, 1) * steps + 0.5)
  local down = math.max(steps - up, 1)
  return function(step)
    if step <= up then return peak * (1 + (start - 1) * half_wave(progress(step, up))) end
    return peak * (final + (1 - final) * half_wave(progress(step - up, down)))
  end
end

---A count of steps, or a fraction of all steps when below 1.
local function steps_of(name, argument, value, steps)
  check.number(name, argument, value, 0, steps)
  if value < 1 then value = math.floor(value * steps + 0.5) end
  return check.integer(name, argument, value, 0, steps)
end

local DECAY = {
  linear = function(p) return 1 - p end,
  cosine = half_wave,
  sqrt = function(p) return 1 - math.sqrt(p) end,
}

---Warm up, stay, decay: the length of the run may be decided late.
---Source: MiniCPM, arXiv 2404.06395; the decay 1 - sqrt(p): arXiv 2405.18392.
---@param peak number
---@param steps integer  of the whole run
---@param options table|nil  { warmup = 0.01, decay = 0.2 (steps, or fractions below 1), final = 0 (a
---   fraction of the peak), shape = "sqrt" ("linear", "cosine") }
function M.wsd(peak, steps, options)
  local name = "qm.schedule.wsd"
  check.number(name, "peak", peak, 0)
  check.integer(name, "steps", steps, 1)
  options = check.options(name, options, { warmup = 0.01, decay = 0.2, final = 0, shape = "sqrt" })
  check.one_of(name, "shape", options.shape, { "sqrt", "linear", "cosine" })
  local shape, final = DECAY[options.shape], check.number(name, "final", options.final, 0)
  local warmup = steps_of(name, "warmup", options.warmup, steps)
  local decay = steps_of(name, "decay", options.decay, steps)
  if warmup + decay > steps then
    check.fail(name, "decay", ("at most the %d steps that the warm-up leaves"):format(steps - warmup), decay)
  end
  local stable = steps - decay
  return function(step)
    if step <= warmup then return peak * step / warmup end
    if step <= stable then return peak end
    return peak * (final + (1 - final) * (decay == 0 and 1 or shape(progress(step - stable, decay))))
  end
end

---Rise to the first value of `schedule` over `steps` steps, then run it from its step 1.
---@param steps integer  step `steps` is the first at full rate
---@param schedule number|function
function M.warmup(steps, schedule)
  local name = "qm.schedule.warmup"
  check.integer(name, "steps", steps, 0)
  schedule = M.resolve(name, schedule)
  return function(step)
    if step <= steps then return schedule(1) * step / steps end
    return schedule(step - steps)
  end
end

---One schedule after the other, each beginning at its own step 1.
---@param phases table[]  { { steps, schedule }, ... }; the last one goes on for ever
function M.sequence(phases)
  local name = "qm.schedule.sequence"
  check.type(name, "phases", phases, "table")
  if #phases == 0 then check.fail(name, "phases", "at least one phase", #phases) end
  local resolved = {}
  for i, phase in ipairs(phases) do
    check.type(name, "phase " .. i, phase, "table")
    local steps = i < #phases and check.integer(name, "steps of phase " .. i, phase[1], 0) or math.huge
    resolved[i] = { steps = steps, schedule = M.resolve(name, phase[2]) }
  end
  return function(step)
    local i = 1
    while step > resolved[i].steps do
      step = step - resolved[i].steps
      i = i + 1
    end
    return resolved[i].schedule(step)
  end
end

---The product of schedules: `product(warmup(100, 1), cosine(1e-3, 2000))` lets the two overlap.
---@param ... number|function
function M.product(...)
  local factors = {}
  for i = 1, select("#", ...) do factors[i] = M.resolve("qm.schedule.product", (select(i, ...))) end
  return function(step)
    local value = 1
    for i = 1, #factors do value = value * factors[i](step) end
    return value
  end
end

return M
