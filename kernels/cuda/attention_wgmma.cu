/* attention_wgmma.cu - flash attention forward with Hopper's warpgroup products, for 16-bit
** elements
** and head sizes 64 and 128.
**
** One warpgroup copies tiles into shared memory; the others take 64 query rows each and walk over
** the
** keys. The products of the next scores run while the softmax of the last ones is worked out.
** Source: Shah et al., FlashAttention-3, arXiv 2407.08608.
*/
#include "attention_wgmma.cuh"

enum { KEYS = 128, STAGES = 2 };

template <int D>
struct forward_plan {
  static constexpr int GROUPS = 2, ROWS = 64 * GROUPS;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int REGISTERS = GROUPS == 3 ? 160 : 240, REGISTERS_LEFT = GROUPS == 3 ? 32 : 24;
  static constexpr int Q_BYTES = ROWS * D * 2, KV_BYTES = KEYS * D * 2;
  static constexpr int BYTES = Q_BYTES + 2 * STAGES * KV_BYTES + 1024 /* to align */;
};

template <typename T, int D>
static __global__ void __launch_bounds__(forward_plan<D>::THREADS, 1)
    attend(qm_attention_shape shape, const __grid_constant__ CUtensorMap q,
           const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v, T *out,
           float *lse) {
#ifdef QM_HAS_WGMMA_HERE
  using plan = forward_plan<D>;
  extern __shared__ char unaligned[];
  char *const tile_q = qm_align_tile(unaligned), *const tile_k = tile_q + plan::Q_BYTES;
  char *const tile_v = tile_k + STAGES * plan::KV_BYTES;
  __shared__ uint64_t q_full, k_full[STAGES], v_full[STAGES], k_empty[STAGES], v_empty[STAGES];

  int32_t s, row;
  const int32_t tile = (int32_t)(gridDim.x - 1 - blockIdx.x), head = blockIdx.y;
  if (!qm_attention_locate(shape.cu_q, shape.sequences, plan::ROWS, tile, &s, &row)) return;
  const qm_attention_span span = qm_attention_span_of(shape, s);
  int32_t first, end, open, close;
  qm_attention_keys(shape, span, row, &first, &close);
  qm_attention_keys(shape, span, min(row + plan::ROWS, span.q_end) - 1, &open, &end);
  const int32_t tiles = (max(end - first, 0) + KEYS - 1) / KEYS;

  if (threadIdx.x == 0) {
    qm_barrier_open(&q_full, 1);
    for (int i = 0; i < STAGES; i++) {
      qm_barrier_open(&k_full[i], 1);
      qm_barrier_open(&v_full[i], 1);
      qm_barrier_open(&k_empty[i], 4 * plan::GROUPS);
      qm_barrier_open(&v_empty[i], 4 * plan::GROUPS);
    }
    qm_barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) { /* the copying group: one thread of it */
    qm_registers_release<plan::REGISTERS_LEFT>();
    if (threadIdx.x != 0) return;
    const int32_t kv_head = (int32_t)((int64_t)head * shape.kv_heads / shape.heads);
    qm_barrier_expect(&q_full, plan::Q_BYTES);
    qm_copy_rows<D, plan::ROWS>(tile_q, &q, head, row, &q_full);
    for (int32_t i = 0; i < tiles; i++) {
      const int32_t stage = i % STAGES, parity = i / STAGES % 2, key = first + i * KEYS;
      if (i >= STAGES) qm_barrier_wait(&k_empty[stage], parity ^ 1);
      qm_barrier_expect(&k_full[stage], plan::KV_BYTES);
      qm_copy_rows<D, KEYS>(tile_k + stage * plan::KV_BYTES, &k, kv_head, key, &k_full[stage]);
      if (i >= STAGES) qm_barrier_wait(&v_empty[stage], parity ^ 1);
      qm_barrier_expect(&v_full[stage], plan::KV_BYTES);
      qm_copy_rows<D, KEYS>(tile_v + stage * plan::KV_BYTES, &v, kv_head, key, &v_full[stage]);
    }
    return;
  }

  qm_registers_take<plan::REGISTERS>();
  const int32_t group = (int32_t)threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int32_t warp_row = group * 64 + (int32_t)threadIdx.x % 128 / 32 * 16, g = lane / 4;
  const float scale = shape.scale * QM_LOG2E;
  const qm_limits seen = qm_limits_at(qm_limits_of(shape, span, row), warp_row + g);
  const auto masked = [&](int32_t key) { return key < open || key + KEYS > close; };
  const uint64_t queries = qm_tile(tile_q + group * 64 * 128);
  const auto score =
      [&](float(&scores)[KEYS / 8][4],
          int32_t i) { /* begins the products */
                       qm_barrier_wait(&k_full[i % STAGES], i / STAGES % 2);
                       const uint64_t keys = qm_tile(tile_k + i % STAGES * plan::KV_BYTES);
                       qm_multiply_tiles<T, D, plan::ROWS, KEYS>(scores, queries, keys);
      };

  qm_row_softmax rows;
  float gathered[D / 8][4] = {}, scores[KEYS / 8][4], keep[2];
  uint32_t weights[KEYS / 16][4];
  const auto pack = [&]() {
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++)
      qm_weights_fragment<T>(weights[step], scores, step);
  };
  const auto gather = [&](int32_t i) { /* begins gathered += weights V */
                                       qm_barrier_wait(&v_full[i % STAGES], i / STAGES % 2);
                                       const uint64_t values = qm_tile_along(
                                           tile_v + i % STAGES * plan::KV_BYTES, KEYS * 128);
#pragma unroll
                                       for (int step = 0; step < KEYS / 16; step++)
                                         qm_product<T, 1>(gathered, weights[step],
                                                          qm_tile_at(values, step * 16 * 128),
                                                          false);
                                       qm_products_commit();
  };

  if (tiles > 0) {
    qm_barrier_wait(&q_full, 0);
    qm_products_begin();
    score(scores, 0);
    qm_products_wait<0>();
    qm_pin(scores);
    qm_weigh(rows, scores, keep, scale, first, masked(first), seen);
    pack();
    for (int32_t i = 1; i < tiles; i++) {
      const int32_t key = first + i * KEYS;
      if (lane == 0) qm_barrier_arrive(&k_empty[(i - 1) % STAGES]);
      qm_pin(gathered);
      qm_products_begin();
      score(scores, i);
      gather(i - 1);
      qm_products_wait<1>();
      qm_pin(scores);
      qm_weigh(rows, scores, keep, scale, key, masked(key), seen);
      qm_products_wait<0>();
      qm_pin(gathered);
      if (lane == 0) qm_barrier_arrive(&v_empty[(i - 1) % STAGES]);
      qm_scale_rows(gathered, keep);
      pack();
    }
    qm_pin(gathered);
    qm_products_begin();
    gather(tiles - 1);
    qm_products_wait<0>();
    qm_pin(gathered);
  }
  const int32_t mine = row + warp_row;
  float factor[2];
  qm_finish_rows(rows, factor, lse, shape, mine + g, span.q_end, head);
  qm_store_rows<T>(out + ((int64_t)mine * shape.heads + head) * D, (int64_t)shape.heads * D,
                   span.q_end - mine, gathered, factor);
#endif
}

template <typename T, int D>
static int32_t launch(qm_cuda *cuda, const qm_attention_args *args) {
  using plan = forward_plan<D>;
  const qm_attention_shape shape = qm_attention_shape_of(args);
  CUtensorMap q, k, v;
  const int32_t statuses[] = {
      qm_map_rows(&q, &args->q, args->rows_q, args->heads, D, args->stride_q, plan::ROWS),
      qm_map_rows(&k, &args->k, args->rows_k, args->kv_heads, D, args->stride_k, KEYS),
      qm_map_rows(&v, &args->v, args->rows_k, args->kv_heads, D, args->stride_v, KEYS),
      qm_cuda_check(cudaFuncSetAttribute(attend<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         plan::BYTES),
                    "attention")};
  for (const int32_t status : statuses)
    if (status != QM_OK) return status;
  const dim3 grid(qm_attention_tiles(args->rows_q, args->sequences, plan::ROWS),
                  (unsigned)args->heads);
  attend<T, D><<<grid, plan::THREADS, plan::BYTES, cuda->compute>>>(
      shape, q, k, v, (T *)args->out.data, (float *)args->lse.data);
  return qm_cuda_launched(cuda, "attention");
}

int32_t qm_cuda_attention_wgmma(qm_cuda *cuda, const qm_attention_args *args) {
  return qm_with_half(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    return args->head_size == 64 ? launch<T, 64>(cuda, args) : launch<T, 128>(cuda, args);
  });
}
