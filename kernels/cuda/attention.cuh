/* attention.cuh - what the attention kernels share: sequences, and what a query may see. */
#ifndef QM_ATTENTION_CUH
#define QM_ATTENTION_CUH

#include "device.cuh"

/* The sizes of one call, forward or backward. A row of q (and dq) is stride_q elements from the
** next, whatever the head count says; the same for k and v. */
typedef struct qm_attention_shape {
  const int32_t *cu_q, *cu_k;
  int32_t sequences, heads, kv_heads, head_size, rows_q, rows_k;
  int64_t stride_q, stride_k, stride_v;
  float scale;
  int32_t causal, window;
} qm_attention_shape;

template <typename Args>
static inline qm_attention_shape qm_attention_shape_of(const Args *args) {
  return {(const int32_t *)args->cu_q.data,
          (const int32_t *)args->cu_k.data,
          (int32_t)args->sequences,
          (int32_t)args->heads,
          (int32_t)args->kv_heads,
          (int32_t)args->head_size,
          (int32_t)args->rows_q,
          (int32_t)args->rows_k,
          args->stride_q,
          args->stride_k,
          args->stride_v,
          (float)args->options.scale,
          args->options.causal,
          args->options.window};
}

/* Where sequence s lies. Offsets that do not ascend were noted by the check kernel; clamping keeps
** every access inside the tensors meanwhile. */
typedef struct qm_attention_span {
  int32_t q_first, q_end, k_first, k_end;
} qm_attention_span;

static __device__ __forceinline__ qm_attention_span
qm_attention_span_of(const qm_attention_shape &shape, int32_t s) {
  qm_attention_span span;
  span.q_first = max(0, min(shape.cu_q[s], shape.rows_q));
  span.q_end = max(span.q_first, min(shape.cu_q[s + 1], shape.rows_q));
  span.k_first = max(0, min(shape.cu_k[s], shape.rows_k));
  span.k_end = max(span.k_first, min(shape.cu_k[s + 1], shape.rows_k));
  return span;
}

/* The sequence that holds `row` by the offsets cu [sequences + 1]: the last that begins at or
** before it. */
static __device__ __forceinline__ int32_t qm_attention_sequence(const int32_t *cu,
                                                                int32_t sequences, int32_t row) {
  int32_t low = 0, high = sequences - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (cu[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

/* Key rows first .. end - 1 are what query row `query` of a sequence sees. */
static __device__ __forceinline__ void qm_attention_keys(const qm_attention_shape &shape,
                                                         const qm_attention_span &span,
                                                         int32_t query, int32_t *first,
                                                         int32_t *end) {
  const int32_t self = span.k_end - (span.q_end - query); /* the key at the query's position */
  *first = span.k_first;
  *end = shape.causal ? self + 1 : span.k_end;
  if (shape.window > 0) *first = max(*first, self - shape.window + 1);
  *first = min(*first, span.k_end);
  *end = max(*end, *first);
}

/* Query rows first .. end - 1 are those that see key row `key`. */
static __device__ __forceinline__ void qm_attention_queries(const qm_attention_shape &shape,
                                                            const qm_attention_span &span,
                                                            int32_t key, int32_t *first,
                                                            int32_t *end) {
  const int32_t self = span.q_end - (span.k_end - key); /* the query at the key's position */
  *first = shape.causal ? max(span.q_first, self) : span.q_first;
  *end = span.q_end;
  if (shape.window > 0) *end = min((int64_t)*end, (int64_t)self + shape.window);
  *first = min(*first, span.q_end);
  *end = max(*end, *first);
}

#endif
