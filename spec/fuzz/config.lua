-- config.json and generation_config.json, with what they say of quantization.
local configs = require("quartermoon.models.config")
local quantized = require("quartermoon.models.quantized")

return function(bytes, fuzz)
  fuzz.write_parts(bytes, "config.json")
  local config = configs.read("fuzz", fuzz.folder)
  quantized.read(config.quantization)
end
