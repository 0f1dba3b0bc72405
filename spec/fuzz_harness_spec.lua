-- What counts as a finding when the readers of files are fuzzed: spec/fuzz/harness.lua.
local process = require("spec.support.process")

describe("the harness finds", function()
  -- Targets that do what none may, and what the finding says; false: all is well.
  local TARGETS = {
    { "no fault in an error that names a file", 'error(fuzz.folder .. "/x: bad", 0)', false },
    { "an error that names no file", 'error("bad", 0)', "no file is named: bad" },
    { "an error that is no string", "error({})", "a table was raised" },
    { "a fault inside the library", 'require("quartermoon.tokenizer.merges").apply(nil, 2)', "a fault: " },
    { "a handle that stays alive", 'kept[#kept + 1] = qm.ones({ 1 })', "1 handles stay alive" },
    { "a program that is run", 'os.execute("true")', "execute was called with true" },
    { "code that is read", 'loadstring(bytes)', "loadstring was called" },
    { "another file that is read", 'io.open("/etc/hostname")', "/etc/hostname was opened" },
  }
  for _, case in ipairs(TARGETS) do
    local what, body, finding = unpack(case)
    it(what, function()
      local folder, remove = process.folder()
      os.execute("mkdir -p " .. folder .. "/spec/fuzz " .. folder .. "/files")
      process.write(folder .. "/spec/fuzz/faulty.lua", ([[
        local qm, kept = require("quartermoon"), {}
        return function(bytes, fuzz) %s; return bytes, fuzz, qm, kept end]]):format(body))
      local command = "QM_DEVICE=cpu LUA_PATH='%s/?.lua;;' luajit spec/fuzz/replay.lua faulty %s/files "
        .. "spec/fuzz/corpus/config/llama"
      local output, status = process.run(command:format(folder, folder))
      remove()
      assert.equal(finding and 1 or 0, status, output)
      if finding then assert.truthy(output:find(finding, 1, true), output) end
    end)
  end
end)
