---The terminal: is there one, and what Ctrl-C does.

local ffi = require("ffi")

local M = {}

if not pcall(ffi.typeof, "struct qm_pollfd") then
  ffi.cdef([[
  int isatty(int file);
  void *signal(int number, void *handler);
  struct qm_pollfd { int file; short events, revents; };
  int poll(struct qm_pollfd *files, unsigned long count, int timeout_ms);
  ]])
end

---Is file 1 (standard output) or 2 (standard error) a terminal?
function M.is_terminal(number) return ffi.C.isatty(number) == 1 end

local SIGINT, POLLIN = 2, 1

---Do both the standard input and the standard output belong to a person?
function M.interactive() return ffi.C.isatty(0) == 1 and ffi.C.isatty(1) == 1 end

-- While a script runs, luajit's own handler turns Ctrl-C into the error "interrupted!" and then
-- steps aside, so that a second one ends the program. We keep that handler to set it again.
local handler

---Let the next Ctrl-C be an error in whatever runs then.
function M.catch_interrupt()
  handler = handler or ffi.C.signal(SIGINT, nil)
  if handler ~= nil then ffi.C.signal(SIGINT, handler) end
end

---Did this error come from Ctrl-C?
function M.is_interrupt(message) return type(message) == "string" and message:find("interrupted!$") ~= nil end

local waiting = ffi.new("struct qm_pollfd[1]", { { 0, POLLIN, 0 } })

---Wait for a key; Ctrl-C raises here, for this loop stays out of compiled code.
function M.wait_for_key()
  repeat
    waiting[0].revents = 0
    local count = ffi.C.poll(waiting, 1, 1000)
  until count > 0
end
jit.off(M.wait_for_key)

return M
