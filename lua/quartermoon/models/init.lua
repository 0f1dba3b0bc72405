---Models: qm.models.load for folders as the Hugging Face hub has them, qm.models.llama and qm.models.gpt2
---for fresh ones.

return { llama = require("quartermoon.models.llama"), gpt2 = require("quartermoon.models.gpt2"),
  load = require("quartermoon.models.folder").load, quantize = require("quartermoon.models.quantize").quantize,
  perplexity = require("quartermoon.models.quantize").perplexity }
