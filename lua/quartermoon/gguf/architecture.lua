---llama.cpp's names for our models: which of its architectures computes the same, its keys, its tensors.
---
---Source: llama.cpp, src/models/llama.cpp, qwen2.cpp, qwen3.cpp and gpt2.cpp, and its converters of Hugging
---Face's folders.

local raise = require("quartermoon.ffi").raise
local rope_scaling = require("quartermoon.rope_scaling")

local M = {}

local LLAMA = {
  ["model.embed_tokens"] = "token_embd", ["model.norm"] = "output_norm", lm_head = "output",
  input_layernorm = "attn_norm", ["self_attn.q_proj"] = "attn_q", ["self_attn.k_proj"] = "attn_k",
  ["self_attn.v_proj"] = "attn_v", ["self_attn.o_proj"] = "attn_output", ["self_attn.q_norm"] = "attn_q_norm",
  ["self_attn.k_norm"] = "attn_k_norm", post_attention_layernorm = "ffn_norm", ["mlp.gate_proj"] = "ffn_gate",
  ["mlp.up_proj"] = "ffn_up", ["mlp.down_proj"] = "ffn_down",
}
local GPT2 = {
  ["transformer.wte"] = "token_embd", ["transformer.wpe"] = "position_embd", ["transformer.ln_f"] = "output_norm",
  lm_head = "output", ln_1 = "attn_norm", ["attn.c_attn"] = "attn_qkv", ["attn.c_proj"] = "attn_output",
  ln_2 = "ffn_norm", ["mlp.c_fc"] = "ffn_up", ["mlp.c_proj"] = "ffn_down",
}

---@class qm.gguf.Architecture
---@field name string
---@field keys table[]      { key, type, value } under the architecture's name
---@field notes string[]    what is other in llama.cpp
---@field extra table[]     tensors that we have no parameters for: { name, numbers }
---@field names table       of layers
---@field heads table<string, integer>  tensors whose rows llama.cpp has in another order, and the heads in them

---Llama's rotation turns neighbours in llama.cpp, halves of a head here: row 2 i + j of a head is ours
---j D / 2 + i. The other architectures turn halves there too.
local function llama_like(name, c)
  if c.qk_norm and (c.attention_bias or c.output_bias or c.mlp_bias or c.rope_scaling
      and c.rope_scaling.rope_type == "llama3") then
    raise(name .. ": llama.cpp's 'qwen3', which alone has qk_norm, has no biases and no rope_scaling of type 'llama3'")
  end
  local is_qwen2 = c.attention_bias and not c.output_bias and not c.mlp_bias
    and c.head_dim * c.num_attention_heads == c.hidden_size
    and not (c.rope_scaling and c.rope_scaling.rope_type == "llama3")
  local self = { name = c.qk_norm and "qwen3" or is_qwen2 and "qwen2" or "llama", names = LLAMA, extra = {}, notes = {},
    heads = {} }
  if self.name == "llama" then self.heads = { attn_q = c.num_attention_heads, attn_k = c.num_key_value_heads } end
  local positions, has_window = c.max_position_embeddings, c.sliding_window > 0 and not c.layer_types
  for _, kind in ipairs(c.layer_types or {}) do has_window = has_window or kind == "sliding_attention" end
  if has_window and c.sliding_window < positions then
    positions = c.sliding_window
    self.notes[1] = ("context_length is %d, the window of sliding_attention, for llama.cpp's '%s' has no window")
      :format(positions, self.name)
  end
  self.keys = {
    { "block_count", "u32", c.num_hidden_layers }, { "context_length", "u32", positions },
    { "embedding_length", "u32", c.hidden_size }, { "feed_forward_length", "u32", c.intermediate_size },
    { "attention.head_count", "u32", c.num_attention_heads },
    { "attention.head_count_kv", "u32", c.num_key_value_heads }, { "attention.key_length", "u32", c.head_dim },
    { "attention.value_length", "u32", c.head_dim }, { "attention.layer_norm_rms_epsilon", "f32", c.rms_norm_eps },
    { "rope.dimension_count", "u32", c.head_dim }, { "rope.freq_base", "f32", c.rope_theta },
    { "vocab_size", "u32", c.vocab_size },
  }
  local scaling = c.rope_scaling
  if scaling and scaling.rope_type == "linear" then
    self.keys[#self.keys + 1] = { "rope.scaling.type", "string", "linear" }
    self.keys[#self.keys + 1] = { "rope.scaling.factor", "f32", scaling.factor }
  elseif scaling then -- what each pair's frequency is divided by
    local factors = {}
    for i = 0, c.head_dim / 2 - 1 do
      local frequency = c.rope_theta ^ (-2 * i / c.head_dim)
      factors[i + 1] = frequency / rope_scaling.stretch(frequency, scaling)
    end
    self.extra[1] = { "rope_freqs.weight", factors }
  end
  return self
end

local function gpt2_like(name, c)
  local function refuse(key, only)
    raise(("%s: %s is %s; llama.cpp's 'gpt2' has only %s"):format(name, key, tostring(c[key]), only))
  end
  if c.activation_function == "gelu" then refuse("activation_function", "GELU's tanh form") end
  if not c.scale_attn_weights then refuse("scale_attn_weights", "true") end
  if c.scale_attn_by_inverse_layer_idx then refuse("scale_attn_by_inverse_layer_idx", "false") end
  return { name = "gpt2", names = GPT2, extra = {}, notes = {}, heads = {}, keys = {
    { "block_count", "u32", c.n_layer }, { "context_length", "u32", c.n_positions },
    { "embedding_length", "u32", c.n_embd }, { "feed_forward_length", "u32", c.n_inner },
    { "attention.head_count", "u32", c.n_head }, { "attention.layer_norm_epsilon", "f32", c.layer_norm_epsilon },
    { "vocab_size", "u32", c.vocab_size },
  } }
end

---The architecture of a model.
---@param name string  whose errors these are
---@param model qm.models.Decoder
---@return qm.gguf.Architecture
---@raise where llama.cpp has none that computes the same
function M.of(name, model)
  return (model.class_name == "GPT2" and gpt2_like or llama_like)(name, model.config)
end

---A parameter's name there.
---@param path string   of the layer, as published
---@param part string   "weight" or "bias"
---@return string name
---@return integer|nil heads  whose rows change places
function M.tensor_name(name, architecture, path, part)
  local block, rest = path:match("^%a+%.%a+%.(%d+)%.(.*)$")
  local base = architecture.names[rest or path]
  if not base then raise(("%s: llama.cpp has no name for '%s.%s'"):format(name, path, part)) end
  return (block and "blk." .. block .. "." or "") .. base .. "." .. part, architecture.heads[base]
end

return M
