-- premake.lua - the CUDA backend's part of premake5.lua: writes build/make/cuda.make.
-- Code for sm_80 and sm_90a; other GPUs compile the PTX, which costs no pass of its own since it is sm_80's.
-- $QM_CUDA_ARCHS narrows what is compiled for ("90a" halves the time). Beside each object lies a .log of
-- what the compiler said, with registers and spills where $QM_CUDA_REPORT is 1: scripts/spills reads it.
local nvcc_options = {
  "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Werror=all-warnings",
  "-O1", -- the host's part, which launches; the device's is -O3 always
  "-fmad=false", -- as -ffp-contract=off elsewhere
  "-Iengine", "-Ikernels", "-cudart=static",
}
for arch in (os.getenv("QM_CUDA_ARCHS") or "80 90a ptx80"):gmatch("%S+") do
  local ptx = arch:match("^ptx(.*)")
  nvcc_options[#nvcc_options + 1] = ("-gencode=arch=compute_%s,code=%s_%s"):format(ptx or arch,
    ptx and "compute" or "sm", ptx or arch)
end
if os.getenv("QM_CUDA_REPORT") == "1" then nvcc_options[#nvcc_options + 1] = "-Xptxas=-v" end
local makefile = [[
config ?= release
NVCC ?= nvcc
out := build/$(config)
objects := $(patsubst kernels/cuda/%.cu,$(out)/cuda/%.o,$(wildcard kernels/cuda/*.cu))
$(out)/libquartermoon_cuda.so: $(objects)
> @echo Linking quartermoon_cuda
> @$(NVCC) -shared OPTIONS -o $@ $^ -lcublasLt -lcublas -lcusolver -Xlinker=-z,nodelete
$(out)/cuda/%.o: kernels/cuda/%.cu build/make/cuda.make
> @mkdir -p $(@D)
> @echo $(notdir $<)
> @$(NVCC) OPTIONS -MMD -MP -c -o $@ $< >$(@:.o=.log) 2>&1 || { cat $(@:.o=.log); rm -f $@; exit 1; }
-include $(objects:.o=.d)
]]
os.execute("mkdir -p build/make")
local file = io.open("build/make/cuda.make", "r")
local before = file and file:read("*a")
if file then file:close() end
makefile = makefile:gsub("\n> ", "\n\t"):gsub("OPTIONS", table.concat(nvcc_options, " "))
if makefile ~= before then -- a new date would compile everything again
  file = io.open("build/make/cuda.make", "w")
  file:write(makefile)
  file:close()
end
