-- A GGUF file, byte for byte: header, metadata, and every tensor that can be decoded.
local qm = require("quartermoon")

return function(bytes, fuzz)
  qm.gguf.with(fuzz.write("x.gguf", bytes), function(file)
    for _, key in ipairs(file:names()) do file:tensor(key):free() end
  end)
end
