---Small files, whole: reading with an error that names the file, writing atomically, JSON.

local ffi = require("ffi")
local bit = require("bit")
local cjson = require("cjson")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local host_buffer = require("quartermoon.host_buffer")
local lib = binding.lib

local M = {}

---@return boolean
function M.exists(path)
  check.type("qm.files.exists", "path", path, "string")
  local file = io.open(path, "rb")
  if file then file:close() end
  return file ~= nil
end

---Length of a file in bytes, or nil and the reason.
function M.size(path)
  check.type("qm.files.size", "path", path, "string")
  local file, reason = io.open(path, "rb")
  if not file then return nil, reason end
  local size, why = file:seek("end")
  file:close()
  if not size or size >= 2 ^ 53 then return nil, path .. ": " .. (why or "not a regular file") end
  return size
end

---A file's bytes, or nil and the reason, which names the file.
---@return string|nil text, string|nil reason
function M.read(path)
  check.type("qm.files.read", "path", path, "string")
  local file, reason = io.open(path, "rb")
  if not file then return nil, reason end
  local text, why = file:read("*a")
  file:close()
  if not text then return nil, path .. ": " .. (why or "cannot be read") end
  return text
end

---A file being written; nothing stands at its path before :commit().
---@class qm.FileWriter
local Writer = {}
Writer.__index = Writer
local out_file = ffi.new("qm_file *[1]")

---Begin to write a file atomically, by way of "<path>.partial".
---@param path string
---@return qm.FileWriter
---@raise when it cannot be created, naming it
function M.create(path)
  check.type("qm.files.create", "path", path, "string")
  binding.check(lib.qm_file_create(path, out_file), "qm.files.create")
  return setmetatable({ handle = ffi.gc(out_file[0], lib.qm_file_release), path = path }, Writer)
end

---Append a string, or `size_bytes` bytes of a host buffer.
---@param bytes string|ffi.cdata*
---@param size_bytes integer|nil  of a buffer; a string is written whole
---@raise when the disk is full, naming the file
function Writer:write(bytes, size_bytes)
  local name, is_string = "file:write", type(bytes) == "string"
  local size = is_string and #bytes or check.integer(name, "size_bytes", size_bytes or 0, 0)
  if not is_string then host_buffer.check_bytes(name, bytes, size) end
  binding.check(lib.qm_file_write(self.handle, bytes, size), name)
end

---Put the file in its place, synced to the disk.
function Writer:commit()
  local ok, message = pcall(binding.check, lib.qm_file_commit(self.handle), "file:commit")
  self:close()
  if not ok then error(message, 0) end
end

---Give up what was not committed. Closing twice is harmless.
function Writer:close()
  if self.handle == nil then return end
  lib.qm_file_release(ffi.gc(self.handle, nil))
  self.handle = nil
end

---Write a file, atomically.
---@param path string
---@param text string
function M.write(path, text)
  local writer = M.create(path)
  local ok, message = pcall(writer.write, writer, text)
  if ok then return writer:commit() end
  writer:close()
  error(message, 0)
end

---A JSON file's value, or nil and the reason, which names the file.
function M.read_json(path)
  local text, reason = M.read(path)
  if not text then return nil, reason end
  local ok, value = pcall(cjson.decode, text)
  if not ok then return nil, path .. ": " .. value end
  return value
end

---Write a value as JSON, atomically.
---@raise when JSON cannot hold it
function M.write_json(path, value)
  local ok, text = pcall(cjson.encode, value)
  if not ok then binding.raise("qm.files.write_json: " .. text) end
  M.write(path, text .. "\n")
end

local bxor, lshift, rshift, tobit = bit.bxor, bit.lshift, bit.rshift, bit.tobit

local function mix(text, hash)
  for i = 1, #text do
    hash = tobit(hash + text:byte(i))
    hash = tobit(hash + lshift(hash, 10))
    hash = bxor(hash, rshift(hash, 6))
  end
  return hash
end

---A 64-bit checksum to notice changes by, not to resist forgery: Jenkins' one-at-a-time from two
---starts (http://burtleburtle.net/bob/hash/doobs.html). Continue with `state` over several strings.
---@param text string
---@param state table|nil  what an earlier call returned as its second value
---@return string hex, table state
function M.checksum(text, state)
  check.type("qm.files.checksum", "text", text, "string")
  local a, b = mix(text, state and state[1] or 0), mix(text, state and state[2] or 0x2545f491)
  local function finish(hash)
    hash = tobit(hash + lshift(hash, 3))
    hash = bxor(hash, rshift(hash, 11))
    return tobit(hash + lshift(hash, 15))
  end
  return bit.tohex(finish(a)) .. bit.tohex(finish(b)), { a, b }
end

---Raise a reason from io.open and its like as "name: reason".
function M.assert(name, value, reason)
  if value == nil then binding.raise(name .. ": " .. tostring(reason)) end
  return value
end

---Make a folder, and those it lies in; one that is there already is fine.
---@param path string
function M.make_folder(path)
  check.type("qm.files.make_folder", "path", path, "string")
  binding.check(lib.qm_folder_create(path), "qm.files.make_folder")
end

local needed = ffi.new("int64_t[1]")

---Names of what a folder holds, sorted; or nil and the reason.
---@param path string
---@return string[]|nil names, string|nil reason
function M.list(path)
  check.type("qm.files.list", "path", path, "string")
  local room, buffer = 4096, nil
  repeat -- the folder may grow between two calls
    if buffer then room = tonumber(needed[0]) end
    buffer = ffi.new("char[?]", room)
    if lib.qm_folder_list(path, buffer, room, needed) ~= 0 then return nil, binding.last_error() end
  until needed[0] <= room
  local names = {}
  for name in ffi.string(buffer, tonumber(needed[0])):gmatch("%Z+") do names[#names + 1] = name end
  table.sort(names)
  return names
end

---Give a folder another name, atomically and synced to the disk.
---@param from string
---@param to string  must not be there yet
function M.rename_folder(from, to)
  check.type("qm.files.rename_folder", "from", from, "string")
  check.type("qm.files.rename_folder", "to", to, "string")
  binding.check(lib.qm_folder_rename(from, to), "qm.files.rename_folder")
end

---Remove a folder and the files in it; it must hold no folders.
---@param path string
function M.remove_folder(path)
  check.type("qm.files.remove_folder", "path", path, "string")
  binding.check(lib.qm_folder_remove(path), "qm.files.remove_folder")
end

---@param path string
---@return string folder  with its trailing slash, "" when the path has none
---@return string base
function M.split(path)
  check.type("qm.files.split", "path", path, "string")
  local folder, base = path:match("^(.*/)([^/]*)$")
  return folder or "", base or path
end

check.methods("qm.FileWriter", Writer)

return M
