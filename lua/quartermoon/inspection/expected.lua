---What a model's config.json says of its weights: their names and extents, family by family.

local M = {}

local function whole(x) return type(x) == "number" and x >= 1 and x % 1 == 0 and x < 2 ^ 31 end

---Linear layers, by path: { in, out }; vectors: { size }; tables: { rows, columns, table = true }.
local function decoder(c, more)
  local hidden, heads = c.hidden_size, c.num_attention_heads
  local head = c.head_dim or hidden / heads
  local kv = c.num_key_value_heads or heads
  local ffn, list = c.intermediate_size, {}
  for i = 0, c.num_hidden_layers - 1 do
    local at = "model.layers." .. i .. "."
    list[at .. "self_attn.q_proj"] = { hidden, heads * head, bias = more.qkv_bias }
    list[at .. "self_attn.k_proj"] = { hidden, kv * head, bias = more.qkv_bias }
    list[at .. "self_attn.v_proj"] = { hidden, kv * head, bias = more.qkv_bias }
    list[at .. "self_attn.o_proj"] = { heads * head, hidden, bias = more.o_bias }
    list[at .. "mlp.gate_proj"] = { hidden, ffn, bias = c.mlp_bias }
    list[at .. "mlp.up_proj"] = { hidden, ffn, bias = c.mlp_bias }
    list[at .. "mlp.down_proj"] = { ffn, hidden, bias = c.mlp_bias }
    list[at .. "input_layernorm"], list[at .. "post_attention_layernorm"] = { hidden }, { hidden }
    if more.qk_norm then list[at .. "self_attn.q_norm"], list[at .. "self_attn.k_norm"] = { head }, { head } end
  end
  list["model.embed_tokens"] = { c.vocab_size, hidden, table = true }
  list["model.norm"] = { hidden }
  if not c.tie_word_embeddings then list["lm_head"] = { hidden, c.vocab_size } end
  return list
end

local function gpt2(c)
  local hidden, ffn, list = c.n_embd, c.n_inner or 4 * c.n_embd, {}
  for i = 0, c.n_layer - 1 do
    local at = "transformer.h." .. i .. "."
    list[at .. "attn.c_attn"] = { hidden, 3 * hidden, bias = true, conv = true }
    list[at .. "attn.c_proj"] = { hidden, hidden, bias = true, conv = true }
    list[at .. "mlp.c_fc"] = { hidden, ffn, bias = true, conv = true }
    list[at .. "mlp.c_proj"] = { ffn, hidden, bias = true, conv = true }
    list[at .. "ln_1"], list[at .. "ln_2"] = { hidden, bias = true }, { hidden, bias = true }
  end
  list["transformer.wte"] = { c.vocab_size, hidden, table = true }
  list["transformer.wpe"] = { c.n_positions, hidden, table = true }
  list["transformer.ln_f"] = { hidden, bias = true }
  return list
end

local COUNTS = { "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size" }
local FAMILIES = {
  llama = { COUNTS, function(c) return decoder(c, { qkv_bias = c.attention_bias, o_bias = c.attention_bias }) end },
  mistral = { COUNTS, function(c) return decoder(c, {}) end },
  qwen2 = { COUNTS, function(c) return decoder(c, { qkv_bias = true }) end },
  qwen3 = { COUNTS, function(c)
    return decoder(c, { qkv_bias = c.attention_bias, o_bias = c.attention_bias, qk_norm = true })
  end },
  gpt2 = { { "n_embd", "n_head", "n_layer", "n_positions", "vocab_size" }, gpt2 },
}
local LAYERS_MAX = 1000

---The weights of a family that is known here; nil where it is none, or after a problem was noted.
---@param report qm.InspectionReport
---@param config table  of config.json
function M.weights(report, config)
  local family = FAMILIES[config.model_type]
  if not family then return nil end
  for _, key in ipairs(family[1]) do
    if not whole(config[key]) then
      return report:problem("config.json", "%s is %s, not a number from 1", key, tostring(config[key]))
    end
  end
  for _, key in ipairs({ "head_dim", "num_key_value_heads", "n_inner" }) do
    if config[key] ~= nil and not whole(config[key]) then
      return report:problem("config.json", "%s is %s, not a number from 1", key, tostring(config[key]))
    end
  end
  local layers = config.num_hidden_layers or config.n_layer
  if layers > LAYERS_MAX then return report:problem("config.json", "%d layers are more than %d", layers, LAYERS_MAX) end
  return family[2](config)
end

local function same(shape, a, b)
  return shape[1] == a and shape[2] == b and #shape == (b and 2 or 1)
end

local function check_dense(report, path, tensor, want)
  local a, b = want[2], want[1]
  if want.conv or want.table then a, b = want[1], want[2] end
  if not want[2] then a, b = want[1], nil end
  if not same(tensor.shape, a, b) then
    report:problem(tensor.file, "tensor '%s.weight' is [%s]; config.json wants [%s]", path,
      table.concat(tensor.shape, ", "), table.concat({ a, b }, ", "))
  end
end

---Compare the weights that are there with those that should be.
function M.compare(report, list)
  local quantized = {}
  for _, w in ipairs(report.weights) do if w.parts then quantized[w.name] = w end end
  local function find(path, part)
    local short = path:match("^%w+%.(.*)$") -- files of the model without its head leave the first word away
    return report.by_name[path .. part] or short and report.by_name[short .. part]
  end
  local missing, paths = 0, {}
  for path in pairs(list) do paths[#paths + 1] = path end
  table.sort(paths)
  for _, path in ipairs(paths) do
    local want, w, dense = list[path], quantized[path], find(path, ".weight")
    if dense then
      check_dense(report, path, dense, want)
    elseif w then
      if w.n and (w.n ~= want[2] and math.ceil(want[2] / 32) * 32 ~= w.n) or w.k and w.k ~= want[1] then
        report:problem((w.parts.qweight or w.parts.q_weight or w.parts.data).file,
          "'%s' (%s) is [%s, %s]; config.json wants [%d, %d]", path, w.format, w.k or "?", w.n or "?", want[1], want[2])
      end
    else
      missing = missing + 1
      if missing <= 10 then report:problem("config.json", "the weight '%s' that it needs is in no file", path) end
    end
    local bias = find(path, ".bias")
    if want.bias and not bias and (dense or w) then report:problem("config.json", "'%s' lacks its bias", path) end
    if bias and not same(bias.shape, want[2] or want[1]) then
      report:problem(bias.file, "tensor '%s.bias' is [%s]; config.json wants [%d]", path,
        table.concat(bias.shape, ", "), want[2] or want[1])
    end
  end
  if missing > 10 then report:problem("config.json", "and %d weights more that it needs", missing - 10) end
end

return M
