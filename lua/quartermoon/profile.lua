---Where the time of a piece of a program goes: wall time per kernel, and what is left for Lua.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local clock = require("quartermoon.clock")
local lib = binding.lib

local M = {}

---@class qm.Profile
---@field seconds number  wall time of the whole
---@field kernels table[] { name=, calls=, seconds= }, longest first
local Profile = {}
Profile.__index = Profile

---Share of the wall time spent in the named kernels.
---@param names string[]
function Profile:share(names)
  local wanted, sum = {}, 0
  for _, name in ipairs(names) do wanted[name] = true end
  for _, kernel in ipairs(self.kernels) do
    if wanted[kernel.name] then sum = sum + kernel.seconds end
  end
  return sum / self.seconds
end

function Profile:__tostring()
  local lines = { ("%-20s %8s %10s %7s"):format("kernel", "calls", "ms", "share") }
  local inside = 0
  for _, kernel in ipairs(self.kernels) do
    inside = inside + kernel.seconds
    lines[#lines + 1] = ("%-20s %8d %10.2f %6.1f%%"):format(kernel.name, kernel.calls, kernel.seconds * 1e3,
      100 * kernel.seconds / self.seconds)
  end
  lines[#lines + 1] = ("%-20s %8s %10.2f %6.1f%%"):format("outside kernels", "", (self.seconds - inside) * 1e3,
    100 * (1 - inside / self.seconds))
  lines[#lines + 1] = ("%-20s %8s %10.2f"):format("wall time", "", self.seconds * 1e3)
  return table.concat(lines, "\n")
end

---Run `body` and book every kernel it calls.
---@param body function
---@return qm.Profile profile  print it, or read its fields
---@return any ...             what body returns
function M.profile(body, ...)
  check.type("qm.profile", "body", body, "function")
  binding.check(lib.qm_profile_enable(1), "qm.profile")
  local started = clock.now()
  local function pack(...) return { count = select("#", ...), ... } end
  local results = pack(pcall(body, ...))
  local seconds = clock.now() - started
  binding.check(lib.qm_profile_enable(0), "qm.profile")
  if not results[1] then error(results[2], 0) end
  local kernels, entry = {}, ffi.new("qm_profile_entry")
  while lib.qm_profile_get(#kernels, entry) == 0 do
    kernels[#kernels + 1] = { name = ffi.string(entry.kernel), calls = tonumber(entry.calls),
      seconds = tonumber(entry.seconds) }
  end
  table.sort(kernels, function(a, b) return a.seconds > b.seconds end)
  return setmetatable({ seconds = seconds, kernels = kernels }, Profile), unpack(results, 2, results.count)
end

return M
