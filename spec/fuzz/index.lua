-- model.safetensors.index.json beside two shards; with a line "== name" other files than these.
local weights = require("quartermoon.models.weights")

return function(bytes, fuzz)
  fuzz.write_parts("== a.safetensors\na F32 2\nb F16 2 2\n== b.safetensors\nc I32 1\n== model.safetensors.index.json\n"
    .. bytes)
  local source = weights.open("fuzz", fuzz.folder)
  for _, key in ipairs(source.names) do source:info(key) end
  source:close()
end
