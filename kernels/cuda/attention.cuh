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

/* Offsets ascend from 0 to the row count: note the first that does not. A block's threads call. */
static __device__ __forceinline__ void qm_attention_check(const qm_attention_shape &shape,
                                                          qm_cuda_late *late) {
  const int32_t count = shape.sequences + 1;
  for (int32_t i = (int32_t)threadIdx.x; i < 2 * count; i += (int32_t)blockDim.x) {
    const int32_t s = i % count, *cu = i < count ? shape.cu_q : shape.cu_k;
    const int32_t rows = i < count ? shape.rows_q : shape.rows_k;
    const int32_t low = s == 0 ? 0 : cu[s - 1], high = s == 0 ? 0 : rows;
    const bool fits = cu[s] >= low && cu[s] <= high && (s < count - 1 || cu[s] == rows);
    if (!fits) qm_index_fits(late, QM_CUDA_OP_attention, -1 - s, 0);
  }
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

/* The span of the sequence that holds query row `row`. A warp's lanes call; where they can hold all
** offsets these come at once. */
static __device__ __forceinline__ qm_attention_span
qm_attention_span_at(const qm_attention_shape &shape, int32_t row) {
  if (shape.sequences >= 32)
    return qm_attention_span_of(shape, qm_attention_sequence(shape.cu_q, shape.sequences, row));
  const int32_t lane = threadIdx.x % 32, at = min(lane, shape.sequences);
  const int32_t q = max(0, min(shape.cu_q[at], shape.rows_q));
  const int32_t k = max(0, min(shape.cu_k[at], shape.rows_k));
  const unsigned begun = __ballot_sync(0xFFFFFFFFu, lane < shape.sequences && q <= row);
  const int32_t s = begun == 0 ? 0 : 31 - __clz((int)begun);
  qm_attention_span span;
  span.q_first = __shfl_sync(0xFFFFFFFFu, q, s);
  span.q_end = max(span.q_first, __shfl_sync(0xFFFFFFFFu, q, s + 1));
  span.k_first = __shfl_sync(0xFFFFFFFFu, k, s);
  span.k_end = max(span.k_first, __shfl_sync(0xFFFFFFFFu, k, s + 1));
  return span;
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

/* Block `tile` of all sequences' tiles of `tile_rows`: its sequence and first row, or false past
** the last. The grid has qm_attention_tiles of them, known without reading cu. */
static __device__ __forceinline__ bool qm_attention_locate(const int32_t *cu, int32_t sequences,
                                                           int32_t tile_rows, int32_t tile,
                                                           int32_t *sequence, int32_t *first) {
  const int32_t lane = threadIdx.x % 32;
  int32_t before = 0;
  for (int32_t base = 0; base < sequences; base += 32) {
    const int32_t s = base + lane;
    const int32_t length = s < sequences ? cu[s + 1] - cu[s] : 0;
    const int32_t tiles = (max(length, 0) + tile_rows - 1) / tile_rows;
    int32_t through = tiles; /* inclusive sum over the lanes */
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(0xFFFFFFFFu, through, offset);
      if (lane >= offset) through += other;
    }
    const unsigned reached = __ballot_sync(0xFFFFFFFFu, before + through > tile);
    if (reached != 0) {
      const int32_t at = __ffs((int)reached) - 1;
      const int32_t start = before + __shfl_sync(0xFFFFFFFFu, through - tiles, at);
      *sequence = base + at;
      *first = cu[*sequence] + (tile - start) * tile_rows;
      return true;
    }
    before += __shfl_sync(0xFFFFFFFFu, through, 31);
  }
  return false;
}
static inline unsigned qm_attention_tiles(int64_t rows, int64_t sequences, int64_t tile_rows) {
  return (unsigned)(rows / tile_rows + sequences);
}

#endif
