-- What loading a folder takes of the host's memory: the model where it lies there, and one tensor besides.
local qm = require("quartermoon")
local process = require("spec.support.process")
local testing = require("spec.support.testing")

local MIB = 2 ^ 20
local CONFIG = { vocab_size = 32768, hidden_size = 512, intermediate_size = 2048, num_hidden_layers = 6,
  num_attention_heads = 4, max_position_embeddings = 64, tie_word_embeddings = true }
local LARGEST = 32768 * 512 * 2 -- bytes of the embedding in bf16
-- The allocator's blocks, LuaJIT's garbage, pages of the program that are touched for the first time: measured 4
-- to 6 MiB. A second copy of the folder's 80 MiB would be too much.
local ROOM = 32 * MIB

local CHILD = [[
local qm = require("quartermoon")
local function peak()
  for line in io.lines("/proc/self/status") do
    local kib = line:match("^VmHWM:%%s+(%%d+)")
    if kib then return tonumber(kib) * 1024 end
  end
end
local device = qm.device(%q)
qm.ones({ 64, 64 }, { device = device }):to("f32"):free()
local before = peak()
local model = qm.models.load(%q, { device = device, dtype = "f32", positions = 16, weights = %q, linear = %s })
print(peak() - before, model:weight_bytes(), device:sync() or "")
]]

describe("Loading a folder", function()
  local root, remove_root
  setup(function() root, remove_root = process.folder() end)
  teardown(function() remove_root() end)

  it("takes the model's memory and no more than its largest tensor besides", function()
    if not process.read("/proc/self/status") then return pending("no /proc/self/status") end
    if os.getenv("QM_CONFIG") == "asan" then return pending("the sanitizer keeps what is freed") end
    local model = qm.models.llama.new(CONFIG, { dtype = "f32", linear = { kind = "dense" }, device = testing.device })
    model:save(root .. "/m", { dtype = "bf16" })
    model:free()
    local is_host = testing.device == "cpu" or testing.device == "reference"
    for _, case in ipairs({ { "bf16", '{ kind = "dense" }' }, { "f32", '{ kind = "dense" }' },
      { "bf16", '{ kind = "mpq", w_bit = 4, group_size = 64 }' } }) do
      process.write(root .. "/child.lua", CHILD:format(testing.device, root .. "/m", case[1], case[2]))
      local output, status = process.run("bin/quartermoon " .. root .. "/child.lua")
      assert.equal(0, status, output)
      local grown, weights = output:match("^(%d+)%s+(%d+)")
      local allowed = (is_host and tonumber(weights) or 0) + LARGEST + ROOM
      assert(tonumber(grown) <= allowed, ("%s %s: %.0f MiB where %.0f are allowed, of which %.0f are weights"):format(
        case[1], case[2], grown / MIB, allowed / MIB, weights / MIB))
    end
  end)
end)
