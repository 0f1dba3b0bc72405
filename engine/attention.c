/* attention.c - softmax attention over packed sequences: operands checked, then dispatched.
** The offsets' values lie in device memory, so the kernels check those. */
#include <math.h>

#include "internal.h"

static void require_options(qm__call *call, const qm_attention_options *options) {
  qm__require(call, options != NULL, "argument 'options': expected options, got nothing");
  if (call->status != QM_OK) return;
  const int64_t heads = qm__size(call, "H"), kv_heads = qm__size(call, "HK");
  qm__require(call, kv_heads > 0 && heads % kv_heads == 0,
              "argument 'k': expected HK to divide H=%lld, got HK=%lld", (long long)heads,
              (long long)kv_heads);
  qm__require(call, qm__size(call, "D") > 0, "argument 'q': expected D to be at least 1, got 0");
  qm__require(call, qm__size(call, "S+1") > 0,
              "argument 'cu_q': expected S+1 to be at least 1, got 0");
  qm__require(call, isfinite(options->scale), "argument 'scale': expected a finite number, got %g",
              options->scale);
  qm__require(call, options->window >= 0, "argument 'window': expected at least 0, got %d",
              options->window);
}

int32_t qm_attention(const qm_tensor *q, const qm_tensor *k, const qm_tensor *v,
                     const qm_tensor *cu_q, const qm_tensor *cu_k, const qm_tensor *out,
                     const qm_tensor *lse, const qm_attention_options *options) {
  qm__call call = qm__begin("qm_attention");
  qm_attention_args args;
  qm__operand(&call, "q", q, "float [RQ, H, D]", QM__READ, &args.q);
  qm__operand(&call, "k", k, "=q [RK, HK, D]", QM__READ, &args.k);
  qm__operand(&call, "v", v, "=q [RK, HK, D]", QM__READ, &args.v);
  qm__operand(&call, "cu_q", cu_q, "i32 [S+1]", QM__READ, &args.cu_q);
  qm__operand(&call, "cu_k", cu_k, "i32 [S+1]", QM__READ, &args.cu_k);
  qm__operand(&call, "out", out, "=q [RQ, H, D]", QM__WRITE, &args.out);
  qm__operand(&call, "lse", lse, "f32 [RQ, H]", QM__WRITE, &args.lse);
  require_options(&call, options);
  if (call.status != QM_OK) return call.status;
  args.sequences = qm__size(&call, "S+1") - 1;
  args.heads = qm__size(&call, "H");
  args.kv_heads = qm__size(&call, "HK");
  args.head_size = qm__size(&call, "D");
  args.rows_q = qm__size(&call, "RQ");
  args.rows_k = qm__size(&call, "RK");
  args.stride_q = args.heads * args.head_size;
  args.stride_k = args.stride_v = args.kv_heads * args.head_size;
  args.options = *options;
  return QM__DISPATCH(call, attention, &args);
}

int32_t qm_attention_backward(const qm_tensor *dout, const qm_tensor *q, const qm_tensor *k,
                              const qm_tensor *v, const qm_tensor *out, const qm_tensor *lse,
                              const qm_tensor *cu_q, const qm_tensor *cu_k, const qm_tensor *dq,
                              const qm_tensor *dk, const qm_tensor *dv,
                              const qm_attention_options *options) {
  qm__call call = qm__begin("qm_attention_backward");
  qm_attention_backward_args args;
  qm__operand(&call, "q", q, "float [RQ, H, D]", QM__READ, &args.q);
  qm__operand(&call, "dout", dout, "=q [RQ, H, D]", QM__READ, &args.dout);
  qm__operand(&call, "k", k, "=q [RK, HK, D]", QM__READ, &args.k);
  qm__operand(&call, "v", v, "=q [RK, HK, D]", QM__READ, &args.v);
  qm__operand(&call, "out", out, "=q [RQ, H, D]", QM__READ, &args.out);
  qm__operand(&call, "lse", lse, "f32 [RQ, H]", QM__READ, &args.lse);
  qm__operand(&call, "cu_q", cu_q, "i32 [S+1]", QM__READ, &args.cu_q);
  qm__operand(&call, "cu_k", cu_k, "i32 [S+1]", QM__READ, &args.cu_k);
  qm__operand(&call, "dq", dq, "=q [RQ, H, D]", QM__WRITE, &args.dq);
  qm__operand(&call, "dk", dk, "=q [RK, HK, D]", QM__WRITE, &args.dk);
  qm__operand(&call, "dv", dv, "=q [RK, HK, D]", QM__WRITE, &args.dv);
  require_options(&call, options);
  if (call.status != QM_OK) return call.status;
  args.sequences = qm__size(&call, "S+1") - 1;
  args.heads = qm__size(&call, "H");
  args.kv_heads = qm__size(&call, "HK");
  args.head_size = qm__size(&call, "D");
  args.rows_q = qm__size(&call, "RQ");
  args.rows_k = qm__size(&call, "RK");
  args.stride_q = args.heads * args.head_size;
  args.stride_k = args.stride_v = args.kv_heads * args.head_size;
  args.options = *options;
  return QM__DISPATCH(call, attention_backward, &args);
}

/* H and HK of qkv [R, H + 2 HK, D], from out's or dout's [R, H, D]. */
static int64_t packed_kv_heads(qm__call *call) {
  const int64_t heads = qm__size(call, "H"), all = qm__size(call, "H+2HK");
  qm__require(call, all > heads && (all - heads) % 2 == 0,
              "argument 'qkv': expected H + 2 HK heads with H=%lld, got %lld", (long long)heads,
              (long long)all);
  qm__bind(call, "HK", (all - heads) / 2);
  return (all - heads) / 2;
}

/* The heads first .. first + heads - 1 of every row of a fused projection. */
static qm_array slice(const qm_array *qkv, int64_t first, int64_t heads) {
  qm_array out = *qkv;
  const int64_t rows = qkv->shape[0], size = qkv->shape[2];
  if (out.data != NULL) out.data = (char *)out.data + first * size * qm_dtype_size(qkv->dtype);
  out.shape[1] = heads;
  out.count = rows * heads * size;
  return out;
}

int32_t qm_attention_packed(const qm_tensor *qkv, const qm_tensor *cu, const qm_tensor *out,
                            const qm_tensor *lse, const qm_attention_options *options) {
  qm__call call = qm__begin("qm_attention_packed");
  qm_attention_args args;
  qm_array all;
  qm__operand(&call, "qkv", qkv, "float [R, H+2HK, D]", QM__READ, &all);
  qm__operand(&call, "cu", cu, "i32 [S+1]", QM__READ, &args.cu_q);
  qm__operand(&call, "out", out, "=qkv [R, H, D]", QM__WRITE, &args.out);
  qm__operand(&call, "lse", lse, "f32 [R, H]", QM__WRITE, &args.lse);
  const int64_t kv_heads = packed_kv_heads(&call);
  require_options(&call, options);
  if (call.status != QM_OK) return call.status;
  args.sequences = qm__size(&call, "S+1") - 1;
  args.heads = qm__size(&call, "H");
  args.kv_heads = kv_heads;
  args.head_size = qm__size(&call, "D");
  args.rows_q = args.rows_k = qm__size(&call, "R");
  args.q = slice(&all, 0, args.heads);
  args.k = slice(&all, args.heads, kv_heads);
  args.v = slice(&all, args.heads + kv_heads, kv_heads);
  args.cu_k = args.cu_q;
  args.stride_q = args.stride_k = args.stride_v = (args.heads + 2 * kv_heads) * args.head_size;
  args.options = *options;
  return QM__DISPATCH(call, attention, &args);
}

int32_t qm_attention_packed_backward(const qm_tensor *dout, const qm_tensor *qkv,
                                     const qm_tensor *out, const qm_tensor *lse,
                                     const qm_tensor *cu, const qm_tensor *dqkv,
                                     const qm_attention_options *options) {
  qm__call call = qm__begin("qm_attention_packed_backward");
  qm_attention_backward_args args;
  qm_array all, dall;
  qm__operand(&call, "qkv", qkv, "float [R, H+2HK, D]", QM__READ, &all);
  qm__operand(&call, "dout", dout, "=qkv [R, H, D]", QM__READ, &args.dout);
  qm__operand(&call, "out", out, "=qkv [R, H, D]", QM__READ, &args.out);
  qm__operand(&call, "lse", lse, "f32 [R, H]", QM__READ, &args.lse);
  qm__operand(&call, "cu", cu, "i32 [S+1]", QM__READ, &args.cu_q);
  qm__operand(&call, "dqkv", dqkv, "=qkv [R, H+2HK, D]", QM__WRITE, &dall);
  const int64_t kv_heads = packed_kv_heads(&call);
  require_options(&call, options);
  if (call.status != QM_OK) return call.status;
  args.sequences = qm__size(&call, "S+1") - 1;
  args.heads = qm__size(&call, "H");
  args.kv_heads = kv_heads;
  args.head_size = qm__size(&call, "D");
  args.rows_q = args.rows_k = qm__size(&call, "R");
  args.q = slice(&all, 0, args.heads);
  args.k = slice(&all, args.heads, kv_heads);
  args.v = slice(&all, args.heads + kv_heads, kv_heads);
  args.dq = slice(&dall, 0, args.heads);
  args.dk = slice(&dall, args.heads, kv_heads);
  args.dv = slice(&dall, args.heads + kv_heads, kv_heads);
  args.cu_k = args.cu_q;
  args.stride_q = args.stride_k = args.stride_v = (args.heads + 2 * kv_heads) * args.head_size;
  args.options = *options;
  return QM__DISPATCH(call, attention_backward, &args);
}
