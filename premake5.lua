-- premake5.lua - every build product, one place.
--
--   premake5 gmake                        (or Debian's: premake4 --file=premake5.lua gmake)
--   make -C build/make config=release     (or debug, asan, fuzz; CC=clang works too, fuzz needs it)
--
-- build/<config>/libquartermoon.so is the engine with the reference and the CPU kernels, which are
-- compiled once per instruction-set level and chosen at run time. Neither premake knows nvcc, so for
-- build/<config>/libquartermoon_cuda.so a makefile is written here: make -f build/make/cuda.make

-- Premake 5 says workspace and filter, 4.3 says solution and configuration.
local is_premake5 = filter ~= nil
workspace = workspace or solution
local function when(config)
  if is_premake5 then filter("configurations:" .. config) else configuration(config) end
end

-- What clang alone needs: a shared library leaves the sanitizers' runtime to the program.
local is_clang = (os.getenv("CC") or ""):find("clang") ~= nil

local function machine()
  local pipe = io.popen("uname -m")
  local name = pipe:read("*l")
  pipe:close()
  return name
end

local function abi_version()
  local header = io.open("engine/quartermoon.h")
  local version = header:read("*a"):match("QM_ABI_VERSION = (%d+)")
  header:close()
  return version
end

-- Instruction-set levels of the CPU kernels: name, compiler options.
local levels = { { "base", {} } }
if machine() == "x86_64" then
  levels[2] = { "v3", { "-march=x86-64-v3" } }
  levels[3] = { "v4", { "-march=x86-64-v4", "-mprefer-vector-width=512" } }
end

workspace "quartermoon"
  configurations { "release", "debug", "asan", "fuzz" }
  location "build/make"
  language "C"
  includedirs { "engine", "kernels" }
  -- -ffp-contract=off: every backend must round alike; kernels that gain from fma say fma.
  buildoptions {
    "-std=c11", "-D_GNU_SOURCE", "-fPIC", "-fvisibility=hidden", "-fopenmp",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Wstrict-prototypes",
    "-Wmissing-prototypes", "-Wdouble-promotion", "-Werror",
  }
  linkoptions { "-fopenmp" }
  -- Keep the symbols: both premakes strip what is not said to have them.
  if is_premake5 then symbols "On" else flags { "Symbols" } end
  when "release"
    buildoptions { "-O3", "-g1" }
    targetdir "build/release"
  when "debug"
    buildoptions { "-O0", "-g", "-DQM_DEBUG" }
    targetdir "build/debug"
  when "asan"
    buildoptions { "-O1", "-g1", "-DQM_DEBUG", "-fsanitize=address,undefined", "-fno-omit-frame-pointer",
      "-fno-sanitize-recover=undefined" }
    linkoptions { "-fsanitize=address,undefined" }
    if is_clang then -- whose sanitized loops are not vectorized, and need not be
      buildoptions { "-Wno-pass-failed" }
      linkoptions { "-shared-libsan" }
    end
    targetdir "build/asan"
  when "fuzz" -- for the program of scripts/fuzz, which brings the runtimes
    buildoptions { "-O1", "-g1", "-fno-omit-frame-pointer" }
    linkoptions { "-fsanitize=address,undefined" }
    targetdir "build/fuzz"

-- Premake 4.3 names objects after their source alone, so each folder is a library of its own.
local parts = {}
local function part(name, sources, fuzz_options)
  parts[#parts + 1] = name
  project(name)
    kind "StaticLib"
    files { sources }
    when "fuzz"
      buildoptions(fuzz_options)
    when "*"
end

-- The fuzzer runs at the base level: sanitized vector code takes clang many minutes.
local watched, unwatched = { "-fsanitize=address" }, {}
part("cpu", "kernels/cpu/*.c", watched) -- calls the levels, which call the reference
for _, level in ipairs(levels) do
  part("cpu_" .. level[1], "kernels/cpu/level/*.c", level[1] == "base" and watched or unwatched)
  buildoptions(level[2])
  defines { "QM_CPU_LEVEL=" .. level[1] }
end
part("reference", "kernels/reference/*.c", watched)

project "quartermoon"
  kind "SharedLib"
  files { "engine/*.c" }
  links(parts)
  links { "dnnl", "lapacke", "jansson", "dl", "m" }
  -- nodelete: Lua may drop the library before the last finalizer that calls it has run.
  linkoptions { "-Wl,-z,nodelete", "-Wl,-soname,libquartermoon.so." .. abi_version() }
  when "not fuzz"
    linkoptions { "-Wl,--no-undefined" }
  when "fuzz" -- coverage of the readers guides the fuzzer, that of kernels would not
    buildoptions { "-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=undefined" }

assert(loadfile("kernels/cuda/premake.lua"))()
