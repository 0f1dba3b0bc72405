local process = require("spec.support.process")
local run, quote = process.run, process.quote

describe("make install", function()
  local config = os.getenv("QM_CONFIG") or "release"
  local folder, remove = process.folder()
  local prefix = folder .. "/prefix"
  teardown(remove)

  it("puts everything below the prefix", function()
    local output, status = run(("scripts/install install '' %s %s"):format(quote(prefix), config))
    assert.equal(0, status, output)
    for _, path in ipairs({ "lib/libquartermoon.so", "include/quartermoon.h", "bin/quartermoon",
      "share/lua/5.1/quartermoon/init.lua", "lib/pkgconfig/quartermoon.pc" }) do
      assert(io.open(prefix .. "/" .. path), path .. " is not there"):close()
    end
  end)

  it("gives a program that runs without the source tree", function()
    local output = run(("cd / && env -u LUA_PATH -u QM_CONFIG -u QUARTERMOON_LIB %s/bin/quartermoon -e %s"):format(
      quote(prefix), quote("print(require('quartermoon.ffi').library_path) print(qm.ones({ 3 }):count())")))
    assert.equal(prefix .. "/bin/../share/lua/5.1/quartermoon/../../../../lib/libquartermoon.so\n3\n", output)
  end)

  it("gives a library that C programs find through pkg-config", function()
    if config == "asan" then return pending("a plain program cannot load the sanitized library") end
    if not process.has("cc") or not process.has("pkg-config") then return pending("no cc or no pkg-config") end
    local file = assert(io.open(folder .. "/main.c", "w"))
    file:write([[
      #include <quartermoon.h>
      #include <stdio.h>
      int main(void) {
        qm_device *device;
        if (qm_device_open("cpu", 0, &device) != QM_OK) return 1;
        printf("%d %s\n", qm_abi_version() == QM_ABI_VERSION, qm_dtype_name(QM_BF16));
        qm_device_release(device);
        return 0;
      }]])
    file:close()
    local output, status = run(("cd %s && export PKG_CONFIG_PATH=%s/lib/pkgconfig && "
      .. "cc main.c -o main $(pkg-config --cflags --libs quartermoon) && LD_LIBRARY_PATH=%s/lib ./main"):format(
      quote(folder), quote(prefix), quote(prefix)))
    assert.equal("1 bf16\n", output)
    assert.equal(0, status)
  end)

  it("honours DESTDIR, and uninstalls", function()
    run(("scripts/install install %s /usr %s"):format(quote(folder .. "/stage"), config))
    local text = assert(io.open(folder .. "/stage/usr/lib/pkgconfig/quartermoon.pc")):read("*a")
    assert.truthy(text:find("prefix=/usr\n", 1, true))
    run(("scripts/install uninstall %s /usr"):format(quote(folder .. "/stage")))
    assert.equal("", (run("find " .. quote(folder .. "/stage") .. " -type f")))
  end)
end)
