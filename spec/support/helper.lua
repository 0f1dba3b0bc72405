-- Runs before the specs: the modules' path for child processes, and a seed that is printed.
local seed = tonumber(os.getenv("QM_SEED")) or os.time() % 1000000
math.randomseed(seed)
io.stderr:write("specs: QM_SEED=" .. seed .. ", device " .. (os.getenv("QM_DEVICE") or "cpu") .. "\n")
