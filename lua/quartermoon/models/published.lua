---Our parameters as published folders have them: the same names, some transposed.

local module = require("quartermoon.nn.module")
local nn = require("quartermoon.nn")

local M = {}

---@param model qm.models.Decoder
---@return { name: string, path: string, layer: qm.Module, param: qm.Tensor|qm.QParam, transposed: boolean }[]
---   name: of the parameter; path: of its layer; transposed: a published tensor is [N, K] where ours is [K, N]
function M.parameters(model)
  local entries = {}
  local function gather(layer, prefix)
    for _, name in ipairs(layer.members) do
      local value = layer[name]
      if module.is_module(value) then
        gather(value, prefix .. name .. ".")
      else
        local path = prefix:sub(1, -2)
        entries[#entries + 1] = { name = prefix .. name, path = path, layer = layer, param = value,
          transposed = name == "weight" and getmetatable(layer) == nn.Linear and model.stores_transposed(path) }
      end
    end
  end
  gather(model, "")
  return entries
end

return M
