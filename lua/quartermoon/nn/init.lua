---Layers. See nn/module.lua for what a module is.
---
---    local layer = qm.nn.QLinear.new(256, 512, { w_bit = 4, group_size = 64 })
---    print(layer)                -- QLinear(256 -> 512, 4 bit, group 64): 131072 weights, 69.0 KiB
---    local y = layer(x)

local check = require("quartermoon.check")

local M = {}

local module = require("quartermoon.nn.module")
M.Module, M.List, M.class, M.create = module.Module, module.List, module.class, module.create
M.is_module, M.is_quantized = module.is_module, module.is_quantized

for _, part in ipairs({ "layers", "transformer" }) do
  for name, value in pairs(require("quartermoon.nn." .. part)) do M[name] = value end
end
for name, class in pairs(M) do
  if type(class) == "table" and name ~= "Module" then
    check.methods("qm.nn." .. name, class, { new = true, from = true })
  end
end

return M
