---Wall-clock time with a fine grain, for rates and timings.

local lib = require("quartermoon.ffi").lib

local M = {}

---Seconds since some fixed moment; never jumps back.
---@return number
function M.now() return lib.qm_clock() end

return M
