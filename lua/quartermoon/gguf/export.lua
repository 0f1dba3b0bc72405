---Models as GGUF files for llama.cpp.

local ffi = require("ffi")
local bit = require("bit")
local architectures = require("quartermoon.gguf.architecture")
local check = require("quartermoon.check")
local grid = require("quartermoon.gguf.grid")
local host_buffer = require("quartermoon.host_buffer")
local module = require("quartermoon.nn.module")
local nn = require("quartermoon.nn")
local published = require("quartermoon.models.published")
local qm = require("quartermoon")
local raise = require("quartermoon.ffi").raise
local types = require("quartermoon.gguf.types")
local vocabulary = require("quartermoon.gguf.vocabulary")
local writing = require("quartermoon.gguf.write")

local M = {}

local TYPE = { f32 = "F32", f16 = "F16", bf16 = "BF16" }
local DTYPE = { F32 = "f32", F16 = "f16", BF16 = "bf16" }
local QUANTIZATION_VERSION = 2 -- of ggml's blocks, which are what blocks.lua says
local PIECE_BYTES = 2 ^ 20

---------------------------------------------------------------------------------------------------
-- Tensors
---------------------------------------------------------------------------------------------------

---Where an output's row comes from, from 0: see architecture.lua. Without heads it stays.
local function source_row(row, rows, heads)
  if not heads then return row end
  local size = rows / heads
  local inside = row % size
  return row - inside + inside % 2 * size / 2 + math.floor(inside / 2)
end

---The same for a dense tensor [rows, ...].
local function reordered(x, heads)
  if not heads then return x end
  local rows = x.shape[1]
  local columns = x:count() / rows
  return x:reshape(heads, 2, rows / heads / 2, columns):permute(1, 3, 2, 4):reshape(unpack(x.shape))
end

---Refuse infinity and NaN in the bytes of f16: a wide value that has no f16, or one that was none before.
local function check_finite(name, label, bytes)
  local halves = ffi.cast("const uint16_t *", bytes)
  for i = 0, #bytes / 2 - 1 do
    if bit.band(halves[i], 0x7c00) == 0x7c00 then
      raise(("%s: tensor '%s': it holds a value that is not finite as f16"):format(name, label))
    end
  end
end

---A tensor that is made when its turn comes.
---@param make fun(): qm.Tensor  rows first, in the order of ours
local function dense_plan(name, label, shape, kind, heads, make)
  return { type = kind, shape = shape, write = function(put)
    qm.no_grad(qm.scope, function()
      local x = reordered(make(), heads)
      if x.dtype ~= DTYPE[kind] then x = x:to(DTYPE[kind]) end
      writing.put_tensor(x, function(bytes)
        if kind == "F16" then check_finite(name, label, bytes) end
        put(bytes)
      end)
    end)
  end }
end

---A dense parameter: what is no matrix, and positions, in f32, as llama.cpp wants it.
local function dense_part(name, model, entry, label, heads, dtype)
  local x, is_linear = entry.param, getmetatable(entry.layer) == nn.Linear
  local shape = x.shape
  if #shape == 2 and is_linear then shape = { shape[2], shape[1] } end
  if x == model.tied_weight then shape = { model.config.vocab_size, shape[2] } end
  local kind = #shape == 2 and label ~= "position_embd.weight" and TYPE[dtype or x.dtype] or "F32"
  return dense_plan(name, label, shape, kind, heads, function()
    if #shape == 2 and is_linear then return x:transpose() end
    return x:view_rows(name, 1, shape[1])
  end)
end

---A quantized parameter in blocks that hold it exactly.
local function block_plan(q, kind, heads)
  local rows, k = q.shape[2], q.shape[1]
  return { type = kind, shape = { rows, k }, write = function(put)
    local encode = grid.encoder(q)
    local row_bytes = k / types.by_name[kind].block * types.by_name[kind].bytes
    local step = math.max(1, math.floor(PIECE_BYTES / row_bytes))
    local buffer = host_buffer.new("u8", step * row_bytes)
    for first = 0, rows - 1, step do
      local count = math.min(step, rows - first)
      for i = 0, count - 1 do encode(source_row(first + i, rows, heads), buffer + i * row_bytes) end
      put(buffer, count * row_bytes)
    end
  end }
end

---What its layer multiplies with, [N, K].
local function decoded(q)
  local w = q:dequantize("f32")
  if q.channel_scale then w = qm.mul(w, q.channel_scale:to("f32"):reshape(q.shape[1], 1)) end
  return w:transpose()
end

---@return table plan, string|nil reason  why it is F16
local function quantized_part(name, entry, label, heads, otherwise)
  local q = entry.param
  local kind, reason = grid.exact_type(q)
  if kind then return block_plan(q, kind, heads) end
  if otherwise == "refuse" then
    raise(("%s: tensor '%s': neither Q4_0, Q4_1 nor Q8_0 holds it exactly: %s; otherwise = 'f16' rounds it"):format(
      name, entry.path, reason))
  end
  return dense_plan(name, label, { q.shape[2], q.shape[1] }, "F16", heads, function() return decoded(q) end), reason
end

---------------------------------------------------------------------------------------------------

---The type that most weights have.
local function file_type(parts)
  local counts, most = {}, "F32"
  for _, part in ipairs(parts) do
    local kind, count = part[2].type, 1
    for _, extent in ipairs(part[2].shape) do count = count * extent end
    counts[kind] = (counts[kind] or 0) + count
    if counts[kind] > (counts[most] or 0) then most = kind end
  end
  return types.file_type[most]
end

local function general(model, architecture, parts, o)
  local folder = model.folder and model.folder:match("([^/]+)/*$")
  local list = {
    { "general.architecture", "string", architecture.name }, { "general.type", "string", "model" },
    { "general.name", "string", o.name or folder or architecture.name },
    { "general.file_type", "u32", file_type(parts) },
    { "general.quantization_version", "u32", QUANTIZATION_VERSION },
  }
  for _, key in ipairs(architecture.keys) do
    list[#list + 1] = { architecture.name .. "." .. key[1], key[2], key[3] }
  end
  return list
end

local OPTIONS = { dtype = check.optional, otherwise = "refuse", tokenizer = check.optional, pre = check.optional,
  name = check.optional }

local function check_options(name, options)
  local o = check.options(name, options, OPTIONS)
  check.one_of(name, "otherwise", o.otherwise, { "refuse", "f16" })
  if o.dtype then check.one_of(name, "dtype", o.dtype, { "f32", "f16", "bf16" }) end
  if o.tokenizer then check.type(name, "tokenizer", o.tokenizer, "string") end
  if o.pre then check.type(name, "pre", o.pre, "string") end
  if o.name then check.type(name, "name", o.name, "string") end
  return o
end

---Write a model as a GGUF file for llama.cpp. A quantized weight goes into Q4_0, Q4_1 or Q8_0, the smallest
---that holds its grid exactly: llama.cpp then decodes to the same numbers as we do. A residual stays behind. What
---is dense stays as it is.
---
---The file has what llama.cpp needs of the tokenizer, too, where it knows one that makes the same tokens.
---
---@param model qm.models.Decoder
---@param path string
---@param options table|nil  { otherwise = "refuse" what no block holds exactly, or "f16": round it and report it,
---   dtype = as they are ("f32", "f16", "bf16": of dense matrices), tokenizer = a folder or file to take it from
---   (default: the folder that the model came from; false: the file has none), pre = llama.cpp's name for how the
---   tokenizer splits a text (default: by what tokenizer.json says), name = the folder's (general.name) }
---@return { tensors: table[], notes: string[] }  of each tensor { name =, type =, reason = }: why it was rounded;
---   and what llama.cpp does otherwise
---@raise naming the tensor that does not fit, or what llama.cpp has no equal of; nothing is left behind then
function M.export(model, path, options)
  local name = "qm.gguf.export"
  if not module.is_module(model) or not model.published_parameters then
    check.fail(name, "model", "a language model", model)
  end
  check.type(name, "path", path, "string")
  local o = check_options(name, options)
  local architecture = architectures.of(name, model)
  local report, parts = { tensors = {}, notes = architecture.notes }, {}
  for _, entry in ipairs(published.parameters(model)) do
    local part = entry.name:sub(#entry.path + 2)
    local label, heads = architectures.tensor_name(name, architecture, entry.path, part)
    local plan, reason
    if module.is_quantized(entry.param) then
      plan, reason = quantized_part(name, entry, label, heads, o.otherwise)
    else
      plan = dense_part(name, model, entry, label, heads, o.dtype)
    end
    parts[#parts + 1] = { label, plan }
    report.tensors[#report.tensors + 1] = { name = label, type = plan.type, reason = reason }
  end
  for _, extra in ipairs(architecture.extra) do
    parts[#parts + 1] = { extra[1], dense_plan(name, extra[1], { #extra[2] }, "F32", nil, function()
      return qm.tensor(extra[2])
    end) }
    report.tensors[#report.tensors + 1] = { name = extra[1], type = "F32" }
  end
  local metadata = general(model, architecture, parts, o)
  for _, entry in ipairs(vocabulary.entries(name, model, o, report.notes)) do metadata[#metadata + 1] = entry end
  writing.save(path, parts, metadata)
  return report
end

return M
