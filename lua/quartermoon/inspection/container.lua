---A safetensors file's header, read so that a broken file can still be listed: every tensor, and everything
---that is wrong with it. The library's own reader stops at the first mistake and refuses the file.
---
---Source: https://huggingface.co/docs/safetensors, format section.

local ffi = require("ffi")
local cjson = require("cjson")
local safetensors = require("quartermoon.safetensors")
local extents = require("quartermoon.inspection.report").extents

local M = {}

local HEADER_BYTES_MAX = 1e8
local SIZES = { F64 = 8, F32 = 4, F16 = 2, BF16 = 2, I64 = 8, I32 = 4, I16 = 2, I8 = 1, U8 = 1, BOOL = 1, U16 = 2,
  U32 = 4, U64 = 8, C64 = 8, F8_E4M3 = 1, F8_E5M2 = 1, F8_E8M0 = 1 }

local function is_count(x) return type(x) == "number" and x >= 0 and x % 1 == 0 and x < 2 ^ 53 end

---The header's text and where the data begins; nil after a problem was noted.
local function read_header(report, file, name, size_bytes)
  local start = file:read(8)
  if not start or #start < 8 then
    return report:problem(name, "%d bytes are too few for a safetensors file", size_bytes)
  end
  local length = tonumber(ffi.cast("const uint64_t *", start)[0])
  if length > size_bytes - 8 then
    return report:problem(name, "a header of %.0f bytes in a file of %.0f: truncated, or no safetensors", length,
      size_bytes)
  end
  if length > HEADER_BYTES_MAX then
    return report:problem(name, "a header of %.0f bytes; the format allows %.0f", length, HEADER_BYTES_MAX)
  end
  return file:read(length) or "", 8 + length
end

local function shape_of(entry)
  if type(entry.shape) ~= "table" then return nil end
  local shape, count = {}, 1
  for i, extent in ipairs(entry.shape) do
    if not is_count(extent) then return nil end
    shape[i], count = extent, count * extent
  end
  for key in pairs(entry.shape) do if type(key) ~= "number" or key > #shape then return nil end end
  return shape, count
end

---One entry of the header as a tensor of the report; nil after a problem was noted.
local function read_entry(report, name, key, entry, data_at, data_bytes)
  local label = "tensor '" .. key .. "'"
  if type(entry) ~= "table" then return report:problem(name, "%s: its header entry is not an object", label) end
  local shape, count = shape_of(entry)
  if not shape then return report:problem(name, "%s: its shape is not a list of whole numbers from 0", label) end
  local tensor = { name = key, dtype = tostring(entry.dtype), shape = shape, count = count, file = name,
    size_bytes = 0 }
  local element = type(entry.dtype) == "string" and SIZES[entry.dtype]
  if not element then report:problem(name, "%s: unknown dtype '%s'", label, tensor.dtype) end
  local offsets = type(entry.data_offsets) == "table" and entry.data_offsets or {}
  local from, to = offsets[1], offsets[2]
  if not (is_count(from) and is_count(to) and from <= to and #offsets == 2) then
    report:problem(name, "%s: its data_offsets are not two whole numbers in order", label)
    return tensor
  end
  tensor.size_bytes = to - from
  if element and count * element ~= to - from then
    report:problem(name, "%s: %s %s takes %.0f bytes, its data_offsets hold %.0f", label, tensor.dtype, extents(shape),
      count * element, to - from)
  elseif to > data_bytes then
    report:problem(name, "%s: ends at byte %.0f of data, but there are %.0f: the file is truncated", label, to,
      data_bytes)
  else
    tensor.element = element
  end
  tensor.first, tensor.last, tensor.at = from, to, data_at + from
  return tensor
end

---Holes and overlaps.
local function check_coverage(report, name, tensors, data_bytes)
  local placed = {}
  for _, tensor in ipairs(tensors) do
    if tensor.first then placed[#placed + 1] = tensor end
  end
  table.sort(placed, function(a, b)
    if a.first ~= b.first then return a.first < b.first end
    if a.last ~= b.last then return a.last < b.last end
    return a.name < b.name
  end)
  local covered, before = 0, nil
  for _, tensor in ipairs(placed) do
    if tensor.first < covered then
      report:problem(name, "tensor '%s' overlaps tensor '%s' (it begins at byte %.0f, inside)", tensor.name,
        before.name, tensor.first)
    elseif tensor.first > covered then
      report:problem(name, "bytes %.0f to %.0f of the data belong to no tensor", covered, tensor.first)
    end
    if tensor.last >= covered then covered, before = tensor.last, tensor end
  end
  if covered < data_bytes then report:problem(name, "%.0f bytes behind the last tensor", data_bytes - covered) end
end

local function list(report, name, header, data_at, data_bytes)
  local tensors = {}
  for key, entry in pairs(header) do
    if type(key) == "string" and key ~= "__metadata__" then
      tensors[#tensors + 1] = read_entry(report, name, key, entry, data_at, data_bytes)
    end
  end
  table.sort(tensors, function(a, b)
    if a.first ~= b.first then return (a.first or -1) < (b.first or -1) end
    return a.name < b.name
  end)
  check_coverage(report, name, tensors, data_bytes)
  return tensors
end

---Add a file's tensors and problems to the report.
---@param report qm.InspectionReport
---@param path string
---@param name string  as the report calls the file
---@return table[] tensors, table|nil metadata
function M.read(report, path, name)
  local file, reason = io.open(path, "rb")
  if not file then
    report:problem(name, reason)
    return {}
  end
  local size_bytes = file:seek("end")
  if not size_bytes or size_bytes >= 2 ^ 53 or not file:seek("set") then
    file:close()
    report:problem(name, "not a regular file")
    return {}
  end
  local entry, found = { name = name, size_bytes = size_bytes, tensors = 0 }, report.problem_count
  report.files[#report.files + 1] = entry
  local text, data_at = read_header(report, file, name, size_bytes)
  file:close()
  if not text then return {} end
  local ok, header = pcall(cjson.decode, text)
  if not ok or type(header) ~= "table" then
    report:problem(name, "the header is not a JSON object%s", ok and "" or ": " .. tostring(header))
    return {}
  end
  local tensors = list(report, name, header, data_at, size_bytes - data_at)
  for _, tensor in ipairs(tensors) do
    tensor.path = path
    report:add(tensor)
  end
  entry.tensors = #tensors
  if report.problem_count == found then -- what only the strict reader sees, as names that come twice
    local opened, strict = pcall(safetensors.open, path)
    if opened then strict:close() else report:problem(name, (tostring(strict):gsub("^.*safetensors.open: ", ""))) end
  end
  return tensors, type(header.__metadata__) == "table" and header.__metadata__ or nil
end

return M
