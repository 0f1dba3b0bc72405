-- A safetensors file, byte for byte: the engine's reader of headers, then every tensor's values.
local qm = require("quartermoon")

return function(bytes, fuzz)
  qm.safetensors.with(fuzz.write("x.safetensors", bytes), function(file)
    for _, key in ipairs(file:names()) do
      local dtype = file:info(key)
      if dtype ~= "unsupported" then file:tensor(key):free() end
    end
  end)
end
