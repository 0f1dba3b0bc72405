---SentencePiece's tokenizer.model files: the byte-pair kind, read into what a tokenizer.json says.
---
---A file is one protocol-buffer message (sentencepiece_model.proto); we need a handful of its fields,
---so we read the wire format itself. Merges follow from the scores: of two neighbouring pieces whose
---join is a piece, the best score goes first.

local ffi = require("ffi")
local bit = require("bit")
local cjson = require("cjson")

local M = {}

local NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
local MARK = "\226\150\129"

local function fail(what) error("not a SentencePiece model: " .. what, 0) end

---A number of seven bits to a byte. @return number value, integer at  behind it
local function varint(bytes, at)
  local result, factor = 0, 1
  for _ = 1, 10 do
    local byte = bytes:byte(at) or fail("it ends within a number")
    result, factor, at = result + byte % 128 * factor, factor * 128, at + 1
    if byte < 128 then return result, at end
  end
  fail("a number of more than ten bytes")
end

local NUMBER, EIGHT, BYTES, FOUR = 0, 1, 2, 5 -- wire types
local SIZES = { [EIGHT] = 8, [FOUR] = 4 }

---Call field(number, value) on those fields of a message that are wanted: numbers for number fields, strings
---otherwise.
---@param wanted table<integer, integer>  the wire type that each must have
local function each_field(bytes, wanted, field)
  local at = 1
  while at <= #bytes do
    local key, value, size
    key, at = varint(bytes, at)
    local wire = key % 8
    local number = (key - wire) / 8
    if wire == NUMBER then
      value, at = varint(bytes, at)
    else
      size = SIZES[wire]
      if wire == BYTES then size, at = varint(bytes, at) end
      if not size then fail("a field of an unknown kind") end
      if size > #bytes - at + 1 then fail("a field of " .. size .. " bytes reaches beyond the end") end
      value, at = bytes:sub(at, at + size - 1), at + size
    end
    if wanted[number] then
      if wanted[number] ~= wire then fail(("field %d is of another kind"):format(number)) end
      field(number, value)
    end
  end
end

local float = ffi.new("float[1]")
local bits = ffi.cast("int32_t *", float)
local function to_float(bytes)
  ffi.copy(float, bytes, 4)
  -- NaN by its bits: as a number it could be any value of Lua's, and it has no place in an order.
  if bit.band(bits[0], 0x7f800000) == 0x7f800000 then fail("a score that is not finite") end
  return tonumber(float[0])
end

local WORD_BYTES_MAX = 1024 -- finding merges takes the square of it

local function read_piece(bytes)
  local piece = { score = 0, kind = NORMAL }
  each_field(bytes, { BYTES, FOUR, NUMBER }, function(number, value)
    if number == 1 then piece.word = value elseif number == 2 then piece.score = to_float(value)
    else piece.kind = value end
  end)
  if not piece.word or piece.word == "" then fail("a piece without a word") end
  if #piece.word > WORD_BYTES_MAX then fail(("a piece of %d bytes"):format(#piece.word)) end
  return piece
end

---Every way to join two words to a third, best score first.
local function merges_of(pieces, by_word)
  local merges = {}
  for _, piece in ipairs(pieces) do
    if piece.kind == NORMAL or piece.kind == USER_DEFINED then
      for cut = 1, #piece.word - 1 do
        local byte = piece.word:byte(cut + 1)
        if byte < 128 or byte >= 192 then
          local left, right = piece.word:sub(1, cut), piece.word:sub(cut + 1)
          if by_word[left] and by_word[right] then
            merges[#merges + 1] = { left, right, score = piece.score, order = #merges }
          end
        end
      end
    end
  end
  table.sort(merges, function(a, b) return a.score > b.score or a.score == b.score and a.order < b.order end)
  return merges
end

---@param bytes string  the file
---@return string text, table description  as a tokenizer.json's
function M.convert(bytes)
  local pieces, by_word, vocab, added = {}, {}, {}, {}
  local settings = { model_type = 1, byte_fallback = 0, add_dummy_prefix = 1 }
  each_field(bytes, { BYTES, BYTES, BYTES }, function(number, value)
    if number == 1 then
      pieces[#pieces + 1] = read_piece(value)
    elseif number == 2 then
      each_field(value, { [3] = NUMBER, [35] = NUMBER }, function(field, x)
        if field == 3 then settings.model_type = x else settings.byte_fallback = x end
      end)
    else
      each_field(value, { [3] = NUMBER }, function(_, x) settings.add_dummy_prefix = x end)
    end
  end)
  if #pieces == 0 then fail("no pieces") end
  if settings.model_type ~= 2 then
    error(("a SentencePiece model of type %d is not known here, only BPE (2)"):format(settings.model_type), 0)
  end
  local unknown, bos
  for i, piece in ipairs(pieces) do
    if by_word[piece.word] then fail(("two pieces '%s'"):format(piece.word)) end
    by_word[piece.word], vocab[piece.word] = piece, i - 1
    if piece.kind == UNKNOWN then unknown = piece.word end
    if piece.kind == CONTROL or piece.kind == UNKNOWN or piece.kind == USER_DEFINED then
      added[#added + 1] = { id = i - 1, content = piece.word, special = piece.kind ~= USER_DEFINED }
    end
    if piece.word == "<s>" and piece.kind == CONTROL then bos = i - 1 end
  end
  local steps = { { type = "Replace", pattern = { String = " " }, content = MARK } }
  if settings.add_dummy_prefix ~= 0 then table.insert(steps, 1, { type = "Prepend", prepend = MARK }) end
  local description = {
    added_tokens = added,
    normalizer = { type = "Sequence", normalizers = steps },
    post_processor = bos and { type = "TemplateProcessing",
      single = { { SpecialToken = { id = "<s>" } }, { Sequence = { id = "A" } } },
      special_tokens = { ["<s>"] = { ids = { bos } } } } or nil,
    decoder = settings.add_dummy_prefix ~= 0 and { type = "Strip" } or nil,
    model = { type = "BPE", vocab = vocab, merges = merges_of(pieces, by_word), unk_token = unknown, fuse_unk = true,
      byte_fallback = settings.byte_fallback ~= 0 },
  }
  for _, merge in ipairs(description.model.merges) do merge.score, merge.order = nil, nil end
  return cjson.encode(description), description
end

return M
