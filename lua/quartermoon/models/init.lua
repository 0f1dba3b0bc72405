---Models: qm.models.llama, qm.models.gpt2.

return { llama = require("quartermoon.models.llama"), gpt2 = require("quartermoon.models.gpt2") }
