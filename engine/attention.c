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
