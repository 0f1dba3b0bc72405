---Tensors: creation, views, moving data, releasing memory. Arithmetic lives in ops/, which adds its
---methods to this class. Only this module and ffi.lua hold pointers.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local casts = require("quartermoon.cast")
local check = require("quartermoon.check")
local host_buffer = require("quartermoon.host_buffer")
local devices = require("quartermoon.device")
local dtypes = require("quartermoon.dtypes")
local scopes = require("quartermoon.scope")
local lib = binding.lib

---A dense array on one device, row-major, up to four dimensions.
---@class qm.Tensor
---@field shape integer[]     extents
---@field dtype string        "f32", "f16", "bf16", "i8", "u8", "i16", "i32", "i64"
---@field device qm.Device
---@field requires_grad boolean|nil  a leaf whose gradient backward() collects
---@field grad qm.Tensor|nil  that gradient
local Tensor = {}
Tensor.__index = Tensor

local M = { Tensor = Tensor, scope = scopes.scope }

local DTYPE, DTYPE_SIZE, DTYPE_NAMES = dtypes.id, dtypes.size, dtypes.names
M.dtype_size, M.dtype_id, M.dtype_name = DTYPE_SIZE, DTYPE, dtypes.name

---------------------------------------------------------------------------------------------------
-- Creation
---------------------------------------------------------------------------------------------------

local function wrap(storage, device, dtype, shape, offset_bytes)
  local desc = ffi.new("qm_tensor")
  desc.storage, desc.offset_bytes, desc.ndim, desc.dtype = storage, offset_bytes, #shape, DTYPE[dtype]
  for i = 1, #shape do desc.shape[i - 1] = shape[i] end
  local tensor = setmetatable({ desc = desc, storage = storage, device = device, dtype = dtype, shape = shape },
    Tensor)
  scopes.note(tensor)
  return tensor
end

local function count_of(shape)
  local count = 1
  for i = 1, #shape do count = count * shape[i] end
  return count
end

local out_storage = ffi.new("qm_storage *[1]")

---Fresh storage; when memory is short, collect twice and try once more.
local function create_storage(name, device, size_bytes)
  local status = lib.qm_storage_create(device.handle, size_bytes, out_storage)
  if status == ffi.C.QM_E_MEMORY then
    collectgarbage()
    collectgarbage()
    status = lib.qm_storage_create(device.handle, size_bytes, out_storage)
  end
  binding.check(status, name)
  return ffi.gc(out_storage[0], lib.qm_storage_release)
end

local function check_shape(name, shape)
  if type(shape) == "number" then shape = { shape } end
  check.type(name, "shape", shape, "table")
  if #shape > tonumber(ffi.C.QM_DIMS_MAX) then check.fail(name, "shape", "at most 4 dimensions", #shape) end
  local copy, count = {}, 1
  for i = 1, #shape do
    copy[i] = check.integer(name, "shape", shape[i], 0, 2 ^ 50)
    count = count * copy[i]
  end
  if count > 2 ^ 50 then check.fail(name, "shape", "at most 2^50 elements", count) end
  return copy
end

local TENSOR_OPTIONS = { dtype = "f32", device = check.optional, requires_grad = false }
local FLOATS = { "f32", "bf16", "f16" }

local function check_options(name, options)
  options = check.options(name, options, TENSOR_OPTIONS)
  check.one_of(name, "dtype", options.dtype, options.requires_grad and FLOATS or DTYPE_NAMES)
  return options
end

local function new(name, shape, options)
  options = check_options(name, options)
  local device = devices.resolve(name, options.device)
  shape = check_shape(name, shape)
  local tensor = wrap(create_storage(name, device, count_of(shape) * DTYPE_SIZE[options.dtype]), device,
    options.dtype, shape, 0)
  if options.requires_grad then tensor:requires_gradient() end
  return tensor
end

---An uninitialised tensor.
---@param shape integer|integer[]
---@param options table|nil  { dtype = "f32", device = default, requires_grad = false }
---@return qm.Tensor
function M.empty(shape, options) return new("qm.empty", shape, options) end

local function filled(name, shape, value, options)
  check.type(name, "value", value, "number")
  local tensor = new(name, shape, options)
  binding.check(lib.qm_fill(tensor.desc, value), name, tensor)
  return tensor
end

---A tensor of one value.
---@param shape integer|integer[]
---@param value number
---@param options table|nil  { dtype = "f32", device = default, requires_grad = false }
---@return qm.Tensor
function M.full(shape, value, options) return filled("qm.full", shape, value, options) end
---Zeros.
function M.zeros(shape, options) return filled("qm.zeros", shape, 0, options) end
---Ones.
function M.ones(shape, options) return filled("qm.ones", shape, 1, options) end

---Extents of a nested table of numbers; raises where it is ragged.
local function measure(name, data)
  local shape, level = {}, data
  while type(level) == "table" do
    shape[#shape + 1] = #level
    level = level[1]
    if #shape > 4 then check.fail(name, "data", "at most 4 levels of tables", data) end
  end
  return shape
end

local function flatten(name, data, shape, depth, buffer, at)
  if depth > #shape then
    if type(data) ~= "number" then check.fail(name, "data", "numbers", data) end
    buffer[at] = data
    return at + 1
  end
  if type(data) ~= "table" or #data ~= shape[depth] then
    check.fail(name, "data", "rows of one length", type(data) == "table" and #data or data)
  end
  for i = 1, #data do at = flatten(name, data[i], shape, depth + 1, buffer, at) end
  return at
end

---A tensor of `shape` whose elements `write(buffer)` puts into a host buffer.
local function from_writer(name, shape, options, write)
  local half = options.dtype == "f16" or options.dtype == "bf16"
  local host_dtype = half and "f32" or options.dtype
  local count = count_of(shape)
  local buffer = host_buffer.memory(name, host_dtype, count)
  write(buffer)
  local tensor = new(name, shape, { dtype = host_dtype, device = options.device })
  binding.check(lib.qm_write(tensor.desc, buffer, count * DTYPE_SIZE[host_dtype]), name, tensor)
  if half then
    local converted = tensor:to(options.dtype)
    tensor:free()
    tensor = converted
  end
  if options.requires_grad then tensor:requires_gradient() end
  return tensor
end

---A tensor from a number or nested tables of numbers: qm.tensor({{1, 2}, {3, 4}}).
---@param data number|table
---@param options table|nil  { dtype = "f32", device = default, requires_grad = false }
function M.tensor(data, options)
  local name = "qm.tensor"
  if type(data) ~= "number" and type(data) ~= "table" then check.fail(name, "data", "a number or a table", data) end
  options = check_options(name, options)
  local shape = type(data) == "number" and {} or measure(name, data)
  return from_writer(name, shape, options, function(buffer) flatten(name, data, shape, 1, buffer, 0) end)
end

---The integers (or numbers) start, start + step, ... up to and including stop.
---@param start number
---@param stop number
---@param options table|nil  { dtype = "f32", device = default, requires_grad = false }
---@param step number|nil    default 1
---@return qm.Tensor [count]  at most 2^31 elements
function M.arange(start, stop, options, step)
  local name = "qm.arange"
  step = step or 1
  check.number(name, "start", start, -2 ^ 53, 2 ^ 53)
  check.number(name, "stop", stop, -2 ^ 53, 2 ^ 53)
  if check.number(name, "step", step) == 0 then check.fail(name, "step", "a step other than 0", step) end
  local count = math.max(math.floor((stop - start) / step) + 1, 0)
  if count > 2 ^ 31 then check.fail(name, "stop", "at most 2^31 elements", count) end
  options = check_options(name, options)
  return from_writer(name, { count }, options, function(buffer)
    for i = 0, count - 1 do buffer[i] = start + i * step end
  end)
end

---A string's bytes as a u8 tensor [#text].
function M.from_string(text, options)
  check.type("qm.from_string", "text", text, "string")
  options = check.options("qm.from_string", options, { device = check.optional })
  local tensor = new("qm.from_string", { #text }, { dtype = "u8", device = options.device })
  binding.check(lib.qm_write(tensor.desc, text, #text), "qm.from_string", tensor)
  return tensor
end

M.host_buffer, M.check_buffer = host_buffer.new, host_buffer.check

---A tensor [count] with the first elements of a host buffer.
---@param buffer ffi.cdata*  from host_buffer(dtype, at least count)
---@param options table|nil  { device = default }
function M.from_host(buffer, count, dtype, options)
  local name = "from_host"
  check.integer(name, "count", count, 0)
  check.one_of(name, "dtype", dtype, DTYPE_NAMES)
  host_buffer.check(name, buffer, count, dtype)
  options = check.options(name, options, { device = check.optional })
  local tensor = new(name, { count }, { dtype = dtype, device = options.device })
  binding.check(lib.qm_write(tensor.desc, buffer, count * DTYPE_SIZE[dtype]), name, tensor)
  return tensor
end

---A file's bytes as a read-only tensor, mapped: nothing is read before it is used.
---@param path string
---@param dtype string|nil  element type, default u8; the file's length must be a multiple of it
---@param device string|qm.Device|nil  a host device; default "cpu"
---@return qm.Tensor [elements]
function M.map_file(path, dtype, device)
  local name = "qm.map_file"
  check.type(name, "path", path, "string")
  dtype = check.one_of(name, "dtype", dtype or "u8", DTYPE_NAMES)
  device = devices.resolve(name, device or "cpu")
  binding.check(lib.qm_storage_map(device.handle, path, out_storage), name)
  local storage = ffi.gc(out_storage[0], lib.qm_storage_release)
  local size_bytes = tonumber(lib.qm_storage_size(storage))
  if size_bytes % DTYPE_SIZE[dtype] ~= 0 then
    binding.raise(("%s: %s: %d bytes are no whole number of %s"):format(name, path, size_bytes, dtype))
  end
  return wrap(storage, device, dtype, { size_bytes / DTYPE_SIZE[dtype] }, 0)
end

---An uninitialised tensor like this one.
---@param dtype string|nil  default: this tensor's
function Tensor:empty_like(dtype)
  return new("empty_like", self.shape, { dtype = dtype or self.dtype, device = self.device })
end
function Tensor:zeros_like(dtype) return self:empty_like(dtype):fill(0) end

---------------------------------------------------------------------------------------------------
-- Views, copies, release
---------------------------------------------------------------------------------------------------

function Tensor:alive(name)
  if self.storage == nil then
    check.type("alive", "name", name, "string")
    binding.raise(name .. ": this tensor was freed (by :free(), the end of its scope, or backward(); "
      .. ":keep() prevents the last two)")
  end
  return self
end

local function view(self, shape, offset_bytes, dtype)
  lib.qm_storage_retain(self.storage)
  -- By way of void *, because a cast to the same type would return the same object and its finalizer.
  local storage = ffi.cast("qm_storage *", ffi.cast("void *", self.storage))
  return wrap(ffi.gc(storage, lib.qm_storage_release), self.device, dtype or self.dtype, shape, offset_bytes)
end

---Do not release this tensor at the end of the scope (or by backward()); it is a parameter, a
---state, something that stays.
---@return qm.Tensor self
function Tensor:keep()
  self.kept = true
  return self
end

---A second tensor on the same memory, released on its own.
function Tensor:share()
  self:alive("share")
  return view(self, self.shape, self.desc.offset_bytes)
end

---Release the memory now. Freeing twice is harmless; using the tensor afterwards is an error. On the
---gradient tape it keeps its place: gradients flow past it where its value is not needed, and where it
---is, backward() raises; they are never lost in silence.
function Tensor:free()
  if self.storage == nil then return end
  lib.qm_storage_release(ffi.gc(self.storage, nil))
  self.storage, self.desc.storage = nil, nil
  if self.casts then casts.free(self) end
end

---Go on with another tensor's memory, of the same shape and type, in place of what was freed.
---@param other qm.Tensor  freed by this
function M.revive(tensor, other)
  tensor.storage, tensor.desc.storage, tensor.desc.offset_bytes = other.storage, other.storage, other.desc.offset_bytes
  other.storage, other.desc.storage = nil, nil
end

---How many tensors share this memory.
function Tensor:references() return lib.qm_storage_references(self:alive("references").storage) end

function Tensor:count() return count_of(self.shape) end
function Tensor:size_bytes() return self:count() * DTYPE_SIZE[self.dtype] end
function Tensor:dims() return #self.shape end

---Views for the differentiable reshape and narrow of ops/shape.lua.
function Tensor:view_as(name, shape)
  self:alive(name)
  shape = check_shape(name, shape)
  if count_of(shape) ~= self:count() then
    check.fail(name, "shape", ("a shape of %d elements"):format(self:count()), count_of(shape))
  end
  return view(self, shape, self.desc.offset_bytes)
end

function Tensor:view_rows(name, first, length)
  self:alive(name)
  if #self.shape == 0 then check.fail(name, "self", "at least one dimension", self) end
  local rows = self.shape[1]
  check.integer(name, "first", first, 1, rows + 1)
  check.integer(name, "length", length, 0, rows - first + 1)
  local shape = { length }
  for i = 2, #self.shape do shape[i] = self.shape[i] end
  local row_bytes = rows == 0 and 0 or self:size_bytes() / rows
  return view(self, shape, self.desc.offset_bytes + (first - 1) * row_bytes)
end

---Refuse to overwrite what the tape may still need.
function Tensor:writable(name)
  if self:alive(name).node then
    check.type("writable", "name", name, "string")
    binding.raise(name .. ": this tensor is on the gradient tape, which may still need its value: change a :clone(), "
      .. "or compute it under qm.no_grad")
  end
  return self
end

---The same bytes as another element type: a view, released on its own. Not differentiable.
---@param dtype string
---@param shape integer|integer[]  of as many bytes
function Tensor:reinterpret(dtype, shape)
  local name = "reinterpret"
  self:alive(name)
  check.one_of(name, "dtype", dtype, DTYPE_NAMES)
  shape = check_shape(name, shape)
  if count_of(shape) * DTYPE_SIZE[dtype] ~= self:size_bytes() then
    check.fail(name, "shape", ("a shape of %d bytes"):format(self:size_bytes()), count_of(shape) * DTYPE_SIZE[dtype])
  end
  return view(self, shape, self.desc.offset_bytes, dtype)
end

---Overwrite with `value`. @return qm.Tensor self
function Tensor:fill(value)
  check.type("fill", "value", value, "number")
  binding.check(lib.qm_fill(self:writable("fill").desc, value), "fill")
  return self
end

---Overwrite with another tensor's values, converting types. @return qm.Tensor self
function Tensor:copy(source)
  binding.check(lib.qm_copy(check.desc("copy", "source", source), self:writable("copy").desc), "copy")
  return self
end

---A copy of another type or on another device (not differentiable: see qm.cast).
---@param target string|qm.Device  an element type, a device or its name
function Tensor:to(target)
  self:alive("to")
  if type(target) == "string" and DTYPE[target] then
    return new("to", self.shape, { dtype = target, device = self.device }):copy(self)
  end
  return new("to", self.shape, { dtype = self.dtype, device = devices.resolve("to", target) }):copy(self)
end
function Tensor:clone() return self:alive("clone"):empty_like():copy(self) end

---------------------------------------------------------------------------------------------------
-- Leaves
---------------------------------------------------------------------------------------------------

---Make this a leaf whose gradient backward() collects in `.grad`. @return qm.Tensor self
function Tensor:requires_gradient()
  if self.dtype ~= "f32" and self.dtype ~= "bf16" and self.dtype ~= "f16" then
    check.fail("requires_gradient", "self", "a float tensor", self)
  end
  self.requires_grad = true
  return self:keep()
end

function Tensor:zero_grad()
  if self.grad then self.grad:free() end
  self.grad = nil
end

-- Reading values back and printing them: tensor_read.lua.
for name, method in pairs(require("quartermoon.tensor_read")) do Tensor[name] = method end
check.methods("qm.Tensor", Tensor)

return M
