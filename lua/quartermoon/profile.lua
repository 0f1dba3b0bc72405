---Where the time of a piece of a program goes: time per operation, and how near each one comes to what
---the device can do.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local ceilings = require("quartermoon.ceilings")
local check = require("quartermoon.check")
local clock = require("quartermoon.clock")
local devices = require("quartermoon.device")
local lib = binding.lib

local M = {}

---@class qm.Profile
---@field seconds number    wall time of the whole
---@field kernels table[]   { name=, calls=, seconds=, bytes=, flops= }, longest first: bytes and
---   floating-point operations are the least that the calls must move and compute
---@field device qm.Device  whose ceilings the shares are of
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

local COLUMNS = "%-20s %8s %10s %7s %10s %6s %10s %6s"

---"1234.5  61%", or dots where there is nothing to measure.
local function rate(amount, seconds, unit, ceiling)
  if amount == 0 or seconds == 0 then return "", "" end
  return ("%.1f"):format(amount / seconds / unit), ("%.0f%%"):format(100 * amount / seconds / ceiling)
end

---A table; measures the device's ceilings if this process has not yet.
function Profile:__tostring()
  local most = ceilings.of(self.device)
  local lines = { COLUMNS:format("operation", "calls", "ms", "share", "GB/s", "copy", "TFLOP/s", "gemm") }
  local inside = 0
  for _, kernel in ipairs(self.kernels) do
    inside = inside + kernel.seconds
    local bytes, of_copy = rate(kernel.bytes, kernel.seconds, 1e9, most.copy)
    local flops, of_gemm = rate(kernel.flops, kernel.seconds, 1e12, most.gemm)
    lines[#lines + 1] = COLUMNS:format(kernel.name, kernel.calls, ("%.3f"):format(kernel.seconds * 1e3),
      ("%.1f%%"):format(100 * kernel.seconds / self.seconds), bytes, of_copy, flops, of_gemm)
  end
  lines[#lines + 1] = COLUMNS:format("outside kernels", "", ("%.3f"):format((self.seconds - inside) * 1e3),
    ("%.1f%%"):format(100 * (1 - inside / self.seconds)), "", "", "", "")
  lines[#lines + 1] = COLUMNS:format("wall time", "", ("%.3f"):format(self.seconds * 1e3), "", "", "", "", "")
  lines[#lines + 1] = ("shares of %.1f GB/s (a large copy) and %.2f TFLOP/s (a large bf16 product) on %s"):format(
    most.copy / 1e9, most.gemm / 1e12, tostring(self.device))
  for i, line in ipairs(lines) do lines[i] = line:gsub("%s+$", "") end
  return table.concat(lines, "\n")
end

---Run `body` and book every operation it asks for. On a GPU operations are timed on the device, between
---marks in its queue, which makes short ones look a few microseconds longer; a replayed graph is one
---operation.
---@param body function
---@return qm.Profile profile  print it, or read its fields
---@return any ...             what body returns
function M.profile(body, ...)
  check.type("qm.profile", "body", body, "function")
  binding.check(lib.qm_profile_enable(1), "qm.profile")
  local started = clock.now()
  local function pack(...) return { count = select("#", ...), ... } end
  local results = pack(pcall(body, ...))
  local status = lib.qm_profile_enable(0) -- waits for what was timed
  local seconds = clock.now() - started
  if not results[1] then error(results[2], 0) end
  binding.check(status, "qm.profile")
  local kernels, entry = {}, ffi.new("qm_profile_entry")
  while lib.qm_profile_get(#kernels, entry) == 0 do
    kernels[#kernels + 1] = { name = ffi.string(entry.kernel), calls = tonumber(entry.calls),
      seconds = tonumber(entry.seconds), bytes = tonumber(entry.bytes), flops = tonumber(entry.flops) }
  end
  table.sort(kernels, function(a, b) return a.seconds > b.seconds end)
  return setmetatable({ seconds = seconds, kernels = kernels, device = devices.default() }, Profile),
    unpack(results, 2, results.count)
end

return M
