-- Calls that are right, for the fuzzer to spoil: every entry makes a function's arguments anew.
-- A path "x:name" is a method of the first argument.
return function(qm, device)
  local function randn(...) return qm.randn({ ... }, { device = device }) end
  local function leaf(...) return qm.randn({ ... }, { device = device, requires_grad = true }) end
  local function half(...) return randn(...):to("bf16") end
  local function ints(list) return qm.tensor(list, { dtype = "i32", device = device }) end
  local function quantized(options) return qm.QParam.quantize(randn(64, 32), options or { group_size = 32 }) end
  local function trained(options)
    local q = quantized(options)
    q.requires_grad, q.privileged_grad = true, randn(64, 32)
    return q
  end
  local config = { vocab_size = 11, hidden_size = 8, intermediate_size = 16, num_hidden_layers = 1,
    num_attention_heads = 2, num_key_value_heads = 1 }
  local function model(kind) return qm.models.llama.new(config, { linear = { kind = kind or "dense" } }) end
  local function copied()
    local copy = {}
    for key, value in pairs(config) do copy[key] = value end
    return copy
  end

  return {
    { "qm.add", function() return leaf(3, 5), randn(5) end },
    { "qm.div", function() return half(3, 1, 5), half(4, 1) end },
    { "qm.maximum", function() return randn(2, 3), 0.5 end },
    { "qm.pow", function() return leaf(3, 5), 2 end },
    { "qm.clamp", function() return leaf(3, 5), -1, 1 end },
    { "qm.cast", function() return leaf(3, 5), "bf16" end },
    { "x:add_", function() return randn(3, 5), randn(3, 5), 0.5 end },
    { "x:mul_", function() return randn(3, 5), 2 end },
    { "x:copy", function() return randn(3, 5), half(3, 5) end },
    { "x:sum", function() return leaf(3, 5, 7), 2 end },
    { "x:max", function() return leaf(3, 5), 1 end },
    { "x:argmax", function() return randn(3, 5), 2 end },
    { "x:at", function() return randn(3, 5), 2, 4 end },
    { "x:to", function() return randn(3, 5), "f16" end },
    { "qm.softmax", function() return leaf(3, 5) end },
    { "qm.sum_squares", function() return randn(3, 500) end },
    { "qm.sum_squares", function() return { leaf(3, 50), half(7), randn(0) }, randn() end },
    { "qm.reshape", function() return leaf(4, 6), 3, 8 end },
    { "qm.narrow", function() return leaf(4, 6), 2, 2 end },
    { "qm.permute", function() return leaf(2, 3, 4), 3, 1, 2 end },
    { "qm.transpose", function() return leaf(2, 3, 4), 1, 3 end },
    { "qm.concat", function() return { leaf(2, 3), randn(4, 3) } end },
    { "qm.gather", function() return leaf(5, 3), ints({ 0, 4, 2 }) end },
    { "qm.scatter", function() return randn(3, 4), ints({ 0, 4, 2 }), randn(5, 4) end },
    { "qm.embedding", function() return leaf(5, 3), ints({ 0, 4, 2 }), { dtype = "bf16" } end },
    { "qm.matmul", function() return leaf(4, 6), randn(4, 5), { trans_a = true, trans_b = false } end },
    { "qm.matmul", function() return half(2, 4, 6), half(2, 6, 5) end },
    { "qm.linear", function() return leaf(4, 6), leaf(6, 5), leaf(5) end },
    { "qm.gelu_mlp", function() return leaf(4, 6), leaf(6, 8), leaf(8), leaf(8, 5), leaf(5), { recompute = true } end },
    { "qm.svd", function() return randn(6, 4) end },
    { "qm.qr", function() return randn(6, 4) end },
    { "qm.cholesky_inverse", function() return qm.ones({ 4, 4 }, { device = device }), 0.5 end },
    { "qm.rms_norm", function() return leaf(3, 16), leaf(16), 1e-5 end },
    { "qm.add_rms_norm", function() return leaf(3, 16), randn(3, 16), leaf(16), 1e-5 end },
    { "qm.layer_norm", function() return leaf(3, 16), leaf(16), leaf(16), 1e-5 end },
    { "qm.add_layer_norm", function() return leaf(3, 16), randn(3, 16), leaf(16), leaf(16), 1e-5 end },
    { "qm.rope_tables", function() return 8, 16, 10000 end },
    { "qm.rope_append", function()
      return randn(2, 4, 8), randn(2, 2, 8), randn(2, 2, 8), randn(16, 4), randn(16, 4), ints({ 0, 15 }),
        ints({ 2, 0 }), randn(3, 2, 8), randn(3, 2, 8)
    end },
    { "qm.rope", function() return leaf(3, 2, 8), randn(16, 4), randn(16, 4), ints({ 0, 15, 3 }) end },
    { "qm.swiglu", function() return leaf(3, 5), leaf(3, 5) end },
    { "qm.attention", function()
      return leaf(7, 4, 8), leaf(7, 2, 8), leaf(7, 2, 8), ints({ 0, 3, 7 }), ints({ 0, 3, 7 }),
        { causal = true, window = 2, scale = 0.3 }
    end },
    { "qm.attention", function()
      return half(70, 4, 32), half(70, 2, 32), half(70, 2, 32), ints({ 0, 30, 70 }), ints({ 0, 30, 70 })
    end },
    { "qm.cross_entropy", function() return leaf(3, 11), ints({ 0, 10, -100 }), { ignore_index = -100 } end },
    { "qm.linear_cross_entropy", function()
      return leaf(5, 8), leaf(8, 11), ints({ 0, 10, 1, 2, 3 }), { chunk_rows = 2, ignore_index = 1 }
    end },
    { "qm.adamw", function()
      return randn(3, 5), randn(3, 5), randn(3, 5), qm.ones({ 3, 5 }, { device = device }), { lr = 0.1, step = 1 }
    end },
    { "qm.adamw", function()
      return { { param = randn(3, 5), grad = half(3, 5), exp_avg = randn(3, 5), exp_avg_sq = qm.ones({ 3, 5 },
        { device = device }), options = { lr = 0.1, step = 1 } } }
    end },
    { "qm.grad_scale", function()
      return randn():abs(), randn(), randn(), qm.zeros({}, { dtype = "i64", device = device }), { max_norm = 1 }
    end },
    { "qm.QParam.quantize", function()
      return randn(64, 32), { w_bit = 4, group_size = 32, asym = true, method = "minmax", range = 1 }
    end },
    { "qm.QParam.quantize", function() return randn(64, 32), { w_bit = 2, group_size = 64, method = "mse" } end },
    { "qm.QParam.new", function()
      local q = quantized()
      return { data = q.data, scales = q.scales, zeros = q.zeros, w_bit = q.w_bit, group_size = q.group_size,
        asym = q.asym }
    end },
    { "x:dequantize", function() return quantized(), "bf16" end },
    { "x:pack", function()
      return quantized(), randn(64, 32), { rounding = "stochastic", noise = { seed = 1, step = 2 } }
    end },
    { "x:add_residual", function() return quantized(), 8 end },
    { "x:fit", function() return quantized(), randn(64, 32), "mse", 1 end },
    { "x:unpack", function() return quantized({ w_bit = 1, group_size = 32, asym = false }) end },
    { "qm.QParam.update", function()
      return trained(), { step = 3, lr = 0.01, exp_avg_l = randn(64, 32), exp_avg_s = qm.ones({ 64, 32 },
        { device = device }), feedback = "momentum", weight_decay = 0.1, beta1 = 0.9, seed = 1 }
    end },
    { "qm.QParam.update", function()
      return trained(), { step = 4, lr = 0.01, mode = "bie", exp_avg_l = randn(64, 32),
        exp_avg_s = qm.ones({ 64, 32 }, { device = device }) }
    end },
    { "qm.qlinear", function() return leaf(5, 64), trained(), leaf(32) end },
    { "qm.qlinear_group", function() return randn(2, 64), { trained(), trained() }, { [2] = randn(32) } end },
    { "qm.qlinear", function() return half(3, 64), trained({ w_bit = 8, group_size = 32 }) end },
    { "qm.checkpoint", function() return function(x) return x:tanh() end, leaf(3, 5) end },
    { "qm.scope", function() return function() return randn(3):tanh() end end },
    { "qm.models.llama.new", function() return copied(), { linear = { kind = "dense" } } end },
    { "x:loss", function() return model(), ints({ 1, 2, 3, 4 }), ints({ 2, 3, 4, 5 }), ints({ 0, 2, 4 }) end },
    { "x:logits", function() return model(), ints({ 1, 2, 3 }), ints({ 0, 3 }) end },
    { "qm.optim.new", function()
      return model(), { lr = 0.01, weight_decay = 0.1, betas = { 0.9, 0.99 }, moments = "bf16" }
    end },
    { "qm.schedule.cosine", function() return 1, 10, 0.1 end },
    { "qm.tokenizer.train_bpe", function() return ("the cat sat on the mat "):rep(20), { vocab_size = 270 } end },
    { "qm.tensor", function() return { { 1, 2 }, { 3, 4 } }, { dtype = "i32", device = device } end },
    { "qm.arange", function() return 0, 10, { dtype = "f16" }, 2 end },
    { "qm.safetensors.save", function() return "fuzz.safetensors", { a = randn(3), b = half(2, 2) }, { k = "v" } end },
    { "qm.safetensors.open", function() return "fuzz.safetensors" end },
    { "qm.projector.galore", function() return { rank = 4, proj_type = "std", update_proj_gap = 2 } end },
  }
end
