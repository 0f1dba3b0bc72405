---The families of models that Hugging Face folders hold, as data: what their configuration classes in
---transformers default to, and in which ways each differs from Llama.

local M = {}

---Each: `kind` is the class here; `attention_bias` (of q, k, v), `output_bias`, `mlp_bias` and `qk_norm` are
---true, false or the key that says so; `window`: true (sliding_window says it), or the key that turns it on;
---`window_from`: whether only layers from max_window_layers on have it; `layer_types`: whether that key holds.
M.list = {
  llama = {
    kind = "llama", architecture = "LlamaForCausalLM",
    attention_bias = "attention_bias", output_bias = "attention_bias", mlp_bias = "mlp_bias",
    defaults = { vocab_size = 32000, hidden_size = 4096, intermediate_size = 11008, num_hidden_layers = 32,
      num_attention_heads = 32, max_position_embeddings = 2048, rope_theta = 10000 },
  },
  mistral = {
    kind = "llama", architecture = "MistralForCausalLM", window = true,
    defaults = { vocab_size = 32000, hidden_size = 4096, intermediate_size = 14336, num_hidden_layers = 32,
      num_attention_heads = 32, num_key_value_heads = 8, max_position_embeddings = 131072, rope_theta = 10000,
      sliding_window = 4096 },
  },
  qwen2 = {
    kind = "llama", architecture = "Qwen2ForCausalLM", attention_bias = true,
    window = "use_sliding_window", window_from = true, layer_types = true,
    defaults = { vocab_size = 151936, hidden_size = 4096, intermediate_size = 22016, num_hidden_layers = 32,
      num_attention_heads = 32, num_key_value_heads = 32, max_position_embeddings = 32768, rope_theta = 10000,
      sliding_window = 4096, max_window_layers = 28 },
  },
  qwen3 = {
    kind = "llama", architecture = "Qwen3ForCausalLM", qk_norm = true,
    attention_bias = "attention_bias", output_bias = "attention_bias",
    window = "use_sliding_window", window_from = true, layer_types = true,
    defaults = { vocab_size = 151936, hidden_size = 4096, intermediate_size = 22016, num_hidden_layers = 32,
      num_attention_heads = 32, num_key_value_heads = 32, head_dim = 128, max_position_embeddings = 32768,
      rope_theta = 10000, sliding_window = 4096, max_window_layers = 28 },
  },
  gpt2 = {
    kind = "gpt2", architecture = "GPT2LMHeadModel",
    defaults = { vocab_size = 50257, n_embd = 768, n_layer = 12, n_head = 12, n_positions = 1024 },
  },
}

M.names = {}
for name in pairs(M.list) do M.names[#M.names + 1] = name end
table.sort(M.names)

---The family that a model of ours would be published as: the first that can say all of its configuration.
---@param kind string    "llama" or "gpt2"
---@param config table   the model's
function M.of(kind, config)
  if kind == "gpt2" then return "gpt2" end
  if config.qk_norm then return "qwen3" end
  if config.attention_bias and not config.output_bias then return "qwen2" end
  return config.sliding_window > 0 and "mistral" or "llama"
end

return M
