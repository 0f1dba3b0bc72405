---`quartermoon doctor`: what this machine has, what it lacks, and what to do about it.

local M = {}

local function first_line(command)
  local pipe = io.popen(command .. " 2>/dev/null")
  local line = pipe and pipe:read("*l")
  if pipe then pipe:close() end
  return line
end

---oneDNN's version, asked of the library that the engine is linked with.
local function onednn_version()
  local ffi = require("ffi")
  local lib = require("quartermoon.ffi").lib
  pcall(ffi.cdef, "const int *dnnl_version(void);")
  local ok, version = pcall(function() return lib.dnnl_version() end)
  return ok and ("%d.%d.%d"):format(version[0], version[1], version[2]) or nil
end

local function memory_available()
  local file = io.open("/proc/meminfo")
  local text = file and file:read("*a") or ""
  if file then file:close() end
  local total, available = text:match("MemTotal:%s+(%d+)"), text:match("MemAvailable:%s+(%d+)")
  return available and ("%.1f of %.1f GiB free"):format(available / 2 ^ 20, total / 2 ^ 20)
end

---@class qm.Finding
---@field name string
---@field state string   "ok", "absent" (the program goes on without) or "missing" (it does not)
---@field words string   what was found, or why not
---@field advice string|nil

local function engine_findings(add)
  local ok, binding = pcall(require, "quartermoon.ffi")
  if not ok then
    add("engine", "missing", tostring(binding):match("[^\n]*"), "scripts/build (scripts/install-deps first)")
    return
  end
  add("engine", "ok", ("%s, ABI %d"):format(binding.library_path, binding.lib.qm_abi_version()))
  local devices = require("quartermoon.device")
  local cpu, reason = devices.open("cpu")
  if not cpu then
    add("cpu", "missing", reason)
    return
  end
  local info = cpu:info()
  add("cpu", "ok", ("%s; %d threads"):format(info.description, info.threads))
  add("bf16", info.fast_bf16 and "ok" or "absent", info.fast_bf16 and "native matrix products"
    or "no native products on this CPU: bf16 saves memory, f32 is as fast")
  local version = onednn_version()
  add("oneDNN", version and "ok" or "absent", version or "the engine was built without it", not version
    and "scripts/install-deps, then scripts/build" or nil)
  require("quartermoon.doctor_cuda").examine(add, first_line)
end

---Look everything over.
---@return qm.Finding[]
function M.examine()
  local findings = {}
  local function add(name, state, words, advice)
    findings[#findings + 1] = { name = name, state = state, words = words, advice = advice }
  end
  local ffi = require("ffi")
  add("LuaJIT", "ok", ("%s, %s, %s-bit collector, compiler %s"):format(jit.version, jit.arch,
    ffi.abi("gc64") and "64" or "32", jit.status() and "on" or "off"))
  add("memory", "ok", memory_available() or "unknown")
  engine_findings(add)
  for _, module in ipairs({ { "cjson", "lua-cjson", "reads config.json and tokenizers" },
    { "readline", "lua-readline", "edits lines at the prompt" } }) do
    local found = pcall(require, module[1])
    add(module[1], found and "ok" or "absent", module[3], not found and "apt-get install " .. module[2] or nil)
  end
  local gnuplot = first_line("gnuplot --version")
  add("gnuplot", gnuplot and "ok" or "absent", gnuplot or "draws pictures", not gnuplot
    and "apt-get install gnuplot-nox" or nil)
  return findings
end

---Print the findings. @return integer status  0, or 1 when something is missing that must be there
function M.main()
  local status = 0
  for _, finding in ipairs(M.examine()) do
    if finding.state == "missing" then status = 1 end
    print(("%-8s %-9s %s"):format(finding.state, finding.name, finding.words))
    if finding.advice then print(("%18s -> %s"):format("", finding.advice)) end
  end
  return status
end

return M
