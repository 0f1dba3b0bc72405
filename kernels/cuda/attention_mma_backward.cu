/* attention_mma_backward.cu - the gradients of flash attention on the tensor cores, for 16-bit
** elements and head sizes 64, 80, 96 and 128.
**
** P = exp(S - lse), dS = P (dP - delta) with delta = dout . out. One kernel holds a tile of keys
** and walks over the queries that see it (dv = P^T dout, dk = dS^T q), another holds a tile of
** queries and walks over the keys (dq = dS k). S and dP are worked out twice, and so no sum depends
** on which block comes first. Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2.
*/
#include "attention_mma.cuh"
#include "attention_mma.h"
#include "attention_rows.h"

enum { ROWS = 64 }; /* of the tile that stays: 16 to a warp; and of those that pass, or half */

template <typename T>
struct gradients {
  const T *dout, *q, *k, *v;
  const float *lse, *delta;
  T *dq, *dk, *dv;
};

template <typename T, int D>
static __global__ void __launch_bounds__(QM_THREADS)
    gather_dkv(qm_attention_shape shape, gradients<T> x) {
  constexpr int LINE = D + QM_PAD, QUERIES = D <= 96 ? ROWS : ROWS / 2;
  extern __shared__ uint4 shared[];
  T *const tile_k = (T *)shared, *const tile_v = tile_k + ROWS * LINE;
  T *const tile_q = tile_v + ROWS * LINE, *const tile_d = tile_q + 2 * QUERIES * LINE;
  float *const lses = (float *)(tile_d + 2 * QUERIES * LINE), *const deltas = lses + 2 * QUERIES;

  int32_t s, row;
  const int32_t kv_head = blockIdx.y, shared_by = shape.heads / shape.kv_heads;
  if (!qm_attention_locate(shape.cu_k, shape.sequences, ROWS, blockIdx.x, &s, &row)) return;
  const qm_attention_span span = qm_attention_span_of(shape, s);
  const int32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int32_t warp_row = threadIdx.x / 32 * 16;

  int32_t first, end, open, close; /* all keys of the tile are seen from open up to close */
  qm_attention_queries(shape, span, row, &first, &close);
  qm_attention_queries(shape, span, min(row + ROWS, span.k_end) - 1, &open, &end);
  const int32_t tiles = (max(end - first, 0) + QUERIES - 1) / QUERIES;

  const int64_t at_k = row * shape.stride_k + (int64_t)kv_head * D;
  const int64_t at_v = row * shape.stride_v + (int64_t)kv_head * D;
  const auto fetch =
      [&](int32_t step) { /* query tile `step` of all heads' */
                          const int32_t head = kv_head * shared_by + step / tiles, stage = step & 1;
                          const int32_t query = first + step % tiles * QUERIES, there = end - query;
                          const int64_t at = (int64_t)query * shape.heads + head;
                          qm_fetch<T, D, QUERIES>(tile_q + stage * QUERIES * LINE,
                                                  x.q + query * shape.stride_q + (int64_t)head * D,
                                                  shape.stride_q, there);
                          qm_fetch<T, D, QUERIES>(tile_d + stage * QUERIES * LINE, x.dout + at * D,
                                                  (int64_t)shape.heads * D, there);
                          if (threadIdx.x < QUERIES) {
                            const bool inside = (int32_t)threadIdx.x < there;
                            const int64_t of = at + (int64_t)threadIdx.x * shape.heads;
                            lses[stage * QUERIES + threadIdx.x] = inside ? x.lse[of] : INFINITY;
                            deltas[stage * QUERIES + threadIdx.x] = inside ? x.delta[of] : 0.0f;
                          }
      };
  qm_fetch<T, D, ROWS>(tile_k, x.k + at_k, shape.stride_k, span.k_end - row);
  qm_fetch<T, D, ROWS>(tile_v, x.v + at_v, shape.stride_v, span.k_end - row);
  const int32_t steps = tiles * shared_by;
  if (steps > 0) fetch(0);
  qm_copy_commit();

  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  for (int32_t step = 0; step < steps; step++) {
    const int32_t stage = step & 1, query = first + step % tiles * QUERIES;
    qm_copy_wait<0>();
    __syncthreads();
    if (step + 1 < steps) fetch(step + 1);
    qm_copy_commit();
    const T *const queries = tile_q + stage * QUERIES * LINE;
    const T *const douts = tile_d + stage * QUERIES * LINE;
    float scores[QUERIES / 8][4] = {}, slopes[QUERIES / 8][4] = {};
    qm_multiply_transpose<T, D, QUERIES>(scores, tile_k, warp_row, queries);
    qm_multiply_transpose<T, D, QUERIES>(slopes, tile_v, warp_row, douts);
    const bool masked = query < open || query + QUERIES > close;
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int32_t column = n * 8 + 2 * t + i % 2, of = query + column;
        bool seen = true;
        if (masked) {
          int32_t from, to;
          qm_attention_queries(shape, span, row + warp_row + g + i / 2 * 8, &from, &to);
          seen = of >= from && of < to;
        }
        qm_differentiate(scores[n][i], slopes[n][i], shape.scale * QM_LOG2E,
                         lses[stage * QUERIES + column], deltas[stage * QUERIES + column], seen);
      }
    qm_multiply_weights<T, D, QUERIES>(dv, scores, douts);
    qm_multiply_weights<T, D, QUERIES>(dk, slopes, queries);
  }
  qm_copy_wait<0>();
  const int32_t mine = row + warp_row, there = span.k_end - mine;
  qm_store_rows<T>(x.dk + at_k + warp_row * shape.stride_k, shape.stride_k, there, dk,
                   {shape.scale, shape.scale});
  qm_store_rows<T>(x.dv + at_v + warp_row * shape.stride_v, shape.stride_v, there, dv,
                   {1.0f, 1.0f});
}

template <typename T, int D>
static __global__ void __launch_bounds__(QM_THREADS)
    gather_dq(qm_attention_shape shape, gradients<T> x) {
  constexpr int LINE = D + QM_PAD;
  extern __shared__ uint4 shared[];
  T *const tile_q = (T *)shared, *const tile_d = tile_q + ROWS * LINE;
  T *const tile_k = tile_d + ROWS * LINE, *const tile_v = tile_k + 2 * ROWS * LINE;

  int32_t s, row;
  const int32_t tile = (int32_t)(gridDim.x - 1 - blockIdx.x), head = blockIdx.y;
  if (!qm_attention_locate(shape.cu_q, shape.sequences, ROWS, tile, &s, &row)) return;
  const qm_attention_span span = qm_attention_span_of(shape, s);
  const int32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int32_t warp_row = threadIdx.x / 32 * 16;

  int32_t first, end, open, close;
  qm_attention_keys(shape, span, row, &first, &close);
  qm_attention_keys(shape, span, min(row + ROWS, span.q_end) - 1, &open, &end);
  float lse[2], delta[2];
  int32_t from[2], to[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int32_t query = row + warp_row + half * 8 + g;
    const bool inside = query < span.q_end;
    const int64_t of = (int64_t)query * shape.heads + head;
    lse[half] = inside ? x.lse[of] : INFINITY;
    delta[half] = inside ? x.delta[of] : 0.0f;
    from[half] = to[half] = 0;
    if (inside) qm_attention_keys(shape, span, query, &from[half], &to[half]);
  }

  const int64_t kv = (int64_t)head * shape.kv_heads / shape.heads * D;
  const int64_t at_q = row * shape.stride_q + (int64_t)head * D;
  const int64_t at_d = ((int64_t)row * shape.heads + head) * D;
  const auto fetch = [&](int32_t key, int32_t stage) {
    qm_fetch<T, D, ROWS>(tile_k + stage * ROWS * LINE, x.k + key * shape.stride_k + kv,
                         shape.stride_k, end - key);
    qm_fetch<T, D, ROWS>(tile_v + stage * ROWS * LINE, x.v + key * shape.stride_v + kv,
                         shape.stride_v, end - key);
  };
  qm_fetch<T, D, ROWS>(tile_q, x.q + at_q, shape.stride_q, span.q_end - row);
  qm_fetch<T, D, ROWS>(tile_d, x.dout + at_d, (int64_t)shape.heads * D, span.q_end - row);
  if (first < end) fetch(first, 0);
  qm_copy_commit();

  float dq[D / 8][4] = {};
  for (int32_t key = first, stage = 0; key < end; key += ROWS, stage ^= 1) {
    qm_copy_wait<0>();
    __syncthreads();
    if (key + ROWS < end) fetch(key + ROWS, stage ^ 1);
    qm_copy_commit();
    const T *const keys = tile_k + stage * ROWS * LINE;
    const T *const values = tile_v + stage * ROWS * LINE;
    float scores[ROWS / 8][4] = {}, slopes[ROWS / 8][4] = {};
    qm_multiply_transpose<T, D, ROWS>(scores, tile_q, warp_row, keys);
    qm_multiply_transpose<T, D, ROWS>(slopes, tile_d, warp_row, values);
    const bool masked = key < open || key + ROWS > close;
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int32_t at = key + n * 8 + 2 * t + i % 2;
        const bool seen = !masked || (at >= from[i / 2] && at < to[i / 2]);
        qm_differentiate(scores[n][i], slopes[n][i], shape.scale * QM_LOG2E, lse[i / 2],
                         delta[i / 2], seen);
      }
    qm_multiply_weights<T, D, ROWS>(dq, slopes, keys);
  }
  qm_copy_wait<0>();
  qm_store_rows<T>(x.dq + at_q + warp_row * shape.stride_q, shape.stride_q,
                   span.q_end - row - warp_row, dq, {shape.scale, shape.scale});
}

template <typename T, int D>
static int32_t launch(qm_cuda *cuda, const qm_attention_backward_args *args,
                      const gradients<T> &x) {
  const qm_attention_shape shape = qm_attention_shape_of(args);
  const int tiles = 6 * ROWS * (D + QM_PAD) * (int)sizeof(T);
  const int with_rows = tiles + 4 * ROWS * (int)sizeof(float);
  const cudaError_t errors[] = {
      cudaFuncSetAttribute(gather_dkv<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           with_rows),
      cudaFuncSetAttribute(gather_dq<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, tiles)};
  for (const cudaError_t error : errors)
    if (const int32_t status = qm_cuda_check(error, "attention_backward")) return status;
  const dim3 grid_q(qm_attention_tiles(args->rows_q, args->sequences, ROWS), (unsigned)args->heads);
  const dim3 grid_k(qm_attention_tiles(args->rows_k, args->sequences, ROWS),
                    (unsigned)args->kv_heads);
  gather_dkv<T, D><<<grid_k, QM_THREADS, (size_t)with_rows, cuda->compute>>>(shape, x);
  gather_dq<T, D><<<grid_q, QM_THREADS, (size_t)tiles, cuda->compute>>>(shape, x);
  return qm_cuda_launched(cuda, "attention_backward");
}

int32_t qm_cuda_attention_backward_mma(qm_cuda *cuda, const qm_attention_backward_args *args) {
  float *delta;
  if (const int32_t status = qm_cuda_attention_delta(cuda, args, &delta)) return status;
  return qm_with_half(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    const gradients<T> x = {(const T *)args->dout.data,
                            (const T *)args->q.data,
                            (const T *)args->k.data,
                            (const T *)args->v.data,
                            (const float *)args->lse.data,
                            delta,
                            (T *)args->dq.data,
                            (T *)args->dk.data,
                            (T *)args->dv.data};
    switch (args->head_size) {
      case 64: return launch<T, 64>(cuda, args, x);
      case 80: return launch<T, 80>(cuda, args, x);
      case 96: return launch<T, 96>(cuda, args, x);
      default: return launch<T, 128>(cuda, args, x);
    }
  });
}
