-- The habits of this house, as far as a machine can see them.
local process = require("spec.support.process")

---Tracked files and new ones that git does not ignore; outside a checkout, all but what is built or run.
local LIST = "git ls-files --cached --others --exclude-standard 2>/dev/null || "
  .. "find . -type f -not -path './build/*' -not -path './runs/*' -not -path './data/*' | sed 's|^[.]/||'"
local files = {}
for path in process.run(LIST):gmatch("[^\n]+") do
  files[#files + 1] = path
end

local function matching(...)
  local found = {}
  for _, path in ipairs(files) do
    for _, pattern in ipairs({ ... }) do
      if path:find(pattern) then
        found[#found + 1] = path
        break
      end
    end
  end
  return found
end

local cache = {}
local function lines_of(path)
  if not cache[path] then
    local lines = {}
    for line in io.lines(path) do lines[#lines + 1] = line end
    cache[path] = lines
  end
  return cache[path]
end

---Call `judge(line, number, path)` on every line; its answers are the complaints.
local function complaints(paths, judge)
  local found = {}
  for _, path in ipairs(paths) do
    for number, line in ipairs(lines_of(path)) do
      local complaint = judge(line, number, path)
      if complaint then found[#found + 1] = ("%s:%d: %s"):format(path, number, complaint) end
    end
  end
  return found
end

local function assert_none(found)
  if #found > 0 then error(table.concat(found, "\n"), 2) end
end

local C = { "%.[ch]$", "%.cuh?$" }
local LUA = { "%.lua$", "^bin/quartermoon$" }
local SHELL = { "^scripts/[%w_-]+$", "^%.ci/run$", "^GNUmakefile$" }
local SOURCES = {}
for _, kind in ipairs({ C, LUA, SHELL }) do
  for _, pattern in ipairs(kind) do SOURCES[#SOURCES + 1] = pattern end
end

---Columns, not bytes.
local function width(line) return select(2, line:gsub("[^\128-\191]", "")) end

describe("every file", function()
  it("is listed", function() assert(#matching("%.c$") > 20 and #matching("%.lua$") > 20) end)

  it("has lines of at most 100 columns in C, 120 in Lua", function()
    assert_none(complaints(matching(unpack(C)), function(line)
      if width(line) > 100 then return width(line) .. " columns" end
    end))
    assert_none(complaints(matching(unpack(LUA)), function(line)
      if width(line) > 120 then return width(line) .. " columns" end
    end))
  end)

  it("has comments in C that are wrapped, not broken: no word alone within a paragraph", function()
    assert_none(complaints(matching(unpack(C)), function(line, number, path)
      local above, below = lines_of(path)[number - 1] or "", lines_of(path)[number + 1] or ""
      if line:find("^%s*%*%* %S+$") and below:find("^%s*%*%* %w") and above:find("^%s*[/*]%*+ %S") and
        width(above) > 60 then
        return "a word alone"
      end
    end))
  end)

  it("has no tabs and no space at the end of a line", function()
    local sources = matching("%.[ch]$", "%.cuh?$", "%.lua$", "^bin/", "^scripts/[%w_-]+$", "^%.ci/run$", "%.md$")
    assert_none(complaints(sources, function(line)
      if line:find("\t") then return "a tab" end
      if line:find("%s$") then return "space at the end" end
    end))
  end)

  it("has no leftovers", function()
    local words = { "TEMP" .. "ORARY", "TO" .. "DO", "FIX" .. "ME", "XX" .. "X", "HA" .. "CK" }
    assert_none(complaints(matching(unpack(SOURCES)), function(line)
      for _, word in ipairs(words) do
        if line:find("%f[%w]" .. word .. "%f[%W]") then return word end
      end
    end))
  end)

  it("opens with what it is for", function()
    local found = {}
    for _, path in ipairs(matching(unpack(C))) do
      if not lines_of(path)[1]:find("^/%* [%w_.]+ %- ") then found[#found + 1] = path .. ": no '/* name - purpose'" end
    end
    for _, path in ipairs(matching("^lua/.*%.lua$")) do
      if not lines_of(path)[1]:find("^%-%-%-?") then found[#found + 1] = path .. ": no comment above" end
    end
    for _, path in ipairs(matching("^scripts/[%w_-]+$", "^%.ci/run$")) do
      if not (lines_of(path)[2] or ""):find("^# ") then found[#found + 1] = path .. ": no usage above" end
    end
    assert_none(found)
  end)

  it("keeps to its size", function()
    local function longer_than(limit, ...)
      local found = {}
      for _, path in ipairs(matching(...)) do
        if #lines_of(path) > limit then found[#found + 1] = ("%s: %d lines, at most %d"):format(path, #lines_of(path),
          limit) end
      end
      return found
    end
    assert_none(longer_than(400, "^engine/.*%.c$", "^engine/[^q].*%.h$", "^lua/.*%.lua$", "^spec/.*%.lua$",
      "^scripts/"))
    assert_none(longer_than(600, "^engine/quartermoon%.h$")) -- the whole ABI is one text
    assert_none(longer_than(300, "^kernels/.*%.[ch]$", "^kernels/.*%.cuh?$"))
    assert_none(longer_than(120, "^premake5%.lua$"))
  end)
end)

describe("the kernels", function()
  local kernels = {}
  for name in table.concat(lines_of("engine/backend.h"), "\n"):match("#define QM_KERNEL_LIST%(X%)(.-)\n\n")
    :gmatch("X%(([%w_]+)%)") do
    kernels[#kernels + 1] = name
  end

  local function defined(pattern, name)
    for _, path in ipairs(matching(pattern)) do
      for _, line in ipairs(lines_of(path)) do
        if line:find(name, 1, true) == 1 then return path end
      end
    end
  end

  it("each have a reference twin", function()
    assert(#kernels > 30, "no list of kernels found")
    local missing = {}
    for _, name in ipairs(kernels) do
      if not defined("^kernels/reference/.*%.c$", "int32_t qm_reference_" .. name .. "(") then
        missing[#missing + 1] = "no kernels/reference/*.c defines qm_reference_" .. name
      end
    end
    assert_none(missing)
  end)

  it("each have a place in CUDA's table", function()
    local table_text, missing = table.concat(lines_of("kernels/cuda/backend.cu"), "\n"), {}
    for _, name in ipairs(kernels) do
      if not table_text:find(("kernels->%s = qm_cuda_%s;"):format(name, name), 1, true) then
        missing[#missing + 1] = "kernels/cuda/backend.cu does not name qm_cuda_" .. name
      end
    end
    assert_none(missing)
  end)

  it("each have a function of the ABI that checks for them", function()
    local missing = {}
    for _, name in ipairs(kernels) do
      if not defined("^engine/.*%.c$", "int32_t qm_" .. name .. "(") then
        missing[#missing + 1] = "no engine/*.c defines qm_" .. name
      end
    end
    assert_none(missing)
  end)

  it("never call the engine", function()
    assert_none(complaints(matching("^kernels/.*%.[ch]$", "^kernels/.*%.cuh?$"), function(line)
      if line:find('#include "internal.h"', 1, true) or line:find("qm__") then return "reaches into the engine" end
    end))
  end)
end)

describe("the Lua library", function()
  -- What init.lua makes public; the other modules are the library's own business.
  it("has a comment above every public function", function()
    local found = {}
    for _, path in ipairs(matching("^lua/.*%.lua$")) do
      local lines, in_family = lines_of(path), false
      for number, line in ipairs(lines) do
        if line:find("^function M[.:]") then
          -- One comment may stand above several one-line functions of a kind.
          local above = lines[number - 1] or ""
          local documented = above:find("^%s*%-%-%-") or in_family and above:find("^function M[.:].* end$")
          if not documented then found[#found + 1] = ("%s:%d: %s"):format(path, number, line) end
          in_family = documented
        end
      end
    end
    assert_none(found)
  end)

  it("declares C types only where it must", function()
    local allowed = { ["lua/quartermoon/ffi.lua"] = true, -- the engine
      ["lua/quartermoon/terminal.lua"] = true, ["lua/quartermoon/doctor.lua"] = true,
      ["lua/quartermoon/doctor_cuda.lua"] = true, -- the system's own
      ["lua/quartermoon/tokenizer/pcre2.lua"] = true, ["lua/quartermoon/tokenizer/unicode.lua"] = true }
    assert_none(complaints(matching("^lua/.*%.lua$"), function(line, _, path)
      if line:find("ffi.cdef", 1, true) and not allowed[path] then return "ffi.cdef belongs in ffi.lua" end
    end))
  end)
end)

describe("the tools", function()
  it("find nothing wrong: luacheck", function()
    if not process.has("luacheck") then return pending("no luacheck") end
    local output, status = process.run("luacheck . -q --no-color")
    assert(status == 0, output)
  end)

  it("find nothing wrong: clang-format", function()
    if not process.has("clang-format") then return pending("no clang-format") end
    local output, status = process.run("scripts/format --check")
    assert(status == 0, output:match("^[^\n]*\n") or output)
  end)
end)
