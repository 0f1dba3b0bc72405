---The convention that layers share. A module is a table whose class has `forward`; calling the module
---calls it. Parameters (tensors or QParams) and sub-modules are registered in order and are then plain
---fields, so a model is taken apart by indexing: `model.model.layers[1].self_attn.q_proj.weight`.

local check = require("quartermoon.check")
local raise = require("quartermoon.ffi").raise

local M = {}

---@class qm.Module
---@field members string[]  names of what was registered, in order
local Module = {}
Module.__index = Module
M.Module = Module

---A class of modules: a table for its methods, `forward` among them.
---@param class_name string  what printing shows
function M.class(class_name)
  local class = setmetatable({ class_name = class_name }, { __index = Module })
  class.__index = class
  class.__call = function(self, ...) return self:forward(...) end
  class.__tostring = Module.__tostring
  class.describe = function(self) return "a module " .. self.class_name end
  return class
end

---A new, empty module of a class made with `class`.
function M.create(class) return setmetatable({ members = {} }, class) end

---A parameter that is quantized, rather than a tensor or a module?
local function is_quantized(value) return type(value) == "table" and rawget(value, "w_bit") ~= nil end
M.is_quantized = is_quantized

local function is_module(value) return type(value) == "table" and rawget(value, "members") ~= nil end
M.is_module = is_module

---Make a parameter or a module part of this one: a field, and a member of its name lists.
---@param name string
---@param value qm.Tensor|qm.QParam|qm.Module
---@return any value
function Module:register(name, value)
  if not (check.is_tensor(value) or is_quantized(value) or is_module(value)) then
    check.fail("module:register", name, "a tensor, a QParam or a module", value)
  end
  if rawget(self, name) == nil then self.members[#self.members + 1] = name end
  rawset(self, name, value)
  if check.is_tensor(value) then value:keep() end
  return value
end

local function gather(module, prefix, entries, seen)
  for _, name in ipairs(module.members) do
    local value, path = module[name], prefix .. name
    if is_module(value) then
      gather(value, path .. ".", entries, seen)
    elseif not seen[value] then
      seen[value] = true
      value.name = path
      entries[#entries + 1] = { name = path, param = value }
    end
  end
  return entries
end

---Every parameter with its path, in the order of registration; a shared one counts once. Sets each
---parameter's `name` to its path.
---@return { name: string, param: qm.Tensor|qm.QParam }[]
function Module:named_parameters() return gather(self, "", {}, {}) end

---@return (qm.Tensor|qm.QParam)[]  the same without names
function Module:parameters()
  local parameters = {}
  for i, entry in ipairs(self:named_parameters()) do parameters[i] = entry.param end
  return parameters
end

---Freeze or thaw every parameter.
---@param wanted boolean
---@return qm.Module self
function Module:requires_gradient(wanted)
  for _, param in ipairs(self:parameters()) do param.requires_grad = wanted end
  return self
end

---Drop every gradient.
function Module:zero_grad()
  for _, param in ipairs(self:parameters()) do M.zero_grad(param) end
end

---Drop one parameter's gradient.
function M.zero_grad(param)
  if not is_quantized(param) then return param:zero_grad() end
  if param.privileged_grad then param.privileged_grad:free() end
  param.privileged_grad = nil
end

---Weights of one parameter: those of the dense matrix, for a quantized one.
function M.parameter_count(param)
  if is_quantized(param) then return param.shape[1] * param.shape[2] end
  return param:count()
end

local QUANTIZED_FIELDS = { "data", "scales", "zeros", "g_idx", "q_perm", "residual" }

---The tensors that a parameter is stored in: { field =, tensor = } in a fixed order.
function M.parts(param)
  if not is_quantized(param) then return { { field = "", tensor = param } } end
  local parts = {}
  for _, field in ipairs(QUANTIZED_FIELDS) do
    local tensor = rawget(param, field)
    if check.is_tensor(tensor) then parts[#parts + 1] = { field = field, tensor = tensor } end
  end
  return parts
end

---Bytes that one parameter takes up, without gradient and optimizer state.
function M.parameter_bytes(param)
  local size_bytes = 0
  for _, part in ipairs(M.parts(param)) do size_bytes = size_bytes + part.tensor:size_bytes() end
  return size_bytes
end

---How many weights this module has; a shared parameter counts once.
function Module:parameter_count()
  local count = 0
  for _, param in ipairs(self:parameters()) do count = count + M.parameter_count(param) end
  return count
end

---Bytes that the weights take up: codes, scales, zeros, residuals, dense tensors.
function Module:weight_bytes()
  local size_bytes = 0
  for _, param in ipairs(self:parameters()) do size_bytes = size_bytes + M.parameter_bytes(param) end
  return size_bytes
end

---Bits that a weight takes up on average, over the quantized parameters and over all.
---@return number|nil quantized, number all
function Module:bits_per_weight()
  local count, size_bytes = 0, 0
  for _, param in ipairs(self:parameters()) do
    if is_quantized(param) then
      count, size_bytes = count + M.parameter_count(param), size_bytes + M.parameter_bytes(param)
    end
  end
  return count > 0 and 8 * size_bytes / count or nil, 8 * self:weight_bytes() / self:parameter_count()
end

---Release every parameter.
function Module:free()
  for _, param in ipairs(self:parameters()) do
    M.zero_grad(param)
    for _, part in ipairs(M.parts(param)) do part.tensor:free() end
  end
end

function Module:forward() raise(self.class_name .. ": this class has no forward") end

---What a leaf prints between its parentheses; classes override it.
function Module.summary() return "" end

local function lines_of(module, name, indent, lines)
  lines[#lines + 1] = ("%s%s%s(%s)"):format(indent, name and name .. ": " or "", module.class_name, module:summary())
  for _, member in ipairs(module.members) do
    if is_module(module[member]) then lines_of(module[member], member, indent .. "  ", lines) end
  end
  return lines
end

---The tree, with weights and bytes of the whole.
function Module:__tostring()
  local lines = lines_of(self, nil, "", {})
  lines[1] = ("%s: %d weights, %.1f MiB"):format(lines[1], self:parameter_count(), self:weight_bytes() / 2 ^ 20)
  return table.concat(lines, "\n")
end

---A list of modules: index it from 1; its names count from 0, as in published checkpoints.
local List = M.class("List")
M.List = List

---@param modules qm.Module[]|nil
function List.new(modules)
  local self = M.create(List)
  for _, module in ipairs(modules or {}) do self:append(module) end
  return self
end

function List:append(module)
  self:register(tostring(#self), module)
  self[#self + 1] = module
  return self
end

return M
