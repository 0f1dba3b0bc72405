local process = require("spec.support.process")
local run, quote = process.run, process.quote

local QUARTERMOON = quote(process.root() .. "/bin/quartermoon")

describe("bin/quartermoon", function()
  local folder, remove = process.folder()
  teardown(remove)

  local function write(name, text)
    local file = assert(io.open(folder .. "/" .. name, "wb"))
    file:write(text)
    file:close()
    return quote(folder .. "/" .. name)
  end

  it("evaluates a line with qm at hand", function()
    assert.equal("4\n", (run(QUARTERMOON .. " -e 'print(qm.ones({ 4 }):count())'")))
  end)

  it("evaluates several lines in one state", function()
    assert.equal("7\n", (run(QUARTERMOON .. " -e 'x = 3' -e 'print(x + 4)'")))
  end)

  it("runs a script from any folder, with its arguments in arg and ...", function()
    local script = write("script.lua", [[
      local qm = require("quartermoon")
      print(qm.VERSION ~= nil, #arg, arg[1], select(2, ...), arg[0]:match("[^/]*$"))]])
    assert.equal("true\t2\ta b\t-e\tscript.lua\n", (run("cd / && " .. QUARTERMOON .. " " .. script .. " 'a b' -e")))
  end)

  it("runs a script from the standard input", function()
    assert.equal("5\n", (run(QUARTERMOON .. " -", "print(2 + 3)")))
  end)

  it("works through a link", function()
    run(("ln -s %s %s"):format(QUARTERMOON, quote(folder .. "/link")))
    assert.equal("1\n", (run("cd / && " .. quote(folder .. "/link") .. " -e 'print(1)'")))
  end)

  it("names the user's line in an error, and fails", function()
    local script = write("wrong.lua", "local qm = require('quartermoon')\n\nlocal y = qm.swiglu(1, 2)\nreturn y")
    local output, status = run(QUARTERMOON .. " " .. script)
    assert.truthy(output:find("wrong.lua:3: qm.swiglu: argument 'gate': expected a tensor, got number 1", 1, true))
    assert.falsy(output:find("check.lua", 1, true)) -- the library's own frames help nobody here
    assert.equal(1, status)
  end)

  it("reports what it cannot compile or open", function()
    local output, status = run(QUARTERMOON .. " -e 'x = = 1'")
    assert.truthy(output:find("-e:1:", 1, true))
    assert.equal(1, status)
    output, status = run(QUARTERMOON .. " /no/such/file.lua")
    assert.truthy(output:find("/no/such/file.lua", 1, true))
    assert.equal(1, status)
  end)

  it("passes a script's own exit status on", function()
    assert.equal(7, (select(2, run(QUARTERMOON .. " -e 'os.exit(7)'"))))
  end)

  it("sends new tensors to the device that --device names", function()
    local output = run(QUARTERMOON .. " --device reference -e 'print(qm.ones({ 2 }).device)'")
    assert.equal("reference\n", output)
    local reason, status = run(QUARTERMOON .. " --device abacus -e 'print(1)'")
    assert.equal(1, status)
    assert.truthy(reason:find("no backend 'abacus'", 1, true), reason)
    assert.equal(2, (select(2, run(QUARTERMOON .. " --device"))))
  end)

  it("refuses options it does not know, and shows the usage", function()
    local output, status = run(QUARTERMOON .. " --verbose")
    assert.truthy(output:find("unknown option '--verbose'", 1, true))
    assert.truthy(output:find("usage:", 1, true))
    assert.equal(2, status)
  end)

  it("tells its version and its usage", function()
    assert.truthy((run(QUARTERMOON .. " --version")):find("^Quartermoon %d+%.%d+%.%d+ %(ABI %d+, LuaJIT"))
    assert.truthy((run(QUARTERMOON .. " --help")):find("usage: quartermoon", 1, true))
  end)

  it("has a first tensor on the screen in well under a second", function()
    local clock = require("quartermoon.clock").now
    local best_s, runs = math.huge, {}
    for i = 1, 5 do
      local started = clock()
      run(QUARTERMOON .. " -e 'print(qm.randn({ 2, 3 }))'")
      runs[i] = clock() - started
      best_s = math.min(best_s, runs[i])
    end
    io.stderr:write(("first tensor after %.0f ms (best of 5, shell included)\n"):format(best_s * 1000))
    -- The aim is 60 ms; a loaded machine or a sanitized build gets more, and a GPU's driver takes its second.
    assert(best_s < ((os.getenv("QM_DEVICE") or "cpu") == "cpu" and 0.5 or 3), ("%.3f s"):format(best_s))
  end)

  describe("doctor", function()
    it("says what is there and succeeds where the engine works", function()
      local output, status = run(QUARTERMOON .. " doctor")
      assert.equal(0, status)
      for _, name in ipairs({ "LuaJIT", "engine", "cpu", "bf16", "oneDNN", "cuda", "cjson", "readline", "gnuplot" }) do
        assert(output:find("\n%l+ +" .. name) or output:find("^%l+ +" .. name), "nothing about " .. name)
      end
    end)

    it("says what to do about a GPU that does not open", function()
      local advice = require("quartermoon.doctor_cuda").advice
      local absent = "no backend 'cuda': /a/libquartermoon_cuda.so: cannot open shared object file"
      assert.matches("install the CUDA toolkit", advice(absent, false))
      assert.matches("nvcc is here: scripts/build", advice(absent, true))
      assert.matches("LD_LIBRARY_PATH", advice("no backend 'cuda': libcublasLt.so.13: cannot open shared", true))
      assert.matches("install NVIDIA's driver", advice("cuda: no NVIDIA driver is installed", true))
      assert.matches("newer NVIDIA driver", advice("cuda: the NVIDIA driver is too old: it serves CUDA 12.2", true))
      assert.matches("CUDA_VISIBLE_DEVICES", advice("cuda: the driver shows no GPU", false))
      assert.matches("Ampere", advice("cuda: Tesla T4 has compute capability 7.5, at least 8.0 is needed", true))
    end)

    it("says what to do where the engine is not built, and fails", function()
      local output, status = run("QM_CONFIG=nowhere QUARTERMOON_LIB=/no/such.so " .. QUARTERMOON .. " doctor")
      assert.truthy(output:find("missing +engine"))
      assert.truthy(output:find("scripts/build", 1, true))
      assert.equal(1, status)
    end)
  end)
end)
