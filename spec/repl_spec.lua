local process = require("spec.support.process")
local complete = require("quartermoon.complete").complete
local inspect = require("quartermoon.inspect").inspect
local manual = require("quartermoon.manual")
local repl = require("quartermoon.repl")
local qm = require("quartermoon")

local QUARTERMOON = process.quote(process.root() .. "/bin/quartermoon")

---What a session prints, its input coming from a pipe.
local function session(...)
  local output, status = process.run(QUARTERMOON, table.concat({ ... }, "\n") .. "\n")
  assert.equal(0, status)
  return output
end

describe("the prompt", function()
  it("shows what an expression gives, every value of it", function()
    assert.equal("3\n\"a\"\nnil\n", session("1 + 2, 'a', nil"))
  end)

  it("keeps globals, and the last value in _", function()
    assert.equal("42\n43\n", session("x = 40", "x + 2", "_ + 1"))
  end)

  it("reads on until a statement is complete", function()
    assert.equal("1\n2\n", session("for i = 1, 2 do", "print(i)", "end"))
    assert.equal("3\n", session("(1 +", "2)"))
  end)

  it("goes on after errors of every kind", function()
    local output = session("error('first')", "x = = 1", "qm.swiglu(1)", "error({})", "1 + 1")
    assert.truthy(output:find("prompt:1: first", 1, true))
    assert.truthy(output:find("unexpected symbol near '='", 1, true))
    assert.truthy(output:find("prompt:1: qm.swiglu: argument 'gate': expected a tensor, got number 1", 1, true))
    assert.truthy(output:find("2\n$"))
  end)

  it("says how long slow commands took", function()
    local line = "local now = require('quartermoon.clock').now; local t = now(); while now() - t < 0.6 do end"
    assert.truthy(session(line):find("%(0%.[67]%d s%)"))
  end)

  it("says that a local ends with its line", function()
    assert.truthy(session("local y = 1"):find("without `local` it stays", 1, true))
  end)

  it("prints the manual of a name, and a reason where there is none", function()
    assert.truthy(session("?swiglu"):find("SwiGLU: `silu(gate) * up`.", 1, true))
    assert.truthy(session("? qm.clock"):find("Wall-clock time", 1, true))
    assert.equal("nothing is called 'qm.nothing'\n", session("?qm.nothing"))
    assert.truthy(session("?"):find("an expression", 1, true))
  end)

  it("says so when the input ends inside a statement", function()
    assert.truthy(session("for i = 1, 2 do"):find("the input ended inside a statement", 1, true))
  end)

  it("edits, completes and survives Ctrl-C on a terminal", function()
    if not process.has("script") then return pending("no `script` to make a terminal with") end
    if not pcall(require, "readline") then return pending("no lua-readline") end
    local folder, remove = process.folder()
    -- Tab completes swigl; Ctrl-C stops an endless loop, then an unfinished line.
    local keys = ([[(sleep 1; printf 'type(qm.swigl\t)\n'; sleep 0.5
      printf 'while true do (function() end)() debug.traceback() end\n'; sleep 0.5; printf '\003'; sleep 0.5
      printf 'unfinished'; sleep 0.3; printf '\003'; sleep 0.3; printf '20 + 3\n'; sleep 0.5; printf '\004') ]])
    local output = process.run(("%s | HOME=%s TERM=xterm timeout 20 script -qec %s /dev/null"):format(
      keys, folder, process.quote(QUARTERMOON)))
    remove()
    if output:find("failed to create pseudo-terminal", 1, true) then return pending("no pseudo-terminals here") end
    assert(output:find("type(qm.swiglu", 1, true), output)
    assert.truthy(output:find("\"function\"", 1, true))
    assert(output:find("interrupted", 1, true), output)
    assert(output:find("23\r\n", 1, true), output)
  end)
end)

describe("repl.compile", function()
  it("tells unfinished from wrong", function()
    assert.is_function(repl.compile("1 + 1"))
    assert.same({ nil, nil, true }, { repl.compile("f(") })
    local chunk, message, unfinished = repl.compile("end")
    assert.is_nil(chunk)
    assert.is_string(message)
    assert.is_nil(unfinished)
  end)
end)

describe("completion", function()
  local globals = { qm = qm, x = qm.ones({ 2 }), text = "abc", print = print }

  it("completes globals and keywords, fields, methods and modules not loaded yet", function()
    assert.same({ "print" }, complete("prin", globals))
    assert.same({ "repeat", "return" }, complete("re", globals))
    assert.same({ "qm.swiglu" }, complete("qm.swigl", globals))
    assert.same({ "x:free" }, complete("x:fre", globals))
    assert.same({ "text:upper" }, complete("text:up", globals))
    assert.same({ "qm.safetensors" }, complete("qm.safet", globals))
  end)

  it("keeps what stands before the name", function()
    assert.same({ "f(1,qm.swiglu" }, complete("f(1,qm.swigl", globals))
    assert.same({ "{print" }, complete("{prin", globals))
  end)

  it("offers nothing where there is nothing", function()
    assert.same({}, complete("nosuch.fie", globals))
    assert.same({}, complete("print.x", globals))
    assert.same({}, complete("qm..", globals))
  end)
end)

describe("inspect", function()
  it("shows tables one level deep, in a fixed order", function()
    assert.equal("{ 1, \"a\", [2.5] = true, b = {...}, c = {} }", inspect({ 1, "a", b = { 1 }, c = {}, [2.5] = true }))
    assert.equal("{}", inspect({}))
  end)

  it("shortens what is long and escapes what does not print", function()
    local long = {}
    for i = 1, 100 do long[i] = i end
    assert.truthy(inspect(long):find("%.%.%. %(88 more%)"))
    assert.equal("\"a\\nb\\0\\27\"", inspect("a\nb\0\27"))
    assert.truthy(inspect(("x"):rep(5000)):find("(5000 bytes)", 1, true))
  end)

  it("lets objects speak for themselves", function()
    assert.equal(tostring(qm.ones({ 2 })), inspect(qm.ones({ 2 })))
    assert.equal("{ qm.Tensor f32 [2] }", inspect({ qm.ones({ 2 }) }))
  end)
end)

describe("the manual", function()
  it("knows functions, methods and modules, by long and short names", function()
    local page = assert(manual.of("qm.tensor", { qm = qm }))
    assert.truthy(page:find("A tensor from a number or nested tables", 1, true))
    assert.truthy(page:find("tensor.lua:%d+"))
    assert.truthy(assert(manual.of("x:free", { x = qm.ones({ 1 }) })):find("Freeing twice is harmless", 1, true))
    assert.truthy(assert(manual.of("qm.schedule", { qm = qm })))
  end)

  it("gives a reason where there is no page", function()
    assert.same({ nil, "qm.VERSION is a string" }, { manual.of("qm.VERSION", { qm = qm }) })
    assert.same({ nil, "print is a function written in C, or without a source file" },
      { manual.of("print", { print = print }) })
  end)
end)
