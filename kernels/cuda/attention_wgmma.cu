/* attention_wgmma.cu - flash attention forward with Hopper's warpgroup products, for 16-bit
** elements and head sizes 64 and 128.
**
** A block stays on its multiprocessor and takes tiles of query rows, those with the most keys
** first, until none is left. One warpgroup fetches: which tile is next, its queries, keys and
** values; the others take 64 rows of it each and walk over the keys. The products of the next
** scores run while the softmax of the last ones is worked out.
** Source: Shah et al., FlashAttention-3, arXiv 2407.08608.
*/
#include "attention_wgmma.cuh"

enum { KEYS = 128, STAGES = 2 };

template <int D>
struct forward_plan {
  static constexpr int GROUPS = 2, ROWS = 64 * GROUPS, THREADS = 128 * (GROUPS + 1);
  static constexpr int REGISTERS = 232, REGISTERS_LEFT = 40;
  static constexpr int Q_BYTES = ROWS * D * 2, KV_BYTES = KEYS * D * 2;
  static constexpr int BYTES = Q_BYTES + 2 * STAGES * KV_BYTES + 1024 /* to align */;
};

/* A tile of query rows, as the fetching group tells the others. */
struct forward_tile {
  qm_attention_span span;
  int32_t head, row;
  int32_t first,
      steps; /* its first key, and how many times KEYS of them; steps < 0: no more tiles */
  int32_t open, close; /* all its rows see the keys from open up to close */
};

template <int ROWS>
static __device__ __forceinline__ bool locate(const qm_attention_shape &shape, uint32_t item,
                                              uint32_t tiles, forward_tile *tile) {
  int32_t s, end;
  tile->head = (int32_t)(item % (uint32_t)shape.heads);
  const int32_t index = (int32_t)(tiles - 1 - item / (uint32_t)shape.heads);
  if (!qm_attention_locate(shape.cu_q, shape.sequences, ROWS, index, &s, &tile->row)) return false;
  tile->span = qm_attention_span_of(shape, s);
  qm_attention_keys(shape, tile->span, tile->row, &tile->first, &tile->close);
  qm_attention_keys(shape, tile->span, min(tile->row + ROWS, tile->span.q_end) - 1, &tile->open,
                    &end);
  tile->steps = (max(end - tile->first, 0) + KEYS - 1) / KEYS;
  return true;
}

template <typename T, int D>
static __global__ void __launch_bounds__(forward_plan<D>::THREADS, 1)
    attend(qm_attention_shape shape, const __grid_constant__ CUtensorMap q,
           const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v, T *out,
           float *lse, uint32_t tiles) {
#ifdef QM_HAS_WGMMA_HERE
  using plan = forward_plan<D>;
  extern __shared__ char unaligned[];
  char *const tile_q = qm_align_tile(unaligned), *const tile_k = tile_q + plan::Q_BYTES;
  char *const tile_v = tile_k + STAGES * plan::KV_BYTES;
  __shared__ forward_tile tiles_at_work[2];
  __shared__ uint64_t q_full, q_empty;
  __shared__ uint64_t k_full[STAGES], v_full[STAGES], k_empty[STAGES], v_empty[STAGES];

  if (threadIdx.x == 0) {
    qm_barrier_open(&q_full, 1);
    qm_barrier_open(&q_empty, 128 * plan::GROUPS);
    for (int i = 0; i < STAGES; i++) {
      qm_barrier_open(&k_full[i], 1);
      qm_barrier_open(&v_full[i], 1);
      qm_barrier_open(&k_empty[i], 4 * plan::GROUPS);
      qm_barrier_open(&v_empty[i], 4 * plan::GROUPS);
    }
    qm_barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) { /* the fetching group: one warp of it */
    qm_registers_release<plan::REGISTERS_LEFT>();
    if (threadIdx.x >= 32) return;
    int32_t step = 0; /* over all tiles */
    for (uint32_t turn = 0;; turn++) {
      forward_tile next;
      bool found = false;
      for (uint32_t item; !found && (item = qm_next_item()) < tiles * (uint32_t)shape.heads;)
        found = locate<plan::ROWS>(shape, item, tiles, &next);
      if (!found) next.steps = -1;
      qm_barrier_wait(&q_empty, turn % 2 ^ 1);
      if (threadIdx.x == 0) {
        tiles_at_work[turn % 2] = next;
        qm_barrier_expect(&q_full, found ? plan::Q_BYTES : 0);
        if (found) qm_copy_rows<D, plan::ROWS>(tile_q, &q, next.head, next.row, &q_full);
      }
      if (!found) break;
      const int32_t kv_head = next.head / (shape.heads / shape.kv_heads);
      for (int32_t i = 0; i < next.steps; i++, step++) {
        const int32_t stage = step % STAGES, fresh = step / STAGES % 2 ^ 1;
        const int32_t key = next.first + i * KEYS;
        qm_barrier_wait(&k_empty[stage], fresh);
        if (threadIdx.x == 0) {
          qm_barrier_expect(&k_full[stage], plan::KV_BYTES);
          qm_copy_rows<D, KEYS>(tile_k + stage * plan::KV_BYTES, &k, kv_head, key, &k_full[stage]);
        }
        qm_barrier_wait(&v_empty[stage], fresh);
        if (threadIdx.x == 0) {
          qm_barrier_expect(&v_full[stage], plan::KV_BYTES);
          qm_copy_rows<D, KEYS>(tile_v + stage * plan::KV_BYTES, &v, kv_head, key, &v_full[stage]);
        }
      }
    }
    qm_items_done();
    return;
  }

  qm_registers_take<plan::REGISTERS>();
  const int32_t group = (int32_t)threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int32_t warp_row = group * 64 + (int32_t)threadIdx.x % 128 / 32 * 16, g = lane / 4;
  const float scale = shape.scale * QM_LOG2E;
  const uint64_t queries = qm_tile(tile_q + group * 64 * 128);
  float scores[KEYS / 8][4], keep[2];
  uint32_t weights[KEYS / 16][4];

  /* Begins the products */
  const auto score = [&](int32_t step) {
    qm_barrier_wait(&k_full[step % STAGES], step / STAGES % 2);
    const uint64_t keys = qm_tile(tile_k + step % STAGES * plan::KV_BYTES);
    qm_multiply_tiles<T, D, plan::ROWS, KEYS>(scores, queries, keys);
  };
  const auto pack = [&]() {
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) qm_weights_fragment<T>(weights[i], scores, i);
  };

  int32_t step = 0;
  for (uint32_t turn = 0;; turn++) {
    qm_barrier_wait(&q_full, turn % 2);
    /* Its numbers stay in shared memory: registers are short. */
    const forward_tile &tile = tiles_at_work[turn % 2];
    const int32_t steps = tile.steps;
    if (steps < 0) return;
    qm_row_softmax rows;
    const auto weigh = [&](int32_t i) {
      const int32_t key = tile.first + i * KEYS;
      if (key < tile.open || key + KEYS > tile.close)
        qm_hide(scores, key, qm_limits_at(qm_limits_of(shape, tile.span, tile.row), warp_row + g));
      qm_weigh(rows, scores, keep, scale);
    };
    float gathered[D / 8][4] = {};
    /* Begins gathered += weights V */
    const auto gather = [&](int32_t at) {
      qm_barrier_wait(&v_full[at % STAGES], at / STAGES % 2);
      const uint64_t values = qm_tile_along(tile_v + at % STAGES * plan::KV_BYTES, KEYS * 128);
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++)
        qm_product<T, 1>(gathered, weights[i], qm_tile_at(values, i * 16 * 128), false);
      qm_products_commit();
    };

    if (steps > 0) {
      qm_products_begin();
      score(step);
      qm_products_wait<0>();
      qm_pin(scores);
      if (steps == 1) qm_barrier_arrive(&q_empty);
      weigh(0);
      pack();
      for (int32_t i = 1; i < steps; i++) {
        qm_barrier_arrive_warp(&k_empty[step % STAGES]);
        qm_pin(gathered);
        qm_products_begin();
        score(step + 1);
        gather(step);
        qm_products_wait<1>();
        qm_pin(scores);
        if (i + 1 == steps) qm_barrier_arrive(&q_empty);
        weigh(i);
        qm_products_wait<0>();
        qm_pin(gathered);
        qm_barrier_arrive_warp(&v_empty[step % STAGES]);
        qm_scale_rows(gathered, keep);
        pack();
        step++;
      }
      qm_barrier_arrive_warp(&k_empty[step % STAGES]);
      qm_pin(gathered);
      qm_products_begin();
      gather(step);
      qm_products_wait<0>();
      qm_pin(gathered);
      qm_barrier_arrive_warp(&v_empty[step % STAGES]);
      step++;
    } else {
      qm_barrier_arrive(&q_empty);
    }
    const int32_t mine = tile.row + warp_row, head = tile.head, end = tile.span.q_end;
    float factor[2];
    qm_finish_rows(rows, factor, lse, shape, mine + g, end, head);
    qm_store_rows_wide<T>(out + ((int64_t)mine * shape.heads + head) * D, (int64_t)shape.heads * D,
                          end - mine, gathered, factor);
  }
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
  const unsigned tiles = qm_attention_tiles(args->rows_q, args->sequences, plan::ROWS);
  const int64_t items = tiles * args->heads;
  const unsigned blocks = (unsigned)(items < cuda->multiprocessors ? items : cuda->multiprocessors);
  attend<T, D><<<blocks, plan::THREADS, plan::BYTES, cuda->compute>>>(
      shape, q, k, v, (T *)args->out.data, (float *)args->lse.data, tiles);
  return qm_cuda_launched(cuda, "attention");
}

int32_t qm_cuda_attention_wgmma(qm_cuda *cuda, const qm_attention_args *args) {
  return qm_with_half(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    return args->head_size == 64 ? launch<T, 64>(cuda, args) : launch<T, 128>(cuda, args);
  });
}
