---quant_strategy.json, which lies in bitorch-engine's folders: the widths and group sizes of each linear layer.
---
---    { "measurement": { "model.layers.0": { "q_proj": {
---        "bits": [4, 2], "bits_prop": [0.75, 0.25], "group_size": { "4": 32, "2": 32 }, "scale_bits": 4 } } } }
---
---Widths descend; bits_prop is each one's share of the rows. The tensors say all of it but how many rows a group
---has where the last is short.
---
---Source: green-bit-llm's loader.

local check = require("quartermoon.check")
local files = require("quartermoon.files")
local json_text = require("quartermoon.models.json_text")
local raise = require("quartermoon.ffi").raise

local M = {}

local BASE = "quant_strategy.json"

---@class qm.models.QuantStrategy
---@field path string
---@field blocks table<string, table>  by the path of a block
local Strategy = {}
Strategy.__index = Strategy

---A layer's path in parts: the block's, and below it the last name, and all names.
local function parts_of(path)
  local block, rest = path:match("^(%a+%.%a+%.%d+)%.(.+)$")
  return block, rest and rest:match("[^.]+$"), rest
end

---@param name string    whose errors these are
---@param folder string
---@return qm.models.QuantStrategy|nil  nil: the folder has none
---@raise naming the file and what is wrong with it
function M.read(name, folder)
  local path = folder .. "/" .. BASE
  if not files.exists(path) then return nil end
  local value = files.assert(name, files.read_json(path))
  local blocks = type(value) == "table" and value.measurement
  if type(blocks) ~= "table" then raise(("%s: %s: expected an object 'measurement'"):format(name, path)) end
  return setmetatable({ path = path, blocks = blocks }, Strategy)
end

---Rows to a group of a layer of one width; nil where the file does not speak of it.
---@param path string    of the layer
---@param bits integer   as its tensors have them
---@raise where the file says another width
function Strategy:group_size(name, path, bits)
  local block, last, rest = parts_of(path)
  local layers = self.blocks[block or ""]
  local entry = type(layers) == "table" and (layers[rest] or layers[last])
  if not entry then return nil end
  local function fail(key, expected, got)
    raise(("%s: %s: key '%s' of %s in '%s': expected %s, got %s"):format(name, self.path, key, last, block, expected,
      check.describe(got)))
  end
  if type(entry) ~= "table" then fail("bits", "an object with it", entry) end
  if type(entry.desc) == "string" and entry.desc:find("Not quantized", 1, true) then return nil end
  local widths = type(entry.bits) == "table" and entry.bits or fail("bits", "a list of widths", entry.bits)
  if widths[1] ~= bits then fail("bits", ("%d first, as the codes of qweight have"):format(bits), widths[1]) end
  local sizes = type(entry.group_size) == "table" and entry.group_size or fail("group_size", "an object",
    entry.group_size)
  local size = sizes[tostring(bits)]
  if type(size) ~= "number" or size % 1 ~= 0 or size < 1 and size ~= -1 then
    fail("group_size." .. bits, "a whole number of rows", size)
  end
  return size
end

---Rows, width and group size of each section.
local function sections_of(q)
  if not q.sections then return { { w_bit = q.w_bit, rows = q.shape[1], group_size = q.group_size } } end
  local list, group = {}, 1
  for i, section in ipairs(q.sections) do
    local words = (q.q_groups[2 * group + 2] or q.data.shape[1]) - q.q_groups[2 * group]
    list[i] = { w_bit = section.w_bit, rows = section.rows, group_size = words * 32 / section.w_bit }
    while q.q_groups[2 * group - 1] == section.w_bit do group = group + 1 end
  end
  return list
end

---The share of K rows that a loader, which takes the floor of share times K, makes these rows of.
local function share_of(rows, k)
  local share = rows / k
  while math.floor(share * k) < rows do share = share + 2 ^ -53 end
  return share
end

---The file's text.
---@param entries table[]  quantized parameters, of published.parameters
---@return string
function M.encode(entries)
  local blocks = {}
  for _, entry in ipairs(entries) do
    local block, last, rest = parts_of(entry.path)
    if block then
      local layer = { bits = {}, bits_prop = {}, group_size = {}, scale_bits = 4 }
      for i, section in ipairs(sections_of(entry.param)) do
        layer.bits[i], layer.bits_prop[i] = section.w_bit, share_of(section.rows, entry.param.shape[1])
        layer.group_size[tostring(section.w_bit)] = section.group_size
      end
      blocks[block] = blocks[block] or {}
      local layers = blocks[block]
      layers[layers[last] and rest or last] = layer
    end
  end
  return json_text.encode({ measurement = blocks })
end

---Write it.
function M.write(folder, entries) files.write(folder .. "/" .. BASE, M.encode(entries)) end

return M
