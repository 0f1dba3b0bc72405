---Mixed bit widths: a parameter whose packed rows lie in sections of one width each, and these in
---groups, as the files of EXL2 and MBWQ list them.
---
---`q_groups` holds two numbers for each group: its width, and the word row where its codes begin. From
---that list and the number of word rows all else follows: rows of groups, sections, K.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local host_buffer = require("quartermoon.host_buffer")
local tensors = require("quartermoon.tensor")

local M = {}

---What a packed row of codes may be wide.
M.WIDTHS = { 1, 2, 3, 4, 5, 6, 8 }

-- BIE's `rows`: where these widths end; and its mask of the widths that occur.
local BIE_WIDTHS = { 8, 6, 5, 4, 3, 2 }

local function refuse(name, message, ...) binding.raise((name .. ": argument 'q_groups': " .. message):format(...)) end

---The list as numbers, from a tensor (16-bit entries are unsigned) or a table, which is not kept.
local function numbers_of(name, q_groups)
  local values = check.is_tensor(q_groups) and q_groups:totable() or q_groups
  if type(values) ~= "table" then check.fail(name, "q_groups", "a tensor [2 G] or a list of numbers", q_groups) end
  if #values == 0 or #values % 2 ~= 0 then refuse(name, "expected two numbers for each group, got %d", #values) end
  local list, short = {}, check.is_tensor(q_groups) and q_groups.dtype == "i16"
  for i, value in ipairs(values) do
    if type(value) ~= "number" then check.fail(name, "q_groups", "numbers only", value) end
    list[i] = short and value % 65536 or value
  end
  return list
end

---The groups that a list describes, checked against the number of word rows.
---@param q_groups qm.Tensor|integer[]  { width, first word row, ... }, widths descending
---@param words integer  word rows in all
---@return integer[] q_groups  as a table
---@return { w_bit: integer, first: integer, rows: integer }[] groups  first: packed row, from 0
---@return { w_bit: integer, rows: integer }[] sections
---@return integer rows  K
function M.parse(name, q_groups, words)
  local list = numbers_of(name, q_groups)
  local groups, sections, row = {}, {}, 0
  for i = 1, #list / 2 do
    local w_bit, word, next_word = list[2 * i - 1], list[2 * i], list[2 * i + 2] or words
    check.one_of(name, ("q_groups, width of group %d"):format(i - 1), w_bit, M.WIDTHS)
    local rows = (next_word - word) * 32 / w_bit
    if i == 1 and word ~= 0 then refuse(name, "expected group 0 at word row 0, got %g", word) end
    if rows < 1 or rows % 1 ~= 0 then
      refuse(name, "expected whole rows of %d bits in group %d, got word rows %g to %g (of %d)", w_bit, i - 1, word,
        next_word, words)
    end
    local last = sections[#sections]
    if last and last.w_bit < w_bit then
      refuse(name, "expected widths in descending order, got %d after %d", w_bit, last.w_bit)
    end
    if not last or last.w_bit ~= w_bit then
      last = { w_bit = w_bit, rows = 0 }
      sections[#sections + 1] = last
    end
    last.rows = last.rows + rows
    groups[i] = { w_bit = w_bit, first = row, rows = rows }
    row = row + rows
  end
  for _, section in ipairs(sections) do
    if section.rows % 32 ~= 0 then
      refuse(name, "expected a multiple of 32 rows of %d bits, got %d", section.w_bit, section.rows)
    end
  end
  return list, groups, sections, row
end

---The list of groups that sections in groups of one size make; a section's last group may be short.
---@param sections { w_bit: integer, rows: integer, group_size: integer }[]
---@return integer[] q_groups
---@return integer words
function M.list(name, sections)
  local list, word = {}, 0
  check.type(name, "sections", sections, "table")
  for i, given in ipairs(sections) do
    local what = ("sections[%d]"):format(i)
    local section = check.options(name .. ": " .. what, given, { w_bit = check.required, rows = check.required,
      group_size = 32 })
    check.one_of(name, what .. ".w_bit", section.w_bit, M.WIDTHS)
    check.integer(name, what .. ".rows", section.rows, 32, 2 ^ 31 - 32)
    check.integer(name, what .. ".group_size", section.group_size, 1)
    for row = 0, section.rows - 1, section.group_size do
      local at = word + row * section.w_bit / 32
      if at % 1 ~= 0 then
        check.fail(name, what .. ".group_size", "groups that fill whole words", section.group_size)
      end
      list[#list + 1], list[#list + 2] = section.w_bit, at
    end
    word = word + section.rows / 32 * section.w_bit
  end
  if #list == 0 then check.fail(name, "sections", "at least one", sections) end
  return list, word
end

---Each packed row's group, i32 [K].
function M.group_map(groups, rows, device)
  local buffer = host_buffer.new("i32", rows)
  for g, group in ipairs(groups) do
    for p = group.first, group.first + group.rows - 1 do buffer[p] = g - 1 end
  end
  return tensors.from_host(buffer, rows, "i32", { device = device })
end

---bitorch-engine's map of groups: for each packed row its group and the rows that are left of it.
---@return integer[]  [2 K]
function M.bie_group_map(groups)
  local map = {}
  for g, group in ipairs(groups) do
    for left = group.rows, 1, -1 do map[#map + 1], map[#map + 2] = g - 1, left end
  end
  return map
end

---bitorch-engine's `rows`: the packed rows where the widths 8, 6, 5, 4, 3 and 2 end, and a mask of bits
---w_bit - 1.
---@return integer[] rows  7 numbers
function M.bie_rows(sections)
  local rows, mask, at, i = {}, 0, 0, 1
  for _, section in ipairs(sections) do mask = mask + 2 ^ (section.w_bit - 1) end
  for j, w_bit in ipairs(BIE_WIDTHS) do
    if sections[i] and sections[i].w_bit == w_bit then
      at, i = at + sections[i].rows, i + 1
    end
    rows[j] = at
  end
  rows[7] = mask
  return rows
end

---Say in a C struct which sections there are.
function M.describe_to(descriptor, sections)
  local count = sections and #sections or 0
  descriptor.section_count = count
  for i = 1, count do
    descriptor.sections[i - 1].w_bit, descriptor.sections[i - 1].rows = sections[i].w_bit, sections[i].rows
  end
end
assert(ffi.sizeof("qm_mpq_section") == 8)

return M
