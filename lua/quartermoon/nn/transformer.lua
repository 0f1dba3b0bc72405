---The parts of a decoder: Attention, SwiGLU, Block. Activations are flat: one row for each token of all
---sequences, which the context tells apart.

local autograd = require("quartermoon.autograd")
local check = require("quartermoon.check")
local layers = require("quartermoon.nn.layers")
local module = require("quartermoon.nn.module")
local qm = require("quartermoon")

local M = {}

---What the layers need to know about their rows.
---@class qm.nn.Context
---@field cos qm.Tensor        rotation tables, see qm.rope_tables
---@field sin qm.Tensor
---@field positions qm.Tensor  i32 [R], each row's place in its sequence
---@field cu_q qm.Tensor       i32 [S+1], where each sequence's rows begin
---@field cu_k qm.Tensor       i32 [S+1], the same for keys; differs from cu_q only with a cache
---@field places qm.Tensor|nil i32 [R], the rows of the cache that these rows become
---@field window integer|nil   at most so many keys back

---------------------------------------------------------------------------------------------------

---Keys and values of one layer, kept while texts grow. Rows are written in place.
---@class qm.nn.KeyValues
---@field k qm.Tensor     [rows_max, heads, head_size]
---@field v qm.Tensor     the same
---@field length integer  rows filled by append without places
local KeyValues = {}
KeyValues.__index = KeyValues

---@param rows_max integer
function M.key_values(rows_max, heads, head_size, dtype, device)
  check.integer("qm.nn.key_values", "rows_max", rows_max, 0)
  check.integer("qm.nn.key_values", "heads", heads, 1)
  check.integer("qm.nn.key_values", "head_size", head_size, 1)
  local shape, options = { rows_max, heads, head_size }, { dtype = dtype, device = device }
  -- Zeros, for kernels read whole tiles: memory that holds NaN, times a weight of 0, is NaN.
  local self = setmetatable({ length = 0, k = qm.zeros(shape, options):keep(), v = qm.zeros(shape, options):keep() },
    KeyValues)
  local flat = { rows_max, heads * head_size }
  self.flat = { k = self.k:view_as("key_values", flat):keep(), v = self.v:view_as("key_values", flat):keep() }
  return self
end

---Add rows: at places, or behind those that are there.
---@param k qm.Tensor  [R, heads, head_size]
---@param v qm.Tensor  the same
---@param places qm.Tensor|nil  i32 [R], row numbers from 0
---@return qm.Tensor k, qm.Tensor v  with places all rows_max rows, else the rows so far; views
function KeyValues:append(k, v, places)
  check.desc("key_values:append", "k", k)
  check.desc("key_values:append", "v", v)
  if places then
    for name, fresh in pairs({ k = k, v = v }) do
      local rows = fresh:view_as("key_values:append", { fresh.shape[1] or 1, self.flat.k.shape[2] })
      qm.scatter(rows, places, self.flat[name])
      rows:free()
    end
    return self.k:share(), self.v:share()
  end
  local first, rows = self.length + 1, k.shape[1]
  for name, fresh in pairs({ k = k, v = v }) do
    local place = self[name]:view_rows("key_values", first, rows)
    place:copy(fresh)
    place:free()
  end
  self.length = self.length + rows
  return self.k:view_rows("key_values", 1, self.length), self.v:view_rows("key_values", 1, self.length)
end

function KeyValues:free()
  for _, tensor in ipairs({ self.flat.k, self.flat.v, self.k, self.v }) do tensor:free() end
end

check.methods("qm.nn.KeyValues", KeyValues)

---Raise unless `value` is what qm.nn.key_values makes.
function M.check_key_values(name, argument, value)
  return check.instance(name, argument, value, KeyValues, "qm.nn.KeyValues")
end

---------------------------------------------------------------------------------------------------

---Causal self-attention with rotary positions; several query heads may share one key head.
---@class qm.nn.Attention : qm.Module
local Attention = module.class("Attention")
M.Attention = Attention

---@param options table  { hidden_size, heads, kv_heads = heads, head_size = hidden_size / heads,
---   linear = a qm.nn.linear_factory, bias = false (of q, k, v), output_bias = false, qk_norm = false
---   (RMSNorm of every query and key head, as in Qwen 3), eps = 1e-6 (of qk_norm), window = the context's
---   (how many keys a query sees at most; 0: all), device, generator }
function Attention.new(options)
  local name = "qm.nn.Attention"
  options = check.options(name, options, { hidden_size = check.required, heads = check.required,
    kv_heads = check.optional, head_size = check.optional, linear = check.required, bias = false,
    output_bias = false, qk_norm = false, eps = 1e-6, window = check.optional, device = check.optional,
    generator = check.optional })
  local self = module.create(Attention)
  check.type(name, "linear", options.linear, "function")
  local hidden = check.integer(name, "hidden_size", options.hidden_size, 1)
  self.heads = check.integer(name, "heads", options.heads, 1)
  self.kv_heads = check.integer(name, "kv_heads", options.kv_heads or self.heads, 1)
  self.head_size = check.integer(name, "head_size", options.head_size or hidden / self.heads, 2)
  if self.heads % self.kv_heads ~= 0 then
    check.fail(name, "kv_heads", "a divisor of heads=" .. self.heads, self.kv_heads)
  end
  if options.window then self.window = check.integer(name, "window", options.window, 0) end
  local more = { device = options.device, generator = options.generator, bias = options.output_bias }
  local biased = { device = options.device, generator = options.generator, bias = options.bias }
  self:register("q_proj", options.linear(hidden, self.heads * self.head_size, biased))
  self:register("k_proj", options.linear(hidden, self.kv_heads * self.head_size, biased))
  self:register("v_proj", options.linear(hidden, self.kv_heads * self.head_size, biased))
  self:register("o_proj", options.linear(self.heads * self.head_size, hidden, more))
  if options.qk_norm then
    for _, norm in ipairs({ "q_norm", "k_norm" }) do
      self:register(norm, layers.RMSNorm.new(self.head_size, { eps = options.eps, device = options.device }))
    end
  end
  return self
end

---Rows of `heads` vectors, normalised where the layer has a norm for them.
function Attention:split(x, heads, norm)
  check.desc("attention:split", "x", x)
  check.integer("attention:split", "heads", heads, 1)
  if norm then x = norm(x:reshape(x.shape[1] * heads, self.head_size)) end
  return x:reshape(x:count() / (heads * self.head_size), heads, self.head_size)
end

---@param x qm.Tensor  float [R, hidden_size]
---@param context qm.nn.Context
---@param kept qm.nn.KeyValues|nil  earlier keys and values, for generation
---@return qm.Tensor   [R, hidden_size]
function Attention:forward(x, context, kept)
  check.type("attention", "context", context, "table")
  if kept then M.check_key_values("attention", "kept", kept) end
  local q, k, v = layers.together(x, self.q_proj, self.k_proj, self.v_proj)
  q = self:split(q, self.heads, self.q_norm)
  k = self:split(k, self.kv_heads, self.k_norm)
  v = self:split(v, self.kv_heads)
  if kept and context.places then
    q = qm.rope_append(q, k, v, context.cos, context.sin, context.positions, context.places, kept.k, kept.v)
    k, v = kept.k, kept.v
  else
    q = qm.rope(q, context.cos, context.sin, context.positions)
    k = qm.rope(k, context.cos, context.sin, context.positions)
    if kept then k, v = kept:append(k, v) end
  end
  local out = qm.attention(q, k, v, context.cu_q, context.cu_k, { window = self.window or context.window })
  return self.o_proj(out:reshape(x.shape[1], self.heads * self.head_size))
end

function Attention:summary()
  return ("%d heads of %d%s%s"):format(self.heads, self.head_size,
    self.kv_heads ~= self.heads and ", " .. self.kv_heads .. " key heads" or "", self.q_norm and ", qk_norm" or "")
end

---------------------------------------------------------------------------------------------------

---The gated feed-forward layer, `down(silu(gate(x)) * up(x))`. Source: arXiv 2002.05202.
---@class qm.nn.SwiGLU : qm.Module
local SwiGLU = module.class("SwiGLU")
M.SwiGLU = SwiGLU

---@param options table  { hidden_size, intermediate_size, linear = a qm.nn.linear_factory, bias = false,
---   recompute = false (true: the product of gate and up is made again in backward), device, generator }
function SwiGLU.new(options)
  local name = "qm.nn.SwiGLU"
  options = check.options(name, options, { hidden_size = check.required, intermediate_size = check.required,
    linear = check.required, bias = false, recompute = false, device = check.optional, generator = check.optional })
  local self = module.create(SwiGLU)
  self.recompute = check.type(name, "recompute", options.recompute, "boolean")
  check.type(name, "linear", options.linear, "function")
  local hidden, inner = options.hidden_size, options.intermediate_size
  local more = { bias = options.bias, device = options.device, generator = options.generator }
  self:register("gate_proj", options.linear(hidden, inner, more))
  self:register("up_proj", options.linear(hidden, inner, more))
  self:register("down_proj", options.linear(inner, hidden, more))
  return self
end

---@param x qm.Tensor  float [R, hidden_size]
---@return qm.Tensor   the same
function SwiGLU:forward(x)
  local gate, up = layers.together(x, self.gate_proj, self.up_proj)
  local inner = qm.swiglu(gate, up)
  local out = self.down_proj(inner)
  if self.recompute then autograd.forget(inner, qm.swiglu, gate, up) end
  return out
end

---------------------------------------------------------------------------------------------------

---One pre-norm decoder layer. Adding to the residual stream is left to the next normalisation, which
---does both in one pass over memory.
---@class qm.nn.Block : qm.Module
local Block = module.class("Block")
M.Block = Block

---@param options table  { attention = Attention's options, mlp = SwiGLU's options, hidden_size, eps = 1e-6,
---   device }
function Block.new(options)
  options = check.options("qm.nn.Block", options, { attention = check.required, mlp = check.required,
    hidden_size = check.required, eps = 1e-6, device = check.optional })
  local self = module.create(Block)
  local norm = { eps = options.eps, device = options.device }
  self:register("self_attn", Attention.new(options.attention))
  self:register("mlp", SwiGLU.new(options.mlp))
  self:register("input_layernorm", layers.RMSNorm.new(options.hidden_size, norm))
  self:register("post_attention_layernorm", layers.RMSNorm.new(options.hidden_size, norm))
  return self
end

---@param x qm.Tensor  float [R, hidden_size]: what the layer before adds to the stream
---@param residual qm.Tensor|nil  the stream before that; nil: x is the stream
---@param context qm.nn.Context
---@param kept qm.nn.KeyValues|nil
---@return qm.Tensor x, qm.Tensor residual  for the next layer, or the last norm
function Block:forward(x, residual, context, kept)
  local normed, stream = self.input_layernorm(x, residual)
  normed, stream = self.post_attention_layernorm(self.self_attn(normed, context, kept), stream)
  return self.mlp(normed), stream
end

return M
