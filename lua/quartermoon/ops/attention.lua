---Attention over packed sequences: forward (one kernel call) next to backward.

local ffi = require("ffi")
local binding = require("quartermoon.ffi")
local check = require("quartermoon.check")
local record = require("quartermoon.autograd").record
local tensors = require("quartermoon.tensor")
local lib = binding.lib

local M = {}

---The options of both forms as the ABI wants them.
local function settings_of(name, options, head_size)
  options = check.options(name, options, { causal = true, scale = check.optional, window = 0 })
  check.type(name, "causal", options.causal, "boolean")
  check.integer(name, "window", options.window, 0, 2 ^ 31 - 1)
  local scale = check.number(name, "scale", options.scale or 1 / math.sqrt(head_size or 1))
  return ffi.new("qm_attention_options", scale, options.causal and 1 or 0, options.window)
end

---`softmax(scale q k^T) v` for each sequence and head, without ever holding a T x T matrix.
---
---Rows are the tokens of all sequences, one after the other. Heads may be grouped: query head h reads
---key head floor(h HK / H), from 0. A query that sees no key gives 0.
---
---Source: Dao, FlashAttention-2, arXiv 2307.08691; grouped heads: arXiv 2305.13245.
---
---@param q qm.Tensor     float [RQ, H, D]
---@param k qm.Tensor     q's type [RK, HK, D], HK divides H
---@param v qm.Tensor     like k
---@param cu_q qm.Tensor  i32 [S+1]: sequence s holds query rows cu_q[s] up to cu_q[s+1] - 1, all from 0
---@param cu_k qm.Tensor  i32 [S+1]: the same for key rows; may be longer (decoding with a cache)
---@param options table|nil  { causal = true, scale = 1 / sqrt(D), window = 0 }: with `causal` a
---   sequence's last query sees up to its last key, the one before up to the key before; a `window`
---   above 0 limits each query to so many keys back from there, that one included
---@return qm.Tensor      q's type and shape
---@raise when types, shapes, devices or the offsets do not fit
function M.attention(q, k, v, cu_q, cu_k, options)
  local name = "qm.attention"
  local q_desc, k_desc, v_desc = check.desc(name, "q", q), check.desc(name, "k", k), check.desc(name, "v", v)
  local cu_q_desc, cu_k_desc = check.desc(name, "cu_q", cu_q), check.desc(name, "cu_k", cu_k)
  local settings = settings_of(name, options, q.shape[3])
  local out = q:empty_like()
  local lse = tensors.empty({ q.shape[1] or 1, q.shape[2] or 1 }, { device = q.device })
  binding.check(lib.qm_attention(q_desc, k_desc, v_desc, cu_q_desc, cu_k_desc, out.desc, lse.desc, settings), name,
    out, lse)
  return record("attention", { q, k, v }, { out }, { lse }, function(dout)
    local dq, dk, dv = q:empty_like(), k:empty_like(), v:empty_like()
    binding.check(lib.qm_attention_backward(dout.desc, q.desc, k.desc, v.desc, out.desc, lse.desc, cu_q.desc,
      cu_k.desc, dq.desc, dk.desc, dv.desc, settings), name)
    return dq, dk, dv
  end)
end

---The same for queries, keys and values that one projection made, where they lie: no copies, and the
---projection's gradient comes as one tensor.
---
---@param qkv qm.Tensor     float [R, H + 2 HK, D]: in every row the heads of q, then of k, then of v
---@param cu qm.Tensor      i32 [S+1]: sequence s holds rows cu[s] up to cu[s+1] - 1, all from 0
---@param heads integer     H, of queries
---@param options table|nil as for qm.attention
---@return qm.Tensor        qkv's type, [R, H, D]
---@raise when types, shapes, devices or the offsets do not fit
function M.attention_packed(qkv, cu, heads, options)
  local name = "qm.attention_packed"
  local qkv_desc, cu_desc = check.desc(name, "qkv", qkv), check.desc(name, "cu", cu)
  check.integer(name, "heads", heads, 1)
  local settings = settings_of(name, options, qkv.shape[3])
  local rows = qkv.shape[1] or 1
  local out = tensors.empty({ rows, heads, qkv.shape[3] or 1 }, { dtype = qkv.dtype, device = qkv.device })
  local lse = tensors.empty({ rows, heads }, { device = qkv.device })
  binding.check(lib.qm_attention_packed(qkv_desc, cu_desc, out.desc, lse.desc, settings), name, out, lse)
  return record("attention_packed", { qkv }, { out }, { lse }, function(dout)
    local dqkv = qkv:empty_like()
    binding.check(lib.qm_attention_packed_backward(dout.desc, qkv.desc, out.desc, lse.desc, cu.desc, dqkv.desc,
      settings), name)
    return dqkv
  end)
end

return M
