---GGUF files, which llama.cpp runs: read and checked, written, and made of models.
---
---    local report = qm.gguf.export(model, "tuned.gguf")
---    local file = qm.gguf.open("tuned.gguf")
---    print(file.metadata["general.architecture"], file:info("token_embd.weight"))
---    file:close()
---
---Source: https://github.com/ggml-org/ggml, docs/gguf.md.

local read = require("quartermoon.gguf.read")

return { open = read.open, with = read.with, save = require("quartermoon.gguf.write").save,
  export = require("quartermoon.gguf.export").export }
