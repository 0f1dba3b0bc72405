---The one place that meets the C library: reads its header, loads it, turns a status into an error.
---
---Looks for the library in $QUARTERMOON_LIB, then in the source tree's build/$QM_CONFIG (default
---release), then where `make install` put it. The header beside it is the FFI declaration.

local ffi = require("ffi")

local M = {}

---Folder this file lies in, with a trailing slash.
local here = debug.getinfo(1, "S").source:match("^@(.*/)") or "./"
M.library_folder = here

local function exists(path)
  local file = io.open(path, "rb")
  if file then file:close() end
  return file ~= nil
end

---The places of (header, library), best first.
local function candidates()
  local root = here .. "../../"
  local prefix = here .. "../../../../"
  local config = os.getenv("QM_CONFIG") or "release"
  local tree = { root .. "engine/quartermoon.h", root .. "build/" .. config .. "/libquartermoon.so" }
  local installed = { prefix .. "include/quartermoon.h", prefix .. "lib/libquartermoon.so" }
  local wish = os.getenv("QUARTERMOON_LIB")
  if wish then return { { tree[1], wish }, { installed[1], wish } } end
  return { tree, installed }
end

local function find()
  local tried = {}
  for _, pair in ipairs(candidates()) do
    if exists(pair[1]) and exists(pair[2]) then return pair[1], pair[2] end
    tried[#tried + 1] = pair[2]
  end
  error("quartermoon: the engine is not built: no " .. table.concat(tried, " and no ")
    .. "\nBuild it with scripts/build, or point QUARTERMOON_LIB at the library.", 0)
end

local header_path, library_path = find()
M.library_path = library_path

-- busted memoises ffi.cdef and reloads modules; so we ask LuaJIT itself whether it knows the types.
if not pcall(ffi.typeof, "qm_tensor") then
  local file = assert(io.open(header_path, "rb"))
  local text = file:read("*a")
  file:close()
  local declarations = text:match("/%* cdef: begin %*/(.*)/%* cdef: end %*/")
  ffi.cdef("int setenv(const char *name, const char *value, int overwrite);")
  ffi.cdef(assert(declarations, header_path .. ": no cdef section") .. "\n")
end

-- A waiting thread of OpenMP's spins for many milliseconds by default. Where another program wants the
-- cores too, that made whole training steps ten times slower; a short spin costs nothing where not.
if not os.getenv("OMP_WAIT_POLICY") and not os.getenv("GOMP_SPINCOUNT") then
  ffi.C.setenv("GOMP_SPINCOUNT", "10000", 1)
end

---The library. Call `lib.qm_x(...)` in full: the JIT resolves it, and the namespace must stay alive.
local lib = ffi.load(library_path)
M.lib = lib

local header_version = tonumber(ffi.C.QM_ABI_VERSION)
if lib.qm_abi_version() ~= header_version then
  error(("quartermoon: %s has ABI %d, %s is ABI %d: rebuild it with scripts/build"):format(
    library_path, lib.qm_abi_version(), header_path, header_version), 0)
end

---Raise `message` with the position of the nearest caller outside this library.
---@param message string
function M.raise(message)
  local level = 2
  while true do
    local info = debug.getinfo(level, "Sl")
    if not info then break end
    if info.what ~= "C" and info.source:sub(2, #here + 1) ~= here then
      local position = ("%s:%d: "):format(info.short_src, info.currentline)
      local from, to = message:find(position, 1, true) -- what was raised further inside has it already
      if from then message = message:sub(1, from - 1) .. message:sub(to + 1) end
      error(position .. message, 0)
    end
    level = level + 1
  end
  error(message, 0)
end

local function pass_on(name, place, ok, ...)
  if ok then return ... end
  local message = tostring((...))
  if message:find(place, 1, true) then error(message, 0) end
  local source = message:match("^([^\n]-):%d+: ")
  -- The caller's line goes, and comes again with raise; one of this library's is a fault of ours and stays.
  if source and not source:find("quartermoon/", 1, true) then message = message:sub(#source + 1):gsub("^:%d+: ", "") end
  M.raise(("%s: %s: %s"):format(name, place, message))
end

---Call f. An error of its that does not name `place`, a file, is raised again as one that does.
---@param name string  the public function's name
---@return any ...     what f returns
function M.naming(name, place, f, ...) return pass_on(name, place, pcall(f, ...)) end

---The last failure's sentence.
function M.last_error() return ffi.string(lib.qm_last_error()) end

---Turn a failed status into an error on the user's line: "qm.swiglu: argument 'up': expected ...".
---@param status integer
---@param name string  the public function's name
---@param a qm.Tensor|nil|false  as b to e, what the call was to fill: released when it failed
function M.check(status, name, a, b, c, d, e)
  if status == 0 then return end
  local sentence = M.last_error()
  for _, tensor in pairs({ a, b, c, d, e }) do
    if tensor then tensor:free() end
  end
  M.raise(name .. ": " .. sentence)
end

return M
