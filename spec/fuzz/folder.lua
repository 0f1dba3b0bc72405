-- A whole model folder: configuration, index, shards, dense or quantized. What can be read makes one step, with
-- one position, for the rotations of more take long where Lua is not compiled.
local qm = require("quartermoon")

return function(bytes, fuzz)
  fuzz.write_parts(bytes, "config.json")
  local model = qm.models.load(fuzz.folder, { dtype = "f32", positions = 1, on_note = function() end })
  fuzz.use(qm.scope, function()
    qm.no_grad(model.logits, model, qm.tensor({ 0 }, { dtype = "i32" }))
  end)
  model:free()
  fuzz.use(function() -- once more, decoded and rounded anew
    local linear = { kind = "mpq", w_bit = 4, group_size = 32 }
    qm.models.load(fuzz.folder, { linear = linear, positions = 1, on_note = function() end }):free()
  end)
end
