---`quartermoon doctor`, the part about GPUs.

local devices = require("quartermoon.device")

local M = {}

local function nvcc_path(first_line)
  local wish = os.getenv("NVCC")
  return wish and wish ~= "" and wish or first_line("command -v nvcc || ls /usr/local/cuda/bin/nvcc")
end

-- Why the device does not open, and what to do about it: the first pattern that is found decides.
local REMEDIES = {
  { "libquartermoon_cuda%.so: cannot open",
    "the engine was built without it: install the CUDA toolkit (13.0), then scripts/build",
    "the engine was built without it, and nvcc is here: scripts/build" },
  { "lib[%w_]+%.so[%d.]*: cannot open",
    "a library of the CUDA toolkit is not found: install it, or add its folder to LD_LIBRARY_PATH" },
  { "built for another version", "scripts/build" },
  { "no NVIDIA driver",
    "where there is a GPU: install NVIDIA's driver, 580 or later (in a container: --gpus all)" },
  { "driver is too old", "install a newer NVIDIA driver, 580 or later for CUDA 13" },
  { "shows no GPU", "look at CUDA_VISIBLE_DEVICES and at nvidia-smi" },
  { "compute capability", "an Ampere GPU (8.0, of 2020) or a later one is needed" },
}

---What to do about a device that does not open.
---@param reason string        what opening it said
---@param has_compiler boolean is nvcc here?
---@return string|nil
function M.advice(reason, has_compiler)
  for _, remedy in ipairs(REMEDIES) do
    if reason:find(remedy[1]) then return has_compiler and remedy[3] or remedy[2] end
  end
end

---cuDNN's version, if the loader finds it.
local function cudnn_version()
  local ffi = require("ffi")
  pcall(ffi.cdef, "size_t cudnnGetVersion(void);")
  local ok, version = pcall(function() return tonumber(ffi.load("libcudnn.so.9").cudnnGetVersion()) end)
  return ok and ("%d.%d.%d"):format(version / 10000, version / 100 % 100, version % 100) or nil
end

---Add what there is to say.
---@param add function  (name, state, words, advice)
---@param first_line function  the first line that a shell command prints, or nil
function M.examine(add, first_line)
  local nvcc = nvcc_path(first_line)
  local cuda, why = devices.open("cuda")
  if not cuda then add("cuda", "absent", why, M.advice(why, nvcc ~= nil)) end
  local index = 0
  while cuda do
    local info = cuda:info()
    add(tostring(cuda), "ok", ("%s, %.1f of %.1f GiB free"):format(info.description, info.free_bytes / 2 ^ 30,
      info.total_bytes / 2 ^ 30))
    index = index + 1
    cuda = devices.open("cuda:" .. index)
  end
  local release = nvcc and first_line(("'%s' --version | grep -o 'release [0-9.]*'"):format(nvcc))
  add("nvcc", release and "ok" or "absent", release and ("%s, %s"):format(nvcc, release)
    or "only needed to build the CUDA backend")
  local cudnn = index > 0 and cudnn_version()
  if index > 0 then
    add("cuDNN", cudnn and "ok" or "absent", cudnn or "not found; our own kernels do without")
  end
end

return M
