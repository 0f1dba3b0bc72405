/* attention_mma.cu - flash attention forward on the tensor cores, for 16-bit elements and head
** sizes 64, 80, 96 and 128. A block takes 128 query rows of one head, a warp 32 of them, and walks
** over tiles of keys with an online softmax. Source: Dao, FlashAttention-2, arXiv 2307.08691.
*/
#include "attention_mma.cuh"
#include "attention_mma.h"

enum { ROWS_Q = 128, PARTS = ROWS_Q / QM_WARPS / 16 /* of 16 rows to a warp */ };
/* Keys to a tile: as many as the registers have room for. */
template <int D>
constexpr int ROWS_K = D <= 80 ? 64 : 32;

template <typename T, int D>
static __global__ void __launch_bounds__(QM_THREADS)
    attend(qm_attention_shape shape, const T *q, const T *k, const T *v, T *out, float *lse) {
  constexpr int LINE = D + QM_PAD;
  extern __shared__ uint4 shared[];
  T *const tile_q = (T *)shared, *const tile_k = tile_q + ROWS_Q * LINE;
  T *const tile_v = tile_k + 2 * ROWS_K<D> * LINE;

  int32_t s, row;
  /* Backwards: a causal sequence's last tiles have most to do and begin first. */
  const int32_t tile = (int32_t)(gridDim.x - 1 - blockIdx.x), head = blockIdx.y;
  if (!qm_attention_locate(shape.cu_q, shape.sequences, ROWS_Q, tile, &s, &row)) return;
  const qm_attention_span span = qm_attention_span_of(shape, s);
  const int64_t kv = (int64_t)head * shape.kv_heads / shape.heads * D;
  const int32_t warp_row = threadIdx.x / 32 * (16 * PARTS), g = threadIdx.x % 32 / 4;
  const float scale = shape.scale * QM_LOG2E;

  /* What this tile's rows see: all of them between `open` and `close`, some from first to end. */
  int32_t first, end, open, close;
  qm_attention_keys(shape, span, row, &first, &close);
  qm_attention_keys(shape, span, min(row + ROWS_Q, span.q_end) - 1, &open, &end);
  first = span.k_first + (first - span.k_first) / ROWS_K<D> * ROWS_K<D>;
  const qm_limits seen = qm_limits_of(shape, span, row);
  qm_row_softmax rows[PARTS];

  const T *const keys = k + kv, *const values = v + kv;
  const int64_t from = row * shape.stride_q + (int64_t)head * D;
  qm_fetch<T, D, ROWS_Q>(tile_q, q + from, shape.stride_q, span.q_end - row);
  qm_fetch<T, D, ROWS_K<D>>(tile_k, keys + first * shape.stride_k, shape.stride_k, end - first);
  qm_copy_commit();
  qm_fetch<T, D, ROWS_K<D>>(tile_v, values + first * shape.stride_v, shape.stride_v, end - first);
  qm_copy_commit();

  float gathered[PARTS][D / 8][4] = {};
  for (int32_t key = first, stage = 0; key < end; key += ROWS_K<D>, stage ^= 1) {
    const int32_t next = key + ROWS_K<D>;
    qm_copy_wait<1>();
    __syncthreads(); /* these keys are here; the other stage's keys are done with */
    if (next < end)
      qm_fetch<T, D, ROWS_K<D>>(tile_k + (stage ^ 1) * ROWS_K<D> * LINE,
                                keys + next * shape.stride_k, shape.stride_k, end - next);
    qm_copy_commit();
    const bool masked = key < open || next > close;
    float scores[PARTS][ROWS_K<D> / 8][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      uint32_t left[PARTS][4];
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        qm_rows_fragment<T, D>(left[part], tile_q, warp_row + part * 16, step);
#pragma unroll
      for (int n = 0; n < ROWS_K<D> / 16; n++) {
        uint32_t right[4];
        qm_transpose_fragment<T, D>(right, tile_k + stage * ROWS_K<D> * LINE, n * 16, step);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          qm_mma<T>(scores[part][2 * n], left[part], right[0], right[1]);
          qm_mma<T>(scores[part][2 * n + 1], left[part], right[2], right[3]);
        }
      }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int32_t local = warp_row + part * 16 + g;
      float keep[2];
      if (masked) qm_hide(scores[part], key, qm_limits_at(seen, local));
      qm_weigh(rows[part], scores[part], keep, scale);
      qm_scale_rows(gathered[part], keep);
    }

    qm_copy_wait<1>();
    __syncthreads();
    if (next < end)
      qm_fetch<T, D, ROWS_K<D>>(tile_v + (stage ^ 1) * ROWS_K<D> * LINE,
                                values + next * shape.stride_v, shape.stride_v, end - next);
    qm_copy_commit();
#pragma unroll
    for (int step = 0; step < ROWS_K<D> / 16; step++) {
      uint32_t left[PARTS][4];
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        qm_weights_fragment<T>(left[part], scores[part], step);
#pragma unroll
      for (int n = 0; n < D / 16; n++) {
        uint32_t right[4];
        qm_columns_fragment<T, D>(right, tile_v + stage * ROWS_K<D> * LINE, step * 16, n * 16);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          qm_mma<T>(gathered[part][2 * n], left[part], right[0], right[1]);
          qm_mma<T>(gathered[part][2 * n + 1], left[part], right[2], right[3]);
        }
      }
    }
  }
  qm_copy_wait<0>(); /* nothing may arrive after the block has ended */

#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    const int32_t mine = row + warp_row + part * 16;
    float factor[2];
    qm_finish_rows(rows[part], factor, lse, shape, mine + g, span.q_end, head);
    qm_store_rows<T>(out + ((int64_t)mine * shape.heads + head) * D, (int64_t)shape.heads * D,
                     span.q_end - mine, gathered[part], factor);
  }
}

template <typename T, int D>
static int32_t launch(qm_cuda *cuda, const qm_attention_args *args) {
  const qm_attention_shape shape = qm_attention_shape_of(args);
  const int bytes = (ROWS_Q + 4 * ROWS_K<D>)*(D + QM_PAD) * (int)sizeof(T);
  if (const int32_t status = qm_cuda_check(
          cudaFuncSetAttribute(attend<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "attention"))
    return status;
  const dim3 grid(qm_attention_tiles(args->rows_q, args->sequences, ROWS_Q), (unsigned)args->heads);
  attend<T, D><<<grid, QM_THREADS, (size_t)bytes, cuda->compute>>>(
      shape, (const T *)args->q.data, (const T *)args->k.data, (const T *)args->v.data,
      (T *)args->out.data, (float *)args->lse.data);
  return qm_cuda_launched(cuda, "attention");
}

int32_t qm_cuda_attention_mma(qm_cuda *cuda, const qm_attention_args *args) {
  return qm_with_half(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    switch (args->head_size) {
      case 64: return launch<T, 64>(cuda, args);
      case 80: return launch<T, 80>(cuda, args);
      case 96: return launch<T, 96>(cuda, args);
      default: return launch<T, 128>(cuda, args);
    }
  });
}
