---An optimizer's options and parameter groups, checked.

local check = require("quartermoon.check")
local module = require("quartermoon.nn.module")
local schedules = require("quartermoon.schedule")

local M = {}

local GROUP_OPTIONS = { lr = 1e-3, betas = { 0.9, 0.99 }, eps = 1e-8, weight_decay = 0, correct_bias = true,
  moments = "f32", rounding = "stochastic", feedback = "auto", residual_bits = 8, mode = "own", grid = "fixed",
  refit_every = 100, refit_method = "minmax", projector = check.optional, seed = 0 }
local OPTIM_OPTIONS = { non_finite = "skip", accumulate = 1 }

local function check_group(name, options)
  check.type(name, "betas", options.betas, "table")
  check.number(name, "betas[1]", options.betas[1], 0, 1)
  check.number(name, "betas[2]", options.betas[2], 0, 1)
  check.number(name, "eps", options.eps, 0)
  check.number(name, "weight_decay", options.weight_decay, 0)
  check.one_of(name, "moments", options.moments, { "f32", "bf16" })
  check.one_of(name, "rounding", options.rounding, { "stochastic", "nearest" })
  check.one_of(name, "feedback", options.feedback, { "auto", "none", "momentum", "residual" })
  check.one_of(name, "residual_bits", options.residual_bits, { 4, 8 })
  check.one_of(name, "mode", options.mode, { "own", "bie" })
  check.one_of(name, "grid", options.grid, { "fixed", "refit" })
  check.one_of(name, "refit_method", options.refit_method, { "minmax", "mse" })
  check.integer(name, "refit_every", options.refit_every, 1)
  check.integer(name, "seed", options.seed, 0, 2 ^ 32 - 1)
  if options.projector then check.type(name, "projector", options.projector, "function") end
  options.schedule = schedules.resolve(name, options.lr)
  return options
end

---The groups of a model, a list of parameters, or a list of groups.
local function groups_of(name, parameters)
  if module.is_module(parameters) then return { { params = parameters } } end
  check.type(name, "parameters", parameters, "table")
  local first = parameters[1]
  if type(first) == "table" and rawget(first, "params") then return parameters end
  return { { params = parameters } }
end

---A group's parameters as { name =, param = }.
function M.entries(name, params)
  if module.is_module(params) then return params:named_parameters() end
  local entries = {}
  for i, entry in ipairs(check.type(name, "params", params, "table")) do
    local param = type(entry) == "table" and rawget(entry, "param") or entry
    if not (check.is_tensor(param) or module.is_quantized(param)) then
      check.fail(name, "params[" .. i .. "]", "a tensor or a QParam", param)
    end
    entries[i] = { param = param, name = rawget(param, "name") or entry ~= param and entry.name or nil }
  end
  return entries
end

---A group's options: its own, else the optimizer's.
local function merged(name, group, defaults)
  local known = { params = check.required }
  for key, value in pairs(GROUP_OPTIONS) do known[key] = value end
  for key, value in pairs(defaults) do known[key] = value end
  return check.options(name, group, known)
end

---@return table[] groups  each with its options, params and schedule
---@return table options   non_finite and accumulate
function M.resolve(name, parameters, options)
  local defaults = {}
  for key, value in pairs(GROUP_OPTIONS) do defaults[key] = value end
  for key, value in pairs(OPTIM_OPTIONS) do defaults[key] = value end
  options = check.options(name, options, defaults)
  local own = { non_finite = check.one_of(name, "non_finite", options.non_finite, { "skip", "stop" }),
    accumulate = check.integer(name, "accumulate", options.accumulate, 1) }
  options.non_finite, options.accumulate = nil, nil
  local groups = {}
  for i, group in ipairs(groups_of(name, parameters)) do
    groups[i] = check_group(name, merged(name, group, options))
  end
  return groups, own
end

return M
