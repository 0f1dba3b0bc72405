---The types that GGUF files know, of tensors and of metadata.
---
---Source: https://github.com/ggml-org/ggml, docs/gguf.md, and the sizes of ggml's blocks.

local M = {}

---Tensor types by number: elements to a block, bytes of a block. Numbers that are missing were taken back.
---@type table<integer, { id: integer, name: string, block: integer, bytes: integer }>
M.tensors = {}
---The same by name.
M.by_name = {}

for id, name, block, bytes in ([[
   0 F32      1   4,   1 F16      1   2,   2 Q4_0    32  18,   3 Q4_1    32  20,   6 Q5_0    32  22,
   7 Q5_1    32  24,   8 Q8_0    32  34,   9 Q8_1    32  36,  10 Q2_K   256  84,  11 Q3_K   256 110,
  12 Q4_K   256 144,  13 Q5_K   256 176,  14 Q6_K   256 210,  15 Q8_K   256 292,  16 IQ2_XXS 256 66,
  17 IQ2_XS 256  74,  18 IQ3_XXS 256 98,  19 IQ1_S  256  50,  20 IQ4_NL  32  18,  21 IQ3_S  256 110,
  22 IQ2_S  256  82,  23 IQ4_XS 256 136,  24 I8       1   1,  25 I16      1   2,  26 I32      1   4,
  27 I64      1   8,  28 F64      1   8,  29 IQ1_M  256  56,  30 BF16     1   2,  34 TQ1_0  256  54,
  35 TQ2_0  256  66,  39 MXFP4   32  17,  40 NVFP4   64  36,  41 Q1_0   128  18]])
  :gmatch("(%d+) ([%w_]+) +(%d+) +(%d+)") do
  local kind = { id = tonumber(id), name = name, block = tonumber(block), bytes = tonumber(bytes) }
  M.tensors[kind.id], M.by_name[name] = kind, kind
end

---Metadata types by number: { name, C type or nil, bytes, or the least of strings and arrays }. An array of
---strings is called "string[]".
M.values = {
  [0] = { "u8", "uint8_t", 1 }, { "i8", "int8_t", 1 }, { "u16", "uint16_t", 2 }, { "i16", "int16_t", 2 },
  { "u32", "uint32_t", 4 }, { "i32", "int32_t", 4 }, { "f32", "float", 4 }, { "bool", "uint8_t", 1 },
  { "string", nil, 8 }, { "array", nil, 12 }, { "u64", "uint64_t", 8 }, { "i64", "int64_t", 8 },
  { "f64", "double", 8 },
}

---The number of a metadata type, by name.
M.value_id = {}
for id = 0, #M.values do M.value_id[M.values[id][1]] = id end

---general.file_type: what most weights of a file are, by tensor type.
M.file_type = { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 7, BF16 = 32 }

M.ALIGNMENT = 32 -- where general.alignment does not say another
M.NAME_BYTES_MAX = 63 -- of a tensor; ggml keeps a 0 behind it

---The next multiple of an alignment.
function M.align(offset, alignment) return math.ceil(offset / alignment) * alignment end

return M
