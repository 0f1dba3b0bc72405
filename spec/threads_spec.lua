-- Results do not depend on how many threads compute them: the same script under several counts.

---What a child process with `threads` threads prints.
local function run(threads, script)
  local path = os.tmpname()
  local file = assert(io.open(path, "w"))
  file:write("package.path = './lua/?.lua;./lua/?/init.lua;' .. package.path\n", script)
  file:close()
  local pipe = assert(io.popen(("OMP_NUM_THREADS=%d luajit %s 2>&1"):format(threads, path), "r"))
  local text = pipe:read("*a")
  pipe:close()
  os.remove(path)
  return text
end

-- Sizes above the kernels' thresholds for using threads at all.
local SCRIPTS = {
  ["rms_norm"] = [[
    local qm = require("quartermoon")
    local x, weight = qm.randn({ 517, 130 }):requires_gradient(), qm.randn({ 130 }):requires_gradient()
    local out = qm.rms_norm(x, weight):keep()
    out:backward(qm.randn({ 517, 130 }))
    io.write(out:bytes(), x.grad:bytes(), weight.grad:bytes())
  ]],
  ["attention"] = [[
    local qm = require("quartermoon")
    local q = qm.randn({ 500, 4, 32 }):requires_gradient()
    local k, v = qm.randn({ 500, 2, 32 }):requires_gradient(), qm.randn({ 500, 2, 32 }):requires_gradient()
    local cu = qm.tensor({ 0, 10, 320, 500 }, { dtype = "i32" })
    local out = qm.attention(q, k, v, cu, cu):keep()
    out:backward(qm.randn({ 500, 4, 32 }))
    io.write(out:bytes(), q.grad:bytes(), k.grad:bytes(), v.grad:bytes())
  ]],
}
local BYTES = { rms_norm = 4 * 130 * (517 + 517 + 1), attention = 4 * 500 * 32 * (4 + 4 + 2 + 2) }

describe("the number of threads", function()
  for name, script in pairs(SCRIPTS) do
    it("does not change a bit of " .. name .. " and its gradient", function()
      local one = run(1, script)
      assert(#one == BYTES[name], one:sub(1, 500))
      for _, threads in ipairs({ 2, 5 }) do
        assert(run(threads, script) == one, threads .. " threads give other bits than one")
      end
    end)
  end
end)
