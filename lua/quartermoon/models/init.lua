---Models: qm.models.llama.

return { llama = require("quartermoon.models.llama") }
