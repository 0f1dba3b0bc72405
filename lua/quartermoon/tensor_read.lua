---Tensors on the way out: values on the host, and tensors in words. tensor.lua makes these methods.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local host_buffer = require("quartermoon.host_buffer")
local dtypes = require("quartermoon.dtypes")
local lib = binding.lib

---@class qm.Tensor
local Reading = {}

local MINUS_INFINITY, NAN = -0x800000, -0x400000 -- an f32's bits, as an integer

---------------------------------------------------------------------------------------------------
-- Reading back
---------------------------------------------------------------------------------------------------

---Give negative NaNs the bits of Lua's own. LuaJIT keeps every other value's type in negative NaNs,
---and takes numbers out of memory as they are: one of these would be a string or a table at any
---address, and the collector would crash on it.
local function tame_nans(buffer, count, dtype)
  if dtype ~= "f32" then return end
  local bits = ffi.cast("int32_t *", buffer)
  for i = 0, count - 1 do
    if bits[i] > MINUS_INFINITY and bits[i] < 0 then bits[i] = NAN end
  end
end

---The elements in host memory as cdata, and their count. 16-bit floats come as f32, and a NaN without
---its payload.
function Reading:host()
  self:alive("host")
  local source = self
  if self.dtype == "f16" or self.dtype == "bf16" then source = self:to("f32") end
  local count = self:count()
  local buffer = host_buffer.memory("host", source.dtype, count)
  binding.check(lib.qm_read(source.desc, buffer, count * dtypes.size[source.dtype]), "host")
  tame_nans(buffer, count, source.dtype)
  if source ~= self then source:free() end
  return buffer, count
end

---The tensor's bytes as a Lua string.
function Reading:bytes()
  self:alive("bytes")
  local size_bytes = self:size_bytes()
  local buffer = ffi.new("uint8_t[?]", math.max(size_bytes, 1))
  binding.check(lib.qm_read(self.desc, buffer, size_bytes), "bytes")
  return ffi.string(buffer, size_bytes)
end

local window = ffi.new("qm_tensor")

---Elements first .. first + length - 1 (from 1) of a tensor of one dimension into a host buffer.
---@param buffer ffi.cdata*  from host_buffer of this tensor's type
function Reading:read_elements(first, length, buffer)
  local name, size = "read_elements", dtypes.size[self:alive("read_elements").dtype]
  if #self.shape ~= 1 then check.fail(name, "self", "a tensor of one dimension", self) end
  check.integer(name, "first", first, 1, self.shape[1] + 1)
  check.integer(name, "length", length, 0, self.shape[1] + 1 - first)
  host_buffer.check(name, buffer, length, self.dtype)
  window.storage, window.dtype, window.ndim = self.storage, self.desc.dtype, 1
  window.offset_bytes, window.shape[0] = self.desc.offset_bytes + (first - 1) * size, length
  binding.check(lib.qm_read(window, buffer, length * size), name)
  tame_nans(buffer, length, self.dtype)
end

local function nest(buffer, shape, depth, at)
  if depth > #shape then return tonumber(buffer[at]), at + 1 end
  local rows = {}
  for i = 1, shape[depth] do rows[i], at = nest(buffer, shape, depth + 1, at) end
  return rows, at
end

---Nested tables of numbers (a number for a tensor without dimensions). Waits for the device.
function Reading:totable()
  local buffer = self:host()
  return (nest(buffer, self.shape, 1, 0))
end

---A value on its way: the device goes on meanwhile.
---
---    local loss = step(tokens, targets):read_later()
---    ...                                            -- the next steps' work
---    print(loss:get())
---
---@class qm.Reading
---@field dtype string
---@field shape integer[]
---@field handle ffi.cdata*|nil   until the value is here
---@field value any
local Later = {}
Later.__index = Later

local out_reading = ffi.new("qm_reading *[1]")

---Begin to read the elements, as they are now, without waiting for them.
---@return qm.Reading
function Reading:read_later()
  self:alive("read_later")
  local source = self
  if self.dtype == "f16" or self.dtype == "bf16" then source = self:to("f32") end
  local later = setmetatable({ dtype = source.dtype, shape = source.shape, count = source:count() }, Later)
  local status = lib.qm_read_begin(source.desc, out_reading)
  if source ~= self then source:free() end
  binding.check(status, "read_later")
  later.handle = ffi.gc(out_reading[0], lib.qm_reading_release)
  return later
end

---Is the value here, so that get() does not wait?
function Later:ready()
  if not self.handle then return true end
  local answer = lib.qm_reading_ready(self.handle)
  binding.check(math.min(answer, 0), "reading:ready")
  return answer == 1
end

---The value: a number, or nested tables of numbers, as totable() gives.
function Later:get()
  if self.handle then
    local buffer = host_buffer.memory("reading:get", self.dtype, self.count)
    local handle = ffi.gc(self.handle, nil)
    self.handle = nil
    binding.check(lib.qm_reading_end(handle, buffer, self.count * dtypes.size[self.dtype]), "reading:get")
    tame_nans(buffer, self.count, self.dtype)
    self.value = nest(buffer, self.shape, 1, 0)
  end
  return self.value
end

---Forget the value.
function Later:free()
  if self.handle then lib.qm_reading_release(ffi.gc(self.handle, nil)) end
  self.handle = nil
end

function Later.describe(reading)
  return ("qm.Reading %s [%s]"):format(reading.dtype, table.concat(reading.shape, ", "))
end
check.methods("qm.Reading", Later, { describe = true })

---The only element, as a number. Waits for the device.
function Reading:item()
  if self:count() ~= 1 then check.fail("item", "self", "a tensor of one element", self) end
  return tonumber(self:host()[0])
end

---One element by its indices, from 1.
function Reading:at(...)
  local at = 0
  if select("#", ...) ~= #self.shape then
    check.fail("at", "indices", #self.shape .. " indices", select("#", ...))
  end
  for i = 1, #self.shape do
    at = at * self.shape[i] + check.integer("at", "index " .. i, (select(i, ...)), 1, self.shape[i]) - 1
  end
  local row = self:view_as("at", { self:count() })
  local element = row:view_rows("at", at + 1, 1)
  local value = element:item()
  element:free()
  row:free()
  return value
end

---------------------------------------------------------------------------------------------------
-- Printing
---------------------------------------------------------------------------------------------------

function Reading.describe(tensor)
  return ("qm.Tensor %s [%s]%s"):format(tensor.dtype, table.concat(tensor.shape, ", "),
    tensor.storage == nil and ", freed" or "")
end

local function format_row(values, first, last, shown)
  local words = {}
  for i = first, math.min(last, first + shown - 1) do words[#words + 1] = ("%9.4g"):format(values[i]) end
  if last - first + 1 > shown then words[#words + 1] = "..." end
  return table.concat(words, " ")
end

---Header line, then at most eight rows of eight.
function Reading:__tostring()
  local header = Reading.describe(self) .. (self.device.name ~= "cpu" and " on " .. tostring(self.device) or "")
  if self.storage == nil then return header end
  local buffer, count = self:host()
  if count == 0 then return header end
  if #self.shape == 0 then return header .. ": " .. tostring(tonumber(buffer[0])) end
  local values = setmetatable({}, { __index = function(_, i) return tonumber(buffer[i]) end })
  local columns = self.shape[#self.shape]
  local rows, lines = count / columns, { header }
  for row = 0, math.min(rows, 8) - 1 do
    lines[#lines + 1] = format_row(values, row * columns, (row + 1) * columns - 1, 8)
  end
  if rows > 8 then lines[#lines + 1] = ("... (%d rows)"):format(rows) end
  return table.concat(lines, "\n")
end

return Reading
