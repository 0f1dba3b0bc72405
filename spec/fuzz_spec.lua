-- Random calls of the whole public API, in a process of their own (spec/support/fuzz.lua).
-- QM_FUZZ_SECONDS says how long (.ci/run: 60), QM_FUZZ_SEED which calls.
local process = require("spec.support.process")

local seconds = tonumber(os.getenv("QM_FUZZ_SECONDS")) or 5
local seed = tonumber(os.getenv("QM_FUZZ_SEED")) or tonumber(os.getenv("QM_SEED")) or os.time() % 1000000

describe("random calls of the whole public API", function()
  it(("return or name the mistake, and never crash: %g s, QM_FUZZ_SEED=%d"):format(seconds, seed), function()
    local folder, remove = process.folder()
    -- Address space, so that nothing eats the machine; the sanitizers map terabytes of it.
    local limit = os.getenv("QM_CONFIG") == "asan" and "true" or "ulimit -v 8000000"
    local root = process.root()
    local output, status = process.run(("cd %s && %s && timeout -k 5 %d luajit %s %s %d %g"):format(folder, limit,
      seconds * 3 + 60, root .. "/spec/support/fuzz.lua", root, seed, seconds))
    local file = io.open(folder .. "/last_call")
    local last_call = file and file:read("*l"):gsub("%s+$", "") or "none"
    if file then file:close() end
    remove()
    io.stderr:write("\n", output:match("[^\n]*calls of[^\n]*") or "", "\n")
    if os.getenv("QM_FUZZ_VERBOSE") then io.stderr:write(output) end
    if status ~= 0 or not output:find("SURVIVED", 1, true) then
      error(("QM_FUZZ_SEED=%d: status %d in %s\n%s"):format(seed, status, last_call, output:sub(-4000)), 0)
    end
    local unhelpful = {}
    for line in output:gmatch("unhelpful: ([^\n]*)") do unhelpful[#unhelpful + 1] = line end
    if #unhelpful > 0 then
      error(("QM_FUZZ_SEED=%d: %d errors name no argument, the first:\n%s"):format(seed, #unhelpful,
        table.concat(unhelpful, "\n", 1, math.min(#unhelpful, 5))), 0)
    end
  end)
end)
