-- The ABI's declarations against a snapshot, so that no change goes unnoticed; C's idea of the structs
-- against LuaJIT's. QM_ABI_WRITE=1 busted spec/abi_spec.lua writes the snapshot of the header's version.
local ffi = require("ffi")
local process = require("spec.support.process")
require("quartermoon")

local read = process.read

---The cdef section without comments, one declaration a line.
local function declarations()
  local text = assert(read("engine/quartermoon.h"):match("/%* cdef: begin %*/(.-)/%* cdef: end %*/"))
  text = text:gsub("/%*.-%*/", " "):gsub("%s+", " ")
  local lines, depth, line = {}, 0, ""
  for piece, stop in text:gmatch("([^{};]*)([{};])") do
    if stop == "{" then depth = depth + 1 elseif stop == "}" then depth = depth - 1 end
    line = line .. piece .. stop
    if stop == ";" and depth == 0 then
      lines[#lines + 1] = line:gsub("^%s+", ""):gsub("%s+$", "")
      line = ""
    end
  end
  return table.concat(lines, "\n") .. "\n"
end

---Every struct of the section: name -> field names.
local function structs()
  local found = {}
  for name, body in declarations():gmatch("typedef struct ([%w_]+) (%b{})") do
    local fields = {}
    for declaration in body:sub(2, -2):gmatch("[^;]+") do
      for declarator in declaration:gmatch("[^,]+") do
        fields[#fields + 1] = declarator:gsub("%b[]", ""):match("([%w_]+)%s*$")
      end
    end
    found[#found + 1] = { name = name, fields = fields }
  end
  return found
end

describe("the C ABI", function()
  it("is the one of its snapshot, or bears another version", function()
    local version = tonumber(ffi.C.QM_ABI_VERSION)
    local path, now = ("spec/abi/v%d.txt"):format(version), declarations()
    if os.getenv("QM_ABI_WRITE") == "1" then
      local file = assert(io.open(path, "wb"))
      file:write(now)
      file:close()
    end
    local snapshot = read(path)
    if not snapshot then error(("no %s yet: QM_ABI_WRITE=1 busted spec/abi_spec.lua writes it"):format(path), 0) end
    if snapshot ~= now then
      local difference = process.run("diff -U0 " .. path .. " -", now)
      error(("the declarations are no longer those of %s. Bump QM_ABI_VERSION and write a snapshot with "
        .. "QM_ABI_WRITE=1 (a version never released may be overwritten):\n%s"):format(path, difference), 0)
    end
  end)

  it("has structs that C lays out as LuaJIT does", function()
    if not process.has("cc") then return pending("no C compiler") end
    local folder, remove = process.folder()
    local lines, expected = {}, {}
    for _, struct in ipairs(structs()) do
      lines[#lines + 1] = ('printf("%s %%zu\\n", sizeof(%s));'):format(struct.name, struct.name)
      expected[#expected + 1] = ("%s %d"):format(struct.name, ffi.sizeof(struct.name))
      for _, field in ipairs(struct.fields) do
        lines[#lines + 1] = ('printf("%s.%s %%zu\\n", offsetof(%s, %s));'):format(struct.name, field, struct.name,
          field)
        expected[#expected + 1] = ("%s.%s %d"):format(struct.name, field, ffi.offsetof(struct.name, field))
      end
    end
    assert(#expected > 20, "hardly any structs found")
    local file = assert(io.open(folder .. "/layout.c", "w"))
    file:write('#include "quartermoon.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n',
      table.concat(lines, "\n"), "\nreturn 0; }\n")
    file:close()
    local output, status = process.run(("cc -std=c11 -Iengine %s/layout.c -o %s/layout && %s/layout"):format(folder,
      folder, folder))
    remove()
    assert.equal(0, status, output)
    assert.equal(table.concat(expected, "\n") .. "\n", output)
  end)

  it("declares only what the library has", function()
    local lib = require("quartermoon.ffi").lib
    local count = 0
    for name in declarations():gmatch("([%w_]+)%([^)]*%);") do
      assert(pcall(function() return lib[name] end), name .. " is declared, but the library lacks it")
      count = count + 1
    end
    assert(count > 40)
  end)

  it("exports nothing that the header does not declare", function()
    if not process.has("nm") then return pending("no nm") end
    local declared = {}
    for name in declarations():gmatch("([%w_]+)%(") do declared[name] = true end
    local symbols = process.run("nm -D --defined-only " .. require("quartermoon.ffi").library_path)
    for name in symbols:gmatch(" [TDB] ([%w_]+)") do
      assert(declared[name] or name:find("^__") or name:find("^_") , name .. " is exported, but not declared")
    end
  end)

  it("can be read by a C++ compiler", function()
    if not process.has("c++") then return pending("no C++ compiler") end
    local output, status = process.run("c++ -fsyntax-only -Wall -Iengine -xc++ -", '#include "quartermoon.h"\n')
    assert.equal(0, status, output)
  end)
end)
