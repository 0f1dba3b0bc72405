-- scripts/train_lm.lua, as a person types it.
local process = require("spec.support.process")
local testing = require("spec.support.testing")

describe("scripts/train_lm.lua", function()
  for linear, bits in pairs({ mpq = 4 + (16 + 4) / 32, dense = 32 }) do
    it("trains, evaluates, saves and speaks: " .. linear, function()
      local root, remove = process.folder()
      local output, status = process.run(("bin/quartermoon scripts/train_lm.lua --text README.md --out %s --steps 2 "
        .. "--hidden 64 --ffn 96 --layers 1 --heads 2 --kv_heads 1 --batch 2 --context 16 --tokenizer byte --linear %s "
        .. "--group_size 32 --device %s"):format(root, linear, testing.device))
      assert.equal(0, status, output)
      assert.near(bits, tonumber(output:match("bits per weight in the blocks +(%S+)")), 0.01)
      assert.truthy(output:find("\nIn the beginning", 1, true), output)
      remove()
    end)
  end
end)
