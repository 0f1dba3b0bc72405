---The element types: names, numbers, sizes and how C spells them.

local ffi = require("ffi")
local lib = require("quartermoon.ffi").lib

local M = {}

---Name -> what one element is on the host. 16-bit floats are bits there.
M.element = { f32 = "float", f16 = "uint16_t", bf16 = "uint16_t", i8 = "int8_t", u8 = "uint8_t",
  i16 = "int16_t", i32 = "int32_t", i64 = "int64_t" }

---Name -> number; number -> name; name -> bytes of one element; the names in order.
M.id, M.name, M.size, M.names = {}, {}, {}, {}

for id = 0, tonumber(ffi.C.QM_DTYPE_COUNT) - 1 do
  local name = ffi.string(lib.qm_dtype_name(id))
  M.id[name], M.name[id], M.size[name] = id, name, lib.qm_dtype_size(id)
  M.names[id + 1] = name
end

return M
