-- The tensors of one quantized weight: the first line says "gptq bits=4 group_size=32", the others are
-- tensors as spec/fuzz/parts.lua has them. What can be imported is decoded, multiplied and exported.
local qm = require("quartermoon")

local KINDS = { gptq = true, awq = true, exl2 = true, mbwq = true, mpq = true }
local OPTIONS = { bits = tonumber, group_size = tonumber, columns = tonumber, checkpoint_format = tostring,
  zero_points = tostring, made_by = tostring, sym = function(word) return word == "true" end }

return function(bytes, fuzz)
  local head, rest = bytes:match("^([^\n]*)\n(.*)$")
  local kind = head and head:match("^%w+")
  if not KINDS[kind] then return end
  local options = {}
  for key, value in head:gmatch("([%w_]+)=(%S+)") do
    if OPTIONS[key] then options[key] = OPTIONS[key](value) end
  end
  local fields = {}
  qm.safetensors.with(fuzz.write("x.safetensors", fuzz.parts.safetensors(rest)), function(file)
    for _, key in ipairs(file:names()) do
      if file:info(key) ~= "unsupported" then fields[key] = file:tensor(key) end
    end
  end)
  fuzz.use(qm.scope, function()
    local q = qm.QParam.import(kind, fields, options)
    local w = q:dequantize("f32")
    qm.no_grad(qm.qlinear, qm.ones({ 2, q.shape[1] }), q)
    local out = q:export(kind)
    for _, tensor in pairs(out) do tensor:free() end
    w:free()
    q:free()
  end)
  for _, tensor in pairs(fields) do tensor:free() end
end
