---Regular expressions with Unicode classes through PCRE2 (libpcre2-8), as tokenizer files use them.

local ffi = require("ffi")

if not pcall(ffi.typeof, "qm_pcre2_code") then
  ffi.cdef([[
  typedef struct pcre2_real_code_8 qm_pcre2_code;
  typedef struct pcre2_real_match_data_8 qm_pcre2_match;
  qm_pcre2_code *pcre2_compile_8(const char *pattern, size_t length, uint32_t options, int *error,
                                 size_t *offset, void *context);
  void pcre2_code_free_8(qm_pcre2_code *code);
  int pcre2_jit_compile_8(qm_pcre2_code *code, uint32_t options);
  int pcre2_get_error_message_8(int error, char *text, size_t size);
  qm_pcre2_match *pcre2_match_data_create_8(uint32_t pairs, void *context);
  void pcre2_match_data_free_8(qm_pcre2_match *match);
  size_t *pcre2_get_ovector_pointer_8(qm_pcre2_match *match);
  int pcre2_match_8(const qm_pcre2_code *code, const char *subject, size_t length, size_t start,
                    uint32_t options, qm_pcre2_match *match, void *context);
  ]])
end

local UTF, UCP, MATCH_INVALID_UTF, JIT_COMPLETE = 0x00080000, 0x00020000, 0x04000000, 1
local NO_MATCH = -1

local M = {}
local library

local function load()
  if library then return library end
  for _, name in ipairs({ "libpcre2-8.so.0", "pcre2-8" }) do
    local ok, found = pcall(ffi.load, name)
    if ok then
      library = found
      return library
    end
  end
  error("libpcre2-8 is not here; Debian has it as libpcre2-8-0", 0)
end

local function message_of(code)
  local text = ffi.new("char[256]")
  load().pcre2_get_error_message_8(code, text, 256)
  return ffi.string(text)
end

---@class qm.Regex
local Regex = {}
Regex.__index = Regex

---@param pattern string  UTF-8
---@return qm.Regex|nil, string|nil reason
function M.compile(pattern)
  local lib, number, offset = load(), ffi.new("int[1]"), ffi.new("size_t[1]")
  local code = lib.pcre2_compile_8(pattern, #pattern, UTF + UCP + MATCH_INVALID_UTF, number, offset, nil)
  if code == nil then return nil, ("%s at byte %d"):format(message_of(number[0]), tonumber(offset[0])) end
  code = ffi.gc(code, lib.pcre2_code_free_8)
  lib.pcre2_jit_compile_8(code, JIT_COMPLETE) -- without it matching is slower, nothing else
  local match = ffi.gc(lib.pcre2_match_data_create_8(1, nil), lib.pcre2_match_data_free_8)
  return setmetatable({ code = code, match = match, ends = lib.pcre2_get_ovector_pointer_8(match) }, Regex)
end

---The first match at or behind byte `start` (from 0) of text.
---@return integer|nil first, integer|nil stop  bytes first up to stop - 1, from 0; nil: no more
function Regex:find(text, start)
  local count = library.pcre2_match_8(self.code, text, #text, start, 0, self.match, nil)
  if count > 0 then return tonumber(self.ends[0]), tonumber(self.ends[1]) end
  if count ~= NO_MATCH then error("regular expression: " .. message_of(count), 0) end
end

return M
