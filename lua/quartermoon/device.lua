---Devices: opening them, their memory, the default one.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local lib = binding.lib

local M = {}

---@class qm.Device
---@field name string   "cpu", "reference", "cuda" ...
---@field index integer
local Device = {}
Device.__index = Device

local open = {} -- by "name:index"

---A device by name: "cpu", "reference", "cuda" or "cuda:1". Opening twice gives the same object.
---@param name string
---@return qm.Device|nil, string|nil reason  nil and the reason when this machine has no such device
function M.open(name)
  check.type("qm.device", "name", name, "string")
  local backend, digits = name:match("^([^:]+):?(%d*)$")
  if not backend then return nil, "no device is called '" .. name .. "'" end
  local index = tonumber(digits) or 0
  local key = backend .. ":" .. index
  if open[key] then return open[key] end
  local out = ffi.new("qm_device *[1]")
  if lib.qm_device_open(backend, index, out) ~= 0 then return nil, binding.last_error() end
  open[key] = setmetatable({ handle = ffi.gc(out[0], lib.qm_device_release), name = backend, index = index }, Device)
  return open[key]
end

local default

---The device that new tensors go to: set by `qm.set_default_device`, else $QM_DEVICE, else "cpu".
function M.default()
  if not default then
    local name = os.getenv("QM_DEVICE") or "cpu"
    local device, reason = M.open(name)
    if not device then binding.raise("qm.default_device: " .. name .. ": " .. reason) end
    default = device
  end
  return default
end

---@param device string|qm.Device
function M.set_default(device) default = M.resolve("qm.set_default_device", device) end

---A device from a name, an object or nil (the default).
function M.resolve(name, device)
  if device == nil then return M.default() end
  if getmetatable(device) == Device then return device end
  if type(device) ~= "string" then check.fail(name, "device", "a device or its name", device) end
  local found, reason = M.open(device)
  if not found then binding.raise(name .. ": " .. reason) end
  return found
end

---Wait until everything queued on the device has run.
function Device:sync() binding.check(lib.qm_device_sync(self.handle), "device:sync") end

---Bytes of the device's memory: live_bytes, cached_bytes, peak_bytes, limit_bytes, workspace_bytes (what
---kernels hold between calls), live_count, allocation_count.
function Device:memory()
  local memory = ffi.new("qm_memory")
  binding.check(lib.qm_device_memory(self.handle, memory), "device:memory")
  return {
    live_bytes = tonumber(memory.live_bytes), cached_bytes = tonumber(memory.cached_bytes),
    peak_bytes = tonumber(memory.peak_bytes), limit_bytes = tonumber(memory.limit_bytes),
    workspace_bytes = tonumber(memory.workspace_bytes), live_count = tonumber(memory.live_count),
    allocation_count = tonumber(memory.allocation_count),
  }
end

---Live, cached and workspace bytes together may not exceed the limit; 0 lifts it. A workspace itself grows
---as kernels need it.
function Device:set_limit(limit_bytes)
  check.integer("device:set_limit", "limit_bytes", limit_bytes, 0)
  binding.check(lib.qm_device_set_limit(self.handle, limit_bytes), "device:set_limit")
end
function Device:reset_peak() binding.check(lib.qm_device_reset_peak(self.handle), "device:reset_peak") end
---Give cached blocks back to the system.
function Device:empty_cache() binding.check(lib.qm_device_empty_cache(self.handle), "device:empty_cache") end

---What the hardware is: description, threads (host devices), fast_bf16, fused_rows (up to so many, a
---product with a quantized weight runs straight from its codes), total_bytes and free_bytes (of a memory of
---its own, else 0).
function Device:info()
  local info = ffi.new("qm_device_info")
  binding.check(lib.qm_device_get_info(self.handle, info), "device:info")
  return { name = ffi.string(info.name), index = info.index, description = ffi.string(info.description),
    threads = info.threads, fast_bf16 = info.fast_bf16 ~= 0, fused_rows = info.fused_rows,
    total_bytes = tonumber(info.total_bytes), free_bytes = tonumber(info.free_bytes) }
end

function Device.describe(device) return "device " .. tostring(device) end
function Device:__tostring() return self.index == 0 and self.name or self.name .. ":" .. self.index end

M.Device = Device

check.methods("qm.Device", Device)

return M
