-- scripts/finetune.lua, as a person types it.
local qm = require("quartermoon")
local process = require("spec.support.process")

describe("scripts/finetune.lua", function()
  it("trains a folder's quantized weights and writes a folder that goes on", function()
    local root, remove = process.folder()
    qm.seed(1)
    local model = qm.models.llama.new({ vocab_size = 256, hidden_size = 32, intermediate_size = 64,
      num_hidden_layers = 1, num_attention_heads = 1, max_position_embeddings = 32 },
      { linear = { w_bit = 4, group_size = 32 }, device = "cpu" })
    model:save(root .. "/base")
    qm.tokenizer.byte():save(root .. "/base/tokenizer.json")
    qm.files.write(root .. "/text", ("the moon and the sun. "):rep(400))
    local command = "bin/quartermoon scripts/finetune.lua --text %s/text --model %s --out %s --steps 20 --lr 1e-2 "
      .. "--context 16 --batch 4 --device cpu"
    local output, status = process.run(command:format(root, root .. "/base", root .. "/run"))
    assert.equal(0, status, output)
    local before, after = output:match("held%-out loss, nats/token: (%S+) before, (%S+) after")
    assert.is_true(tonumber(after) < tonumber(before), output)
    local tuned = qm.models.load(root .. "/run/model", { device = "cpu", on_note = function() end })
    assert.equal(4, tuned.model.layers[1].mlp.up_proj.weight.w_bit)
    assert.is_true(qm.files.exists(root .. "/run/model/tokenizer.json"))
    remove()
  end)
end)
