local qm = require("quartermoon")

local DECLARATION = {
  name = "scripts/x.lua",
  about = "Do a thing.",
  arguments = { { "text", nil, "the text to read" }, { "out", "out", "where to write" } },
  { "steps", 1500, "optimizer steps", min = 1 },
  { "lr", 3e-3, "peak learning rate", min = 0, max = 1 },
  { "clip-norm", 1, "largest gradient norm" },
  { "group-size", 64, "weights in a group", choices = { 32, 64, 128 } },
  { "dtype", "bf16", "type of the activations", choices = { "f32", "bf16" } },
  { "resume", false, "continue the run" },
  { "clip", true, "clip the gradient" },
  { "seed", nil, "where random numbers begin", type = "integer" },
}

local function read(...) return qm.options.read({ ... }, DECLARATION) end

describe("qm.options", function()
  it("gives the defaults", function()
    assert.same({ text = "a.txt", out = "out", steps = 1500, lr = 3e-3, group_size = 64, clip_norm = 1, dtype = "bf16",
      resume = false, clip = true }, read("a.txt"))
  end)

  it("takes --name value, --name=value and flags, in any order", function()
    local values = read("--steps", "10", "a.txt", "--lr=1e-4", "--resume", "--no-clip", "b", "--group-size", "32",
      "--seed", "-5", "--dtype=f32", "--clip-norm", "0.5")
    assert.same({ text = "a.txt", out = "b", steps = 10, lr = 1e-4, group_size = 32, clip_norm = 0.5, dtype = "f32",
      resume = true, clip = false, seed = -5 }, values)
    assert.equal(128, read("a", "--group_size=128").group_size)
    assert.equal(1000, read("a", "--steps=1e3").steps)
    assert.is_false(read("a", "--clip=false").clip)
    assert.equal("--odd", read("--", "--odd").text)
    assert.equal("-", read("-").text)
  end)

  local refusals = {
    { { "a", "--stpes", "3" }, "unknown option '--stpes', did you mean --steps?" },
    { { "a", "--no-clop" }, "unknown option '--no-clop', did you mean --no-clip?" },
    { { "a", "-x" }, "unknown option '-x'" },
    { { "a", "--no-steps" }, "unknown option '--no-steps', did you mean --steps?" },
    { { "a", "--no-clip=true" }, "--no-clip takes no value" },
    { { "a", "--steps" }, "--steps needs a value" },
    { { "a", "--steps", "--resume" }, "--steps needs a value" },
    { { "a", "--steps", "1.5" }, "--steps: expected a whole number of at least 1, got '1.5'" },
    { { "a", "--steps", "0" }, "--steps: expected a whole number of at least 1, got '0'" },
    { { "a", "--lr", "2" }, "--lr: expected a number from 0 to 1, got '2'" },
    { { "a", "--lr", "nan" }, "--lr: expected a number from 0 to 1, got 'nan'" },
    { { "a", "--seed", "inf" }, "--seed: expected a whole number, got 'inf'" },
    { { "a", "--group-size", "48" }, "--group-size: expected one of 32, 64, 128, got '48'" },
    { { "a", "--dtype", "f8" }, "--dtype: expected one of f32, bf16, got 'f8'" },
    { { "a", "--resume=yes" }, "--resume: expected true or false, got 'yes'" },
    { {}, "TEXT is needed" },
    { { "a", "b", "c" }, "one argument too many: 'c'" },
    { { "a", "--help" }, "help" },
  }
  for _, case in ipairs(refusals) do
    it("says \"" .. case[2] .. "\"", function()
      local values, reason = qm.options.read(case[1], DECLARATION)
      assert.is_nil(values)
      assert.equal(case[2], reason)
    end)
  end

  it("asks for what is required", function()
    local values, reason = qm.options.read({}, { { "model", nil, "which", required = true } })
    assert.is_nil(values)
    assert.equal("--model is needed", reason)
  end)

  it("shows all in aligned columns", function()
    assert.equal([[
usage: scripts/x.lua [options] TEXT [OUT]

Do a thing.

arguments:
  TEXT            the text to read
  OUT             where to write (default out)

options:
  --steps N       optimizer steps (default 1500)
  --lr X          peak learning rate (default 0.003)
  --clip-norm X   largest gradient norm (default 1)
  --group-size N  weights in a group: 32, 64, 128 (default 64)
  --dtype TEXT    type of the activations: f32, bf16 (default bf16)
  --resume        continue the run
  --no-clip       clip the gradient
  --seed N        where random numbers begin
  -h, --help      this page
]], qm.options.help(DECLARATION))
  end)

  it("wraps long help inside its column", function()
    for line in qm.options.help({ { "a", nil, ("word "):rep(60) } }):gmatch("[^\n]+") do
      assert.is_true(#line <= 100)
      if line:find("^ +word") then assert.equal(15, (line:find("word"))) end
    end
  end)

  it("ends a script with a message and status 2, or with the help and status 0", function()
    local script = os.tmpname()
    qm.files.write(script,
      "require('quartermoon').options.parse(arg, { name = 'x', { 'steps', 3, 'how many' } }) print('ran')")
    local function run(words)
      local pipe = io.popen("LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' luajit " .. script .. " " .. words
        .. " 2>&1; echo status $?")
      local text = pipe:read("*a")
      pipe:close()
      return text
    end
    assert.equal("ran\nstatus 0\n", run("--steps 4"))
    assert.truthy(run("--stesp 4"):find("^x: unknown option '%-%-stesp', did you mean %-%-steps%?\n.*status 2\n$"))
    assert.truthy(run("--help"):find("^usage: x %[options%]\n.*%-%-steps N.*status 0\n$"))
    os.remove(script)
  end)

  it("refuses declarations that make no sense", function()
    assert.error_matches(function() qm.options.read({}, { { "a", 3, "b", chioces = { 3 } } }) end,
      "did you mean 'choices'?", 1, true)
    assert.error_matches(function() qm.options.read({}, { { "a", 1, "b" }, { "a", 2, "c" } }) end,
      "different names", 1, true)
    assert.error_matches(function() qm.options.read({}, { { "a", 1 } }) end, "'help' is needed", 1, true)
  end)
end)
