---The command line behind bin/quartermoon.

local M = {}

local USAGE = [==[
usage: quartermoon [options] [script.lua [arguments...]]

  quartermoon                      the prompt (help() says what it can do)
  quartermoon script.lua a b       run a script; its arguments are in `arg` and `...`
  quartermoon -                    run a script from the standard input
  quartermoon -e 'print(qm.VERSION)'
                                   run one line, with `qm` at hand; may be repeated
  quartermoon -i ...               then open the prompt
  quartermoon --device cuda ...    where new tensors go, as with QM_DEVICE
  quartermoon doctor               what this machine has, what it lacks and what to do
  quartermoon inspect PATH         what a model folder or file holds, and what is wrong with it
  quartermoon --version
  quartermoon --help

environment:
  QM_DEVICE      where new tensors go: cpu (default), reference, cuda, cuda:1
  QM_CPU_LEVEL   at most these instructions: base, v3 (AVX2), v4 (AVX-512)
  OMP_NUM_THREADS  threads of the CPU kernels
]==]

local here = debug.getinfo(1, "S").source:match("^@(.*/)") or "./"

---Turn an error into its message and the user's part of the traceback: without this file's frames,
---and without the library's own where the message already names the user's line.
local function explain(message)
  if type(message) ~= "string" then message = tostring(message) end
  local lines, in_library = { message }, message:sub(1, #here) ~= here
  for line in debug.traceback("", 2):gmatch("[^\n]+") do
    if line:find(here .. "cli.lua", 1, true) or line:find("'xpcall'", 1, true) then break end
    local is_inner = line:find(here, 1, true) or line:find("[C]: in function 'error'", 1, true)
    if in_library and lines[2] then in_library = is_inner end
    if not (in_library and is_inner) then lines[#lines + 1] = line end
  end
  return table.concat(lines, "\n")
end

local function report(message)
  io.stdout:flush()
  io.stderr:write("quartermoon: ", message, "\n")
  return 1
end

---Run a compiled chunk; 0 or, after a report, 1.
local function run(chunk, ...)
  local arguments, count = { ... }, select("#", ...)
  local ok, message = xpcall(function() return chunk(unpack(arguments, 1, count)) end, explain)
  if not ok then return report(message) end
  return 0
end

local function version()
  local qm = require("quartermoon")
  local abi = require("quartermoon.ffi").lib.qm_abi_version()
  print(("Quartermoon %s (ABI %d, %s)"):format(qm.VERSION, abi, jit.version))
  return 0
end

local function run_script(path, arguments, first)
  local script = { [0] = path }
  for i = first + 1, #arguments do script[i - first] = arguments[i] end
  for i = first - 1, 0, -1 do script[i - first] = arguments[i] end
  _G.arg = script
  local chunk, message = loadfile(path ~= "-" and path or nil)
  if not chunk then return report(message) end
  return run(chunk, unpack(script))
end

local function run_line(code)
  _G.qm = require("quartermoon")
  local chunk, message = loadstring(code, "=-e")
  if not chunk then return report(message) end
  return run(chunk)
end

---Read the options; a table of what to do, or nil and what is wrong.
local function parse(arguments)
  local wish = { lines = {} }
  local i = 1
  while arguments[i] do
    local word = arguments[i]
    if word == "-e" then
      i = i + 1
      if not arguments[i] then return nil, "-e needs a line of Lua" end
      wish.lines[#wish.lines + 1] = arguments[i]
    elseif word == "--device" then
      i = i + 1
      if not arguments[i] then return nil, "--device needs a device: cpu, reference, cuda, cuda:1" end
      wish.device = arguments[i]
    elseif word == "-i" then
      wish.interactive = true
    elseif word == "--help" or word == "-h" or word == "--version" or word == "-v" then
      wish.action = word:match("%-(%a)")
    elseif word:sub(1, 1) == "-" and word ~= "-" then
      return nil, "unknown option '" .. word .. "'"
    else
      wish.first = i
      break
    end
    i = i + 1
  end
  return wish
end

local function act(arguments)
  local wish, mistake = parse(arguments)
  if not wish then
    report(mistake)
    io.stderr:write(USAGE)
    return 2
  end
  if wish.action == "h" then
    io.write(USAGE)
    return 0
  elseif wish.action == "v" then
    return version()
  end
  if wish.device then
    local ok, reason = pcall(require("quartermoon").set_default_device, wish.device)
    if not ok then return report((reason:gsub("^.-qm%.set_default_device", "--device"))) end
  end
  for _, line in ipairs(wish.lines) do
    local status = run_line(line)
    if status ~= 0 then return status end
  end
  local status = 0
  if wish.first then
    local path = arguments[wish.first]
    if path == "doctor" then return require("quartermoon.doctor").main() end
    if path == "inspect" then
      return require("quartermoon.inspection").main({ unpack(arguments, wish.first + 1) })
    end
    status = run_script(path, arguments, wish.first)
  end
  if wish.interactive or not (wish.first or wish.lines[1]) then require("quartermoon.repl").run() end
  return status
end

---The whole program.
---@param arguments string[]  as Lua's `arg`
---@return integer status     for os.exit
function M.main(arguments)
  local ok, status = xpcall(act, explain, arguments)
  if not ok then return report(status) end
  io.stdout:flush()
  return status
end

return M
