-- Child processes: a spec of the command line is a spec of what a person types.
local M = {}

---One word of a shell's line.
function M.quote(word) return "'" .. word:gsub("'", "'\\''") .. "'" end

---A file's bytes, or nil.
function M.read(path)
  local file = io.open(path, "rb")
  if not file then return nil end
  local text = file:read("*a")
  file:close()
  return text
end

---Put bytes into a file.
function M.write(path, bytes)
  local file = assert(io.open(path, "wb"))
  file:write(bytes)
  file:close()
end

---Run a shell command.
---@param command string
---@param input string|nil  its standard input; default empty
---@return string output  both streams
---@return integer status  the exit status; 128 + n after signal n
function M.run(command, input)
  local path = os.tmpname()
  M.write(path, input or "")
  local pipe = assert(io.popen(("( %s ) <%s 2>&1; echo \"\n$?\""):format(command, path), "r"))
  local text = pipe:read("*a")
  pipe:close()
  os.remove(path)
  local output, status = text:match("^(.*)\n(%d+)\n$")
  return output, tonumber(status)
end

---A fresh folder, and a function that removes it.
function M.folder()
  local pipe = io.popen("mktemp -d")
  local path = pipe:read("*l")
  pipe:close()
  return path, function() os.execute("rm -rf " .. M.quote(path)) end
end

---Is there such a program?
function M.has(program) return (select(2, M.run("command -v " .. program))) == 0 end

---The source tree's root, absolute.
function M.root()
  local pipe = io.popen("pwd")
  local path = pipe:read("*l")
  pipe:close()
  return path
end

return M
