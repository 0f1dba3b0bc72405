---The convention that layers share. A module is a table whose class has `forward`; calling the module
---calls it. Parameters (tensors or QParams) and sub-modules are registered in order and are then plain
---fields, so a model is taken apart by indexing: `model.model.layers[1].self_attn.q_proj.weight`.

local check = require("quartermoon.check")
local QParam = require("quartermoon.qparam").QParam
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
  check.type("qm.nn.class", "class_name", class_name, "string")
  local class = setmetatable({ class_name = class_name }, { __index = Module })
  class.__index = class
  class.__call = function(self, ...) return self:forward(...) end
  class.__tostring = Module.__tostring
  class.describe = function(self) return "a module " .. self.class_name end
  return class
end

---A new, empty module of a class made with `class`.
function M.create(class)
  if type(class) ~= "table" or rawget(class, "__index") ~= class or not class.class_name then
    check.fail("qm.nn.create", "class", "a class of modules, made with qm.nn.class", class)
  end
  return setmetatable({ members = {} }, class)
end

---A parameter that is quantized, rather than a tensor or a module?
local function is_quantized(value)
  return type(value) == "table" and rawget(value, "w_bit") ~= nil and getmetatable(value) == QParam
end
M.is_quantized = is_quantized

local function is_module(value) return type(value) == "table" and rawget(value, "members") ~= nil end
M.is_module = is_module

---Make a parameter or a module part of this one: a field, and a member of its name lists.
---@param name string
---@param value qm.Tensor|qm.QParam|qm.Module
---@return any value
function Module:register(name, value)
  if not is_module(self) then check.fail("module:register", "self", "a module, made with qm.nn.create", self) end
  check.type("module:register", "name", name, "string")
  if not (check.is_tensor(value) or is_quantized(value) or is_module(value)) then
    check.fail("module:register", name, "a tensor, a QParam or a module", value)
  end
  if rawget(self, name) == nil then self.members[#self.members + 1] = name end
  rawset(self, name, value)
  if check.is_tensor(value) then value:keep() end
  return value
end

local declaring = false

---Run `body`, in which modules declare their parameters instead of making them: no memory is taken and
---nothing drawn. Each such module has a list `declared` of { name =, shape = }, to be registered later.
---@return any ...  what body returns
function M.declare(body)
  local before = declaring
  declaring = true
  local function finish(ok, ...)
    declaring = before
    if not ok then error((...), 0) end
    return ...
  end
  return finish(pcall(body))
end

---Make a parameter of a module, or declare it.
---@param self qm.Module
---@param shape integer[]
---@param make function  () -> the parameter
---@param more table|nil  further fields of the declaration
function M.parameter(self, name, shape, make, more)
  if not declaring then return self:register(name, make()) end
  local declaration = { name = name, shape = shape }
  for key, value in pairs(more or {}) do declaration[key] = value end
  self.declared = self.declared or {}
  self.declared[#self.declared + 1] = declaration
end

---Inside `declare`?
function M.is_declaring() return declaring end

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
  for _, param in ipairs(self:parameters()) do param:zero_grad() end
end

---Weights of one parameter: those of the dense matrix, for a quantized one.
function M.parameter_count(param)
  if is_quantized(param) then return param.shape[1] * param.shape[2] end
  return param:count()
end

---The tensors that a parameter is stored in, by their path: { name =, tensor = } in a fixed order.
---@param entry { name: string, param: qm.Tensor|qm.QParam }
function M.parts(entry)
  if not is_quantized(entry.param) then return { { name = entry.name, tensor = entry.param } } end
  local parts = {}
  for i, part in ipairs(entry.param:tensors()) do
    parts[i] = { name = entry.name .. "." .. part.name, tensor = part.tensor }
  end
  return parts
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
  for _, param in ipairs(self:parameters()) do size_bytes = size_bytes + param:size_bytes() end
  return size_bytes
end

---Bits that a weight takes up on average, over the quantized parameters and over all.
---@return number|nil quantized, number all
function Module:bits_per_weight()
  local count, size_bytes = 0, 0
  for _, param in ipairs(self:parameters()) do
    if is_quantized(param) then
      count, size_bytes = count + M.parameter_count(param), size_bytes + param:size_bytes()
    end
  end
  return count > 0 and 8 * size_bytes / count or nil, 8 * self:weight_bytes() / self:parameter_count()
end

---Release every parameter.
function Module:free()
  for _, param in ipairs(self:parameters()) do
    param:zero_grad()
    param:free()
  end
end

function Module:forward() raise(self.class_name .. ": this class has no forward") end

---What a leaf prints between its parentheses; classes override it.
function Module.summary() return "" end

local lines_of

---The lines of a module's members. Of a list, members that print alike print once.
local function member_lines(module, indent, lines)
  local is_list = getmetatable(module) == M.List
  local last_text, first_name, at
  for _, name in ipairs(module.members) do
    local member = module[name]
    if is_module(member) then
      local own = lines_of(member, indent, {})
      local text = table.concat(own, "\n")
      if is_list and text == last_text then
        lines[at] = ("%s%s - %s: %s"):format(indent, first_name, name, own[1])
      else
        last_text, first_name, at = text, name, #lines + 1
        lines[at] = ("%s%s: %s"):format(indent, name, own[1])
        for i = 2, #own do lines[#lines + 1] = own[i] end
      end
    end
  end
  return lines
end

function lines_of(module, indent, lines)
  lines[1] = ("%s(%s)"):format(module.class_name, module:summary())
  return member_lines(module, indent .. "  ", lines)
end

---The tree, with weights and bytes of the whole.
function Module:__tostring()
  local lines = lines_of(self, "", {})
  local size_bytes = self:weight_bytes()
  local unit, scale = "MiB", 2 ^ 20
  if size_bytes < scale then unit, scale = "KiB", 2 ^ 10 end
  lines[1] = ("%s: %d weights, %.1f %s"):format(lines[1], self:parameter_count(), size_bytes / scale, unit)
  return table.concat(lines, "\n")
end

check.methods("qm.Module", Module)

---A list of modules: index it from 1; its names count from 0, as in published checkpoints.
local List = M.class("List")
M.List = List

---@param modules qm.Module[]|nil
function List.new(modules)
  local self = M.create(List)
  for _, module in ipairs(check.type("qm.nn.List", "modules", modules or {}, "table")) do self:append(module) end
  return self
end

function List:append(module)
  self:register(tostring(#self), module)
  self[#self + 1] = module
  return self
end

return M
