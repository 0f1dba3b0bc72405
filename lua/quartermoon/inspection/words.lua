---A report in words for the terminal.

local extents = require("quartermoon.inspection.report").extents

local M = {}

---A size that people can read.
local function bytes(n)
  local units, i = { "B", "KiB", "MiB", "GiB", "TiB" }, 1
  while n >= 1024 and i < #units do n, i = n / 1024, i + 1 end
  return (i == 1 and "%d %s" or "%.1f %s"):format(n, units[i])
end

local function count(n)
  if n >= 1e9 then return ("%.3g G"):format(n / 1e9) end
  if n >= 1e6 then return ("%.3g M"):format(n / 1e6) end
  return ("%d"):format(n)
end

---Controls and invalid bytes of a name in a file must not reach the terminal.
local function safe(text) return (text:gsub("[%z\1-\31\127]", function(c) return ("\\%d"):format(c:byte()) end)) end

---The columns of one weight: type or format, shape, bits, group.
local function columns(w)
  if w.dense then
    return { w.dense.dtype, extents(w.dense.shape), w.dense.bits and ("%.2f"):format(w.dense.bits) or "", "" }
  end
  local widths = {}
  for bits in pairs(w.widths or {}) do widths[#widths + 1] = bits end
  table.sort(widths, function(a, b) return a > b end)
  local form = w.format .. (w.act_order and ", act-order" or "")
  local code = #widths > 0 and table.concat(widths, "/") or w.bits and ("%g"):format(w.bits) or "?"
  local per_weight = w.k and w.n and w.k * w.n > 0 and ("%.2f"):format(w.size_bytes * 8 / (w.k * w.n)) or "?"
  return { form, ("[%s, %s]"):format(w.k or "?", w.n or "?"), ("%s (%s)"):format(code, per_weight),
    w.group_size and tostring(w.group_size) or w.groups and w.groups .. " groups" or "" }
end

---Weights whose names differ in a number only, and that are alike, are one row.
local function rows_of(report, all)
  local rows, by_key = {}, {}
  for _, w in ipairs(report.weights) do
    local name = all and w.name or w.name:gsub("%.%d+%.", ".*.")
    local cells = columns(w)
    local key = name .. "\0" .. table.concat(cells, "\0")
    local row = by_key[key]
    if not row then
      row = { name = name, cells = cells, count = 0, size_bytes = 0 }
      by_key[key], rows[#rows + 1] = row, row
    end
    row.count, row.size_bytes = row.count + 1, row.size_bytes + w.size_bytes
  end
  return rows
end

local function table_of(report, all)
  local lines = { { "tensor", "", "type", "shape", "bits (all told)", "group", "bytes" } }
  for _, row in ipairs(rows_of(report, all)) do
    local name, count_of = row.name == "" and "(no name)" or safe(row.name), row.count > 1 and "x" .. row.count or ""
    lines[#lines + 1] = { name, count_of, safe(row.cells[1]), row.cells[2], row.cells[3], row.cells[4],
      bytes(row.size_bytes) }
  end
  local wide = {}
  for _, line in ipairs(lines) do
    for i, cell in ipairs(line) do wide[i] = math.max(wide[i] or 0, #cell) end
  end
  local out = {}
  for _, line in ipairs(lines) do
    local cells = {}
    for i, cell in ipairs(line) do cells[i] = cell .. (" "):rep(wide[i] - #cell) end
    out[#out + 1] = "  " .. (table.concat(cells, "  "):gsub("%s+$", ""))
  end
  return out
end

---Weights, bytes and bits per weight, of the quantized ones and of all.
function M.totals(report)
  local total = { weights = 0, size_bytes = 0, quantized = 0, quantized_bytes = 0 }
  for _, w in ipairs(report.weights) do
    local weights = w.dense and w.dense.count or (w.k or 0) * (w.n or 0)
    total.weights, total.size_bytes = total.weights + weights, total.size_bytes + w.size_bytes
    if w.parts or w.dense.bits then
      total.quantized, total.quantized_bytes = total.quantized + weights, total.quantized_bytes + w.size_bytes
    end
  end
  return total
end

---@param report qm.InspectionReport
---@param all boolean  a row for every tensor, not one for those alike
---@return string
function M.text(report, all)
  local out = { safe(report.path) .. ": " .. report.kind }
  for _, fact in ipairs(report.facts) do out[#out + 1] = ("  %-14s %s"):format(fact[1], safe(fact[2])) end
  for _, file in ipairs(report.files) do
    out[#out + 1] = ("  %-14s %s, %d tensors, %s"):format("file", safe(file.name), file.tensors, bytes(file.size_bytes))
  end
  if #report.weights > 0 then
    out[#out + 1] = ""
    for _, line in ipairs(table_of(report, all)) do out[#out + 1] = line end
    local total = M.totals(report)
    out[#out + 1] = ("\n  %s weights in %d tensors, %s"):format(count(total.weights), #report.tensors,
      bytes(total.size_bytes))
    if total.quantized > 0 then
      out[#out + 1] = ("  quantized: %s weights, %s, %.2f bits per weight"):format(count(total.quantized),
        bytes(total.quantized_bytes), total.quantized_bytes * 8 / total.quantized)
    end
  end
  out[#out + 1] = ""
  if report.problem_count == 0 then
    out[#out + 1] = "nothing wrong was found"
  else
    out[#out + 1] = report.problem_count == 1 and "1 problem:" or report.problem_count .. " problems:"
    for _, problem in ipairs(report.problems) do out[#out + 1] = "  " .. safe(problem) end
    if report.problem_count > #report.problems then
      out[#out + 1] = ("  ... and %d more"):format(report.problem_count - #report.problems)
    end
  end
  return table.concat(out, "\n") .. "\n"
end

return M
