-- The seeds of the fuzzed readers (spec/fuzz/), and inputs that once found something, on this build.
-- scripts/fuzz goes on from them.
local process = require("spec.support.process")

describe("the reader", function()
  for target in process.run("ls spec/fuzz/corpus"):gmatch("%S+") do
    it(target .. " returns or names the file, whatever is in it", function()
      local folder, remove = process.folder()
      local command = ("QM_DEVICE=cpu luajit spec/fuzz/replay.lua %s %s spec/fuzz/corpus/%s/*"):format(target, folder,
        target)
      local output, status = process.run(command)
      remove()
      assert(status == 0, output)
      assert(tonumber(output:match("(%d+) inputs")) >= 3, output)
    end)
  end
end)
