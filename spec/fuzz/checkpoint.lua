-- A checkpoint's folder: state.json, model.safetensors and optim.safetensors, read into a small model that
-- is half dense and half quantized.
local qm = require("quartermoon")

local data = { state = function() return {} end, load_state = function() end }
local model = qm.nn.create(qm.nn.class("halves"))
model:register("dense", qm.nn.Linear.new(4, 3))
model:register("packed", qm.nn.QLinear.from(qm.QParam.quantize(qm.ones({ 32, 32 }), { w_bit = 4, group_size = 32 })))
local optim = qm.optim.new(model, { lr = 1e-3 })
local fresh = optim:state()

return function(bytes, fuzz)
  fuzz.write_parts(bytes, "state.json")
  local ok, message = pcall(qm.checkpoints.load, fuzz.folder,
    { model = model, optim = optim, data = data, rng = qm.generator(1) })
  optim:load_state(fresh)
  local q = model.packed.weight
  if q.residual then
    q.residual:free()
    q.residual, q.residual_bits = nil, 0
  end
  if not ok then error(message, 0) end
end
