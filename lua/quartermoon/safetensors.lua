---Safetensors files: tensors and string metadata, read without trusting a number in the file and
---written so that a kill at any instant leaves the old file or the new one.
---
---    qm.safetensors.save("model.safetensors", { weight = w, bias = b }, { step = "100" })
---    local file = qm.safetensors.open("model.safetensors")
---    local w = file:tensor("weight", "cuda")
---    file:close()
---
---Source: https://huggingface.co/docs/safetensors. Checks and bytes are C's (engine/safetensors.c).

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local tensors = require("quartermoon.tensor")
local lib = binding.lib

local M = {}

---------------------------------------------------------------------------------------------------
-- Reading
---------------------------------------------------------------------------------------------------

---An open file.
---@class qm.SafetensorsFile
---@field path string
---@field metadata table<string, string>
local File = {}
File.__index = File

local out_file = ffi.new("qm_safetensors *[1]")
local out_name, out_value = ffi.new("const char *[1]"), ffi.new("const char *[1]")

local function read_entries(file, name)
  local like = ffi.new("qm_tensor")
  for index = 0, tonumber(lib.qm_safetensors_count(file.handle)) - 1 do
    binding.check(lib.qm_safetensors_entry(file.handle, index, out_name, like), name)
    local shape = {}
    for i = 1, like.ndim do shape[i] = tonumber(like.shape[i - 1]) end
    local key = ffi.string(out_name[0])
    file.order[index + 1] = key
    file.entries[key] = { index = index, dtype = tensors.dtype_name[like.dtype] or "unsupported", shape = shape }
  end
end

local function read_metadata(file)
  local index = 0
  while lib.qm_safetensors_metadata(file.handle, index, out_name, out_value) == 0 do
    file.metadata[ffi.string(out_name[0])] = ffi.string(out_value[0])
    index = index + 1
  end
end

---Open a file and check all of it but the values: lengths, names, types, shapes, offsets.
---@param path string
---@return qm.SafetensorsFile
---@raise when the file is missing, unreadable or not in order, naming it and the reason
function M.open(path)
  local name = "qm.safetensors.open"
  check.type(name, "path", path, "string")
  binding.check(lib.qm_safetensors_open(path, out_file), name)
  local file = setmetatable({ path = path, handle = ffi.gc(out_file[0], lib.qm_safetensors_release),
    order = {}, entries = {}, metadata = {} }, File)
  read_entries(file, name)
  read_metadata(file)
  return file
end

local function entry(file, name, key)
  if file.handle == nil then binding.raise(("%s: %s is closed"):format(name, file.path)) end
  check.type(name, "name", key, "string")
  local found = file.entries[key]
  if not found then
    local near = check.nearest(key, file.order)
    binding.raise(("%s: %s holds no tensor '%s'%s"):format(name, file.path, key,
      near and ", did you mean '" .. near .. "'?" or ""))
  end
  return found
end

---The tensors' names, in the order of their data.
---@return string[]
function File:names()
  local names = {}
  for i, key in ipairs(self.order) do names[i] = key end
  return names
end

---@return boolean
function File:has(key) return self.entries[key] ~= nil end

---A tensor's type and extents. The type is "unsupported" where no tensor here could hold it
---(F64, BOOL, more than four dimensions ...).
---@return string dtype, integer[] shape
function File:info(key)
  local found = entry(self, "file:info", key)
  local shape = {}
  for i, extent in ipairs(found.shape) do shape[i] = extent end
  return found.dtype, shape
end

---Copy a tensor's values into `out`, whose shape and type must be the file's.
---@param key string
---@param out qm.Tensor  overwritten; on any device
---@return qm.Tensor out
function File:read(key, out)
  local found, name = entry(self, "file:read", key), "file:read: " .. self.path
  binding.check(lib.qm_safetensors_read(self.handle, found.index, check.desc(name, "out", out)), name)
  return out
end

---A new tensor with the values of the one called `key`.
---@param key string
---@param device string|qm.Device|nil  default: the default device
---@return qm.Tensor
function File:tensor(key, device)
  local found = entry(self, "file:tensor", key)
  if found.dtype == "unsupported" then
    binding.raise(("file:tensor: %s: '%s' has a type or shape that no tensor here can hold"):format(self.path, key))
  end
  local place = ("%s: tensor '%s'"):format(self.path, key)
  local out = binding.naming("file:tensor", place, tensors.empty, found.shape, { dtype = found.dtype, device = device })
  binding.check(lib.qm_safetensors_read(self.handle, found.index, out.desc), "file:tensor: " .. self.path, out)
  return out
end

---Close the file. Closing twice is harmless; tensors that were read stay.
function File:close()
  if self.handle == nil then return end
  lib.qm_safetensors_release(ffi.gc(self.handle, nil))
  self.handle = nil
end

function File:__tostring()
  return ("qm.safetensors '%s', %d tensors%s"):format(self.path, #self.order, self.handle and "" or ", closed")
end
File.describe = File.__tostring

---------------------------------------------------------------------------------------------------
-- Writing
---------------------------------------------------------------------------------------------------

---What a tensor that is yet to be made will be.
local function description_of(name, key, plan)
  if type(plan) ~= "table" or type(plan.make) ~= "function" then check.desc(name, "tensors." .. key, plan) end
  check.one_of(name, "tensors." .. key .. ".dtype", plan.dtype, require("quartermoon.dtypes").names)
  check.type(name, "tensors." .. key .. ".shape", plan.shape, "table")
  check.integer(name, "tensors." .. key .. ".shape, dimensions", #plan.shape, 0, tonumber(ffi.C.QM_DIMS_MAX))
  local desc = ffi.new("qm_tensor")
  desc.ndim, desc.dtype = #plan.shape, tensors.dtype_id[plan.dtype]
  for i, extent in ipairs(plan.shape) do
    desc.shape[i - 1] = check.integer(name, "tensors." .. key .. ".shape", extent, 0, 2 ^ 53)
  end
  return desc
end

---The tensors as a list of { name, tensor }. Those of a table by name go widest type first, then by
---name, so that every tensor lies at a multiple of its element size (the usual writers' order).
local function ordered(name, parts)
  check.type(name, "tensors", parts, "table")
  local list = {}
  if #parts > 0 then
    for i, part in ipairs(parts) do
      check.type(name, ("tensors[%d]"):format(i), part, "table")
      list[i] = { part[1] or part.name, part[2] or part.tensor }
    end
  else
    for key, tensor in pairs(parts) do list[#list + 1] = { key, tensor } end
  end
  for _, part in ipairs(list) do
    local key, tensor = part[1], part[2]
    if type(key) ~= "string" or key:find("%z") then check.fail(name, "tensors", "names without NUL bytes", key) end
    if check.is_tensor(tensor) then
      tensor:alive(name .. ": tensor '" .. key .. "'")
    else
      part.plan = description_of(name, key, tensor)
    end
  end
  if #parts == 0 then
    local size = tensors.dtype_size
    table.sort(list, function(a, b)
      local wide_a, wide_b = size[a[2].dtype], size[b[2].dtype]
      if wide_a ~= wide_b then return wide_a > wide_b end
      return a[1] < b[1]
    end)
  end
  return list
end

---Metadata pairs sorted by key: the same contents give the same file.
local function sorted_metadata(name, metadata)
  local keys = {}
  for key, value in pairs(metadata) do
    if type(key) ~= "string" or key:find("%z") then check.fail(name, "metadata", "names without NUL bytes", key) end
    if type(value) ~= "string" or value:find("%z") then
      check.fail(name, "metadata." .. key, "a string without NUL bytes", value)
    end
    keys[#keys + 1] = key
  end
  table.sort(keys)
  return keys
end

local function write(name, writer, list, metadata, keys)
  for _, key in ipairs(keys) do
    binding.check(lib.qm_safetensors_add_metadata(writer, key, metadata[key]), name)
  end
  for _, part in ipairs(list) do
    binding.check(lib.qm_safetensors_add(writer, part[1], part.plan or part[2].desc), name)
  end
  for _, part in ipairs(list) do
    local tensor = part.plan and part[2].make() or part[2]
    local status = lib.qm_safetensors_write(writer, check.desc(name, part[1], tensor))
    if part.plan then tensor:free() end
    binding.check(status, name)
  end
  binding.check(lib.qm_safetensors_commit(writer), name)
end

local out_writer = ffi.new("qm_safetensors_writer *[1]")

---Write tensors to a file, atomically: until everything is on the disk the old file stays as it is.
---The parts go to "<path>.partial" first.
---@param path string
---@param parts table  { name = tensor, ... }, or { { name, tensor }, ... } to keep an order. In the place of
---   a tensor may stand { dtype =, shape =, make = function }: it is made when its turn comes and released
---@param metadata table<string, string>|nil
---@raise when anything cannot be written (a full disk, say); nothing is left behind then
function M.save(path, parts, metadata)
  local name = "qm.safetensors.save"
  check.type(name, "path", path, "string")
  metadata = metadata == nil and {} or check.type(name, "metadata", metadata, "table")
  local list, keys = ordered(name, parts), sorted_metadata(name, metadata)
  binding.check(lib.qm_safetensors_create(path, out_writer), name)
  local writer = out_writer[0]
  local ok, message = pcall(write, name, writer, list, metadata, keys)
  lib.qm_safetensors_writer_release(writer)
  if not ok then error(message, 0) end
end

---Open `path`, run `body(file)`, close it again whatever happens.
---@return any ...  what body returns
function M.with(path, body)
  local file = M.open(path)
  local function close(ok, ...)
    file:close()
    if not ok then error((...), 0) end
    return ...
  end
  return close(pcall(body, file))
end

check.methods("qm.SafetensorsFile", File)

return M
