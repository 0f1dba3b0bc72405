---What a device can do at most, measured: the yardsticks that a kernel's speed is held against.

local autograd = require("quartermoon.autograd")
local check = require("quartermoon.check")
local clock = require("quartermoon.clock")
local devices = require("quartermoon.device")
local random = require("quartermoon.random")
local scopes = require("quartermoon.scope")
local linalg = require("quartermoon.ops.linalg")

local M = {}

---Seconds of one call of `body(i)`, from the median of `repeats` series of `calls` calls.
---@param device qm.Device
---@param body function  what to time; gets the number of the call
---@param calls integer|nil    in a series, default 10
---@param repeats integer|nil  default 5
---@return number seconds
function M.time(device, body, calls, repeats)
  local name = "qm.ceilings.time"
  device = devices.resolve(name, device)
  check.type(name, "body", body, "function")
  calls, repeats = check.integer(name, "calls", calls or 10, 1), check.integer(name, "repeats", repeats or 5, 1)
  for i = 1, math.min(calls, 3) do body(i) end
  device:sync()
  local times = {}
  for r = 1, repeats do
    local started = clock.now()
    for i = 1, calls do body(i) end
    device:sync()
    times[r] = (clock.now() - started) / calls
  end
  table.sort(times)
  return times[math.ceil(repeats / 2)]
end

local function measure(device)
  local own_memory = device:info().total_bytes > 0
  local count, size = own_memory and 2 ^ 28 or 2 ^ 23, own_memory and 8192 or 512
  local generator = random.generator(1)
  local function noise(shape, dtype) return generator:randn(shape, { dtype = dtype, device = device }) end
  local x = noise({ count }, "bf16")
  local out = x:empty_like()
  local copy_seconds = M.time(device, function() out:copy(x) end)
  x:free()
  out:free()
  local a, b = noise({ size, size }, "bf16"), noise({ size, size }, "bf16")
  local gemm_seconds = M.time(device, function() linalg.matmul(a, b):free() end)
  return { copy = 2 * 2 * count / copy_seconds, gemm = 2 * size ^ 3 / gemm_seconds }
end

local measured = {}

---A device's ceilings. Measured once in a process (on a GPU half a second), with random numbers.
---@param device string|qm.Device|nil  default: the default device
---@return { copy: number, gemm: number }  bytes/s of a large copy, read and written bytes together; and
---   FLOP/s of a large bf16 matrix product
function M.of(device)
  device = devices.resolve("qm.ceilings", device)
  local key = tostring(device)
  measured[key] = measured[key] or autograd.no_grad(scopes.scope, measure, device)
  return measured[key]
end

return M
