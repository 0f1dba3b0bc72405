---The prompt: reads Lua, runs it, shows what it gives. With lua-readline on a terminal it edits
---lines, remembers them and completes names; without, it reads plain lines.

local terminal = require("quartermoon.terminal")
local inspect = require("quartermoon.inspect").inspect

local M = {}

---Commands that take longer than this many seconds say how long they took.
M.slow_s = 0.5
---Where the lines of earlier sessions are kept.
M.history_path = (os.getenv("HOME") or "/tmp") .. "/.quartermoon_history"

local HELP = [[
  an expression    shows its value (kept in _)        ?name        what the manual says of it
  statements       run; lines go on until complete    ?            this page
  <Tab>            completes names                    Ctrl-C       back to the prompt
  Ctrl-D           leaves                             help()       this page

  x = qm.randn({ 2, 3 });  x:sum();  qm.device():memory();  ?swiglu]]

---------------------------------------------------------------------------------------------------
-- Reading lines
---------------------------------------------------------------------------------------------------

---A reader over io.read, with prompts only where somebody sees them.
local function plain_reader(interactive)
  return {
    read = function(prompt)
      if interactive then
        io.write(prompt)
        io.flush()
      end
      return io.read("*l")
    end,
    close = function() end,
  }
end

---A reader over GNU readline. It waits for keys in Lua, so that Ctrl-C reaches us at the prompt.
local function line_editor(readline)
  readline.set_readline_name("quartermoon")
  readline.set_options({ histfile = M.history_path, auto_add = false, keeplines = 2000 })
  readline.set_complete_function(function(text, first, last)
    readline.set_completion_append_character("")
    return require("quartermoon.complete").complete(text:sub(first, last))
  end)
  local done, line, previous
  local function on_line(text)
    done, line = true, text
    readline.handler_remove()
  end
  local function read(prompt)
    done = false
    readline.handler_install(prompt, on_line)
    local ok, message = pcall(function()
      while not done do
        terminal.wait_for_key()
        readline.read_char()
      end
    end)
    if not ok then
      -- Not handler_remove(): outside of on_line the module writes to a stream it has closed. The
      -- next handler_install begins a fresh line all the same.
      io.write("\n")
      error(message, 0)
    end
    if not line then
      io.write("\n")
    elseif line:find("%S") and line ~= previous then
      previous = line
      readline.add_history(line)
    end
    return line
  end
  return { read = read, close = function() pcall(readline.save_history) end }
end

local function new_reader()
  if not terminal.interactive() then return plain_reader(false) end
  local ok, readline = pcall(require, "readline")
  return ok and line_editor(readline) or plain_reader(true)
end

---------------------------------------------------------------------------------------------------
-- Running them
---------------------------------------------------------------------------------------------------

local function values(...) return ... end

---Compile an expression or a statement. When the text merely ends too early: nil, nil, true.
---@param text string
---@return function|nil chunk, string|nil message, boolean|nil unfinished
function M.compile(text)
  local chunk, message
  if loadstring("return " .. text, "=prompt") then
    -- Not a tail call, which would leave no frame that an error could name.
    chunk = loadstring("local values = ... return values(" .. text .. "\n)", "=prompt")
    return function() return chunk(values) end
  end
  chunk, message = loadstring(text, "=prompt")
  if chunk then return chunk end
  if message:find("near '<eof>'$") then return nil, nil, true end
  return nil, message
end

---Read lines until they compile or are wrong; nil at the end of the input.
local function read_chunk(reader)
  local text = reader.read("qm> ")
  if not text then return nil end
  if text:find("^%s*%?") or not text:find("%S") then return text end
  while true do
    local chunk, message, unfinished = M.compile(text)
    if not unfinished then return text, chunk, message end
    local more = reader.read("  > ")
    if not more then return text, nil, "prompt: the input ended inside a statement" end
    text = text .. "\n" .. more
  end
end

local function show(count, ...)
  for i = 1, count do print(inspect((select(i, ...)))) end
  if count > 0 then _G._ = ... end
end

local function finish(started, clock, ok, ...)
  if not ok then
    local message = ...
    io.stdout:flush()
    io.stderr:write(terminal.is_interrupt(message) and "interrupted" or tostring(message), "\n")
    return
  end
  local elapsed_s = clock() - started
  local shown, message = pcall(show, select("#", ...), ...)
  if not shown then io.stderr:write(tostring(message), "\n") end
  if elapsed_s > M.slow_s then print(("(%.2f s)"):format(elapsed_s)) end
end

local function run_chunk(text, chunk, message)
  local name = text:match("^%s*%?%s*(%S*)")
  if name then
    local page, reason = HELP, nil
    if name ~= "" then page, reason = require("quartermoon.manual").of(name) end
    print(page or reason)
  elseif chunk then
    local clock = require("quartermoon.clock").now
    finish(clock(), clock, pcall(chunk))
    local lost = text:match("^%s*local%s+([%a_][%w_]*)[^\n]*$")
    if lost then print(("(`local %s` ends with its line; without `local` it stays)"):format(lost)) end
  elseif message then
    io.stderr:write(message, "\n")
  end
end

---Read, run and show until the input ends. `qm` is a global here.
function M.run()
  local qm = require("quartermoon")
  _G.qm, _G.help = qm, function() print(HELP) end
  local reader = new_reader()
  if terminal.interactive() then
    print(("Quartermoon %s on %s. ? for help."):format(qm.VERSION, tostring(qm.default_device())))
  end
  local going = true
  while going do
    local ok, reason = pcall(function()
      terminal.catch_interrupt()
      local text, chunk, message = read_chunk(reader)
      if not text then
        going = false
      else
        run_chunk(text, chunk, message)
      end
    end)
    if not ok and not terminal.is_interrupt(reason) then io.stderr:write(tostring(reason), "\n") end
    io.stdout:flush()
  end
  reader.close()
end

return M
