---The tensors of a model folder: model.safetensors, or shards with model.safetensors.index.json. Files are
---mapped; a tensor is read when it is asked for.

local files = require("quartermoon.files")
local raise = require("quartermoon.ffi").raise
local safetensors = require("quartermoon.safetensors")

local M = {}

---@class qm.models.Weights
---@field folder string
local Weights = {}
Weights.__index = Weights

local INDEX = "model.safetensors.index.json"

---A name that an index gives twice. JSON readers keep one of them and say nothing.
local function repeated_name(text)
  local seen = {}
  for key in text:gmatch('"([^"\\]+)"%s*:%s*"[^"\\]*"') do
    if seen[key] then return key end
    seen[key] = true
  end
end

---The shards that an index names, and each tensor's. Every entry is checked.
local function read_index(name, path)
  local index = files.assert(name, files.read_json(path))
  local map = type(index) == "table" and index.weight_map
  if type(map) ~= "table" or #map > 0 or next(map) == nil then
    raise(("%s: %s: expected an object 'weight_map' with the file of each tensor"):format(name, path))
  end
  local twice = repeated_name(files.read(path))
  if twice then raise(("%s: %s: tensor '%s' stands there twice"):format(name, path, twice)) end
  local shards, seen = {}, {}
  for key, shard in pairs(map) do
    if type(shard) ~= "string" or shard:find("/", 1, true) or shard:find("%z") or not shard:find("%.safetensors$") then
      raise(("%s: %s: tensor '%s': expected the name of a .safetensors file in this folder, got %s"):format(name, path,
        key, tostring(shard)))
    end
    if not seen[shard] then
      seen[shard] = true
      shards[#shards + 1] = shard
    end
  end
  table.sort(shards)
  return shards, map
end

---The one file of a folder without an index.
local function single(name, folder)
  if files.exists(folder .. "/model.safetensors") then return "model.safetensors" end
  local names, found, other = files.assert(name, files.list(folder)), {}, nil
  for _, entry in ipairs(names) do
    if entry:find("%.safetensors$") then found[#found + 1] = entry end
    if entry:find("%.bin$") or entry:find("%.pth?$") or entry:find("%.gguf$") then other = other or entry end
  end
  if #found == 1 then return found[1] end
  if #found > 1 then
    raise(("%s: %s: %d .safetensors files and no %s that says what is in them"):format(name, folder, #found, INDEX))
  end
  raise(("%s: %s: no model.safetensors%s"):format(name, folder,
    other and (" (%s is of a kind that is not read)"):format(other) or ""))
end

---Every tensor of every file, found in exactly one of them, and in the one that the index names.
local function gather(self, name, paths, map)
  for i, file in ipairs(self.shards) do
    for _, key in ipairs(file:names()) do
      if self.found[key] then
        raise(("%s: tensor '%s' is in %s and in %s"):format(name, key, self.found[key].path, file.path))
      end
      self.found[key] = file
      self.names[#self.names + 1] = key
      if map and map[key] ~= paths[i] then
        raise(("%s: %s: tensor '%s' is in %s, %s"):format(name, self.folder .. "/" .. INDEX, key, paths[i],
          map[key] and "the index says in " .. map[key] or "the index does not know it"))
      end
    end
  end
  for key, shard in pairs(map or {}) do
    if not self.found[key] then
      raise(("%s: %s: tensor '%s' is missing from %s"):format(name, self.folder .. "/" .. INDEX, key, shard))
    end
  end
end

---Open a folder's weights and check that files and index agree.
---@param name string  whose errors these are
---@param folder string
---@return qm.models.Weights  close it
function M.open(name, folder)
  local self = setmetatable({ folder = folder, shards = {}, found = {}, names = {}, used = {} }, Weights)
  local paths, map
  if files.exists(folder .. "/" .. INDEX) and not files.exists(folder .. "/model.safetensors") then
    paths, map = read_index(name, folder .. "/" .. INDEX)
  else
    paths = { single(name, folder) }
  end
  local ok, message = pcall(function()
    for i, shard in ipairs(paths) do self.shards[i] = safetensors.open(folder .. "/" .. shard) end
    gather(self, name, paths, map)
  end)
  if ok then return self end
  self:close()
  error(message, 0)
end

---Tensors whose name lacks what published ones begin with are known by the full name.
function Weights:alias(prefix, anchor)
  if self.found[prefix .. anchor] or not self.found[anchor] then return end
  self.short = prefix
end

---The name a tensor bears in its file, or nil.
function Weights:stored(key)
  if self.found[key] then return key end
  if self.short and key:sub(1, #self.short) == self.short then
    local rest = key:sub(#self.short + 1)
    return self.found[rest] and rest
  end
end

function Weights:has(key) return self:stored(key) ~= nil end

---@return string dtype, integer[] shape, string path
function Weights:info(key)
  local stored = self:stored(key)
  local dtype, shape = self.found[stored]:info(stored)
  return dtype, shape, self.found[stored].path
end

---The shape that a tensor must have.
---@raise naming file and tensor, where it is missing or is another
function Weights:expect(name, key, shape)
  if not self:has(key) then
    raise(("%s: %s holds no tensor '%s', expected [%s]"):format(name, self.folder, key, table.concat(shape, ", ")))
  end
  local dtype, got, path = self:info(key)
  if table.concat(got, ",") ~= table.concat(shape, ",") then
    raise(("%s: %s: tensor '%s': expected [%s] as config.json has it, got %s [%s]"):format(name, path, key,
      table.concat(shape, ", "), dtype, table.concat(got, ", ")))
  end
  return dtype
end

---A tensor on a device, and noted as used.
---@return qm.Tensor
function Weights:tensor(key, device)
  local stored = self:stored(key)
  self.used[stored] = true
  return self.found[stored]:tensor(stored, device)
end

---Refuse tensors that nothing read and that `harmless` (a function of the name) does not know.
function Weights:refuse_unused(name, harmless)
  for _, key in ipairs(self.names) do
    if not self.used[key] and not harmless(key) then
      raise(("%s: %s: tensor '%s' has no place in a model of this config.json"):format(name, self.found[key].path, key))
    end
  end
end

function Weights:close()
  for _, file in ipairs(self.shards) do file:close() end
end

return M
