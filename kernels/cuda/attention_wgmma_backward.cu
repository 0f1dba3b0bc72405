/* attention_wgmma_backward.cu - the gradients of flash attention with Hopper's warpgroup products,
** for 16-bit elements and head sizes 64 and 128.
**
** As in attention_mma_backward.cu one kernel keeps keys and walks over queries, another keeps
** queries and walks over keys, so that no sum depends on timing. Blocks stay and take tiles, as in
** attention_wgmma.cu; a warpgroup keeps 64 rows.
*/
#include "attention_wgmma_dkv.cuh"

template <typename T, int D>
static __global__ void __launch_bounds__(128)
    summarize(const T *dout, const T *out, const float *lse, query_rows rows, int32_t rows_q,
              int32_t heads) {
  constexpr int LANES = D / 8, PER_BLOCK = 128 / LANES;
  const int32_t head = (int32_t)(blockIdx.x % (uint32_t)heads), lane = threadIdx.x % LANES;
  const int32_t row = (int32_t)(blockIdx.x / (uint32_t)heads * PER_BLOCK + threadIdx.x / LANES);
  const int64_t of = (int64_t)row * heads + head;
  float sum = 0.0f;
  if (row < rows_q) {
    const auto a = *(const qm_pack<T, 8> *)(dout + of * D + lane * 8);
    const auto b = *(const qm_pack<T, 8> *)(out + of * D + lane * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(qm_float(a.at[i]), qm_float(b.at[i]), sum);
  }
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (row < rows_q && lane == 0) {
    rows.minus_lse[head * rows.stride + row] = qm_minus_lse(lse[of]);
    rows.delta[head * rows.stride + row] = sum;
  }
}

/* Tile `item` of queries, those that see the most keys first; false where there is none. All lanes
** of a warp ask, the first one writes: registers are short. */
template <int KEYS>
static __device__ __forceinline__ bool locate_queries(const qm_attention_shape &shape,
                                                      uint32_t item, uint32_t tiles,
                                                      kept_tile *tile) {
  int32_t s, row;
  const int32_t index = (int32_t)(tiles - 1 - item / (uint32_t)shape.heads);
  if (!qm_attention_locate(shape.cu_q, shape.sequences, KEPT, index, &s, &row)) return false;
  if (threadIdx.x % 32 != 0) return true;
  const qm_attention_span span = qm_attention_span_of(shape, s);
  int32_t first, end;
  qm_attention_keys(shape, span, row, &first, &tile->close);
  qm_attention_keys(shape, span, min(row + KEPT, span.q_end) - 1, &tile->open, &end);
  tile->span = span;
  tile->head = (int32_t)(item % (uint32_t)shape.heads);
  tile->row = row;
  tile->first = first;
  tile->steps = (max(end - first, 0) + KEYS - 1) / KEYS;
  return true;
}

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS, 1)
    gather_dq(qm_attention_shape shape, const __grid_constant__ maps from, gradients<T> x,
              uint32_t tiles) {
#ifdef QM_HAS_WGMMA_HERE
  using plan = backward_plan<D>;
  constexpr int KEYS = plan::KEYS, BYTES = KEYS * D * 2, STAGES = plan::STAGES;
  extern __shared__ char unaligned[];
  char *const kept = qm_align_tile(unaligned); /* twice queries and their outputs' gradients */
  char *const tile_k = kept + 4 * plan::KEPT_BYTES, *const tile_v = tile_k + STAGES * BYTES;
  __shared__ kept_tile tiles_at_work[4]; /* more than are at work, to be written early */
  __shared__ uint64_t kept_full[2], kept_empty[2], full[STAGES], empty[STAGES];

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      qm_barrier_open(&kept_full[i], 1);
      qm_barrier_open(&kept_empty[i], 128 * GROUPS);
    }
    for (int i = 0; i < STAGES; i++) {
      qm_barrier_open(&full[i], 1);
      qm_barrier_open(&empty[i], 4 * GROUPS);
    }
    qm_barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) { /* the fetching group: one warp of it */
    qm_registers_release<plan::DQ_REGISTERS_LEFT>();
    if (threadIdx.x >= 32) return;
    int32_t step = 0; /* over all tiles */
    for (uint32_t turn = 0;; turn++) {
      kept_tile &slot = tiles_at_work[turn % 4];
      bool found = false;
      for (uint32_t item; !found && (item = qm_next_item()) < tiles * (uint32_t)shape.heads;)
        found = locate_queries<KEYS>(shape, item, tiles, &slot);
      if (!found && threadIdx.x == 0) slot.steps = -1;
      __syncwarp();
      const uint32_t side = turn % 2;
      char *const tile_q = kept + side * 2 * plan::KEPT_BYTES;
      qm_barrier_wait(&kept_empty[side], turn / 2 % 2 ^ 1);
      if (threadIdx.x == 0) {
        qm_barrier_expect(&kept_full[side], found ? 2 * plan::KEPT_BYTES : 0);
        if (found) {
          qm_copy_rows<D, KEPT>(tile_q, &from.q, slot.head, slot.row, &kept_full[side]);
          qm_copy_rows<D, KEPT>(tile_q + plan::KEPT_BYTES, &from.dout, slot.head, slot.row,
                                &kept_full[side]);
        }
      }
      if (!found) break;
      const int32_t kv_head = slot.head / (shape.heads / shape.kv_heads);
      int32_t key = slot.first;
      for (const int32_t end = step + slot.steps; step < end; step++, key += KEYS) {
        const int32_t stage = step % STAGES;
        qm_barrier_wait(&empty[stage], step / STAGES % 2 ^ 1);
        if (threadIdx.x != 0) continue;
        qm_barrier_expect(&full[stage], 2 * BYTES);
        qm_copy_rows<D, KEYS>(tile_k + stage * BYTES, &from.k, kv_head, key, &full[stage]);
        qm_copy_rows<D, KEYS>(tile_v + stage * BYTES, &from.v, kv_head, key, &full[stage]);
      }
    }
    qm_items_done();
    return;
  }

  qm_registers_take<plan::DQ_REGISTERS>();
  const int32_t group = (int32_t)threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int32_t warp_row = group * 64 + (int32_t)threadIdx.x % 128 / 32 * 16, g = lane / 4;
  const uint64_t kept_rows = qm_tile(kept + group * 64 * 128);
  const float scale = shape.scale * QM_LOG2E;
  float scores[KEYS / 8][4], slopes[KEYS / 8][4];
  uint32_t steep[KEYS / 16][4];

  uint64_t queries, douts;
  /* Begins the products that give scores and slopes */
  const auto differ = [&](int32_t step) {
    const int32_t stage = step % STAGES;
    qm_barrier_wait(&full[stage], step / STAGES % 2);
    qm_multiply_tiles<T, D, KEPT, KEYS>(scores, queries, qm_tile(tile_k + stage * BYTES));
    qm_multiply_tiles<T, D, KEPT, KEYS>(slopes, douts, qm_tile(tile_v + stage * BYTES));
  };

  int32_t step = 0;
  for (uint32_t turn = 0;; turn++) {
    const uint32_t side = turn % 2;
    queries = qm_tile_at(kept_rows, side * 2 * plan::KEPT_BYTES);
    douts = qm_tile_at(queries, plan::KEPT_BYTES);
    qm_barrier_wait(&kept_full[side], turn / 2 % 2);
    const kept_tile &tile = tiles_at_work[turn % 4];
    const int32_t steps = tile.steps;
    if (steps < 0) return;
    float minus_lse[2] = {-INFINITY, -INFINITY}, delta[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int32_t query = tile.row + warp_row + half * 8 + g;
      if (query >= tile.span.q_end) continue;
      minus_lse[half] = x.rows.minus_lse[tile.head * x.rows.stride + query];
      delta[half] = x.rows.delta[tile.head * x.rows.stride + query];
    }
    float dq[D / 8][4] = {};
    int32_t key = tile.first;
    /* Scores to P */
    const auto weigh = [&]() {
      if (key < tile.open || key + KEYS > tile.close)
        qm_hide(scores, key, qm_limits_at(qm_limits_of(shape, tile.span, tile.row), warp_row + g));
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) scores[n][j] = qm_weight(scores[n][j], scale, minus_lse[j / 2]);
    };
    /* DP to dS */
    const auto slope = [&]() {
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) slopes[n][j] = scores[n][j] * (slopes[n][j] - delta[j / 2]);
      if (key < tile.open || key + KEYS > tile.close) qm_hide_slopes(slopes, scores);
      key += KEYS;
    };
    const auto pack = [&]() {
#pragma unroll
      for (int at = 0; at < KEYS / 16; at++) qm_weights_fragment<T>(steep[at], slopes, at);
    };
    /* Begins dq += dS k */
    const auto gather = [&](int32_t stage) {
      const uint64_t keys = qm_tile_along(tile_k + stage * BYTES, KEYS * 128);
#pragma unroll
      for (int at = 0; at < KEYS / 16; at++)
        qm_product<T, 1>(dq, steep[at], qm_tile_at(keys, at * 16 * 128), false);
      qm_products_commit();
    };

    if (steps > 0) {
      qm_products_begin();
      differ(step);
      qm_products_wait<1>();
      qm_pin(scores);
      weigh();
      qm_products_wait<0>();
      qm_pin(slopes);
      slope();
      pack();
      for (int32_t i = 1; i < steps; i++) {
        const int32_t before = step % STAGES;
        step++;
        qm_pin(dq);
        qm_products_begin();
        differ(step);
        gather(before);
        qm_products_wait<2>();
        qm_pin(scores);
        weigh();
        qm_products_wait<1>();
        qm_pin(slopes);
        slope();
        qm_products_wait<0>();
        qm_pin(dq);
        qm_barrier_arrive_warp(&empty[before]);
        pack();
      }
      const int32_t stage = step++ % STAGES;
      qm_pin(dq);
      qm_products_begin();
      gather(stage);
      qm_products_wait<0>();
      qm_pin(dq);
      qm_barrier_arrive_warp(&empty[stage]);
    }
    qm_barrier_arrive(&kept_empty[side]);
    const int32_t mine = tile.row + warp_row;
    qm_store_rows_wide(x.dq + mine * shape.stride_q + (int64_t)tile.head * D, shape.stride_q,
                       tile.span.q_end - mine, dq, {shape.scale, shape.scale});
  }
#endif
}

template <typename T, int D>
static int32_t launch(qm_cuda *cuda, const qm_attention_backward_args *args) {
  using plan = backward_plan<D>;
  const qm_attention_shape shape = qm_attention_shape_of(args);
  const int64_t own = args->heads * D; /* dout stands alone */
  const auto map = [&](CUtensorMap *out, const qm_array &a, bool key, int64_t stride, int box) {
    return qm_map_rows(out, &a, key ? args->rows_k : args->rows_q,
                       key ? args->kv_heads : args->heads, D, stride, (uint32_t)box);
  };
  maps keep_k, keep_q;
  query_rows rows = {};
  rows.stride = (args->rows_q + plan::QUERIES + ROWS_ALIGNED - 1) / ROWS_ALIGNED * ROWS_ALIGNED;
  const int64_t numbers = args->heads * rows.stride;
  const int32_t statuses[] = {
      map(&keep_k.q, args->q, false, args->stride_q, plan::QUERIES),
      map(&keep_k.dout, args->dout, false, own, plan::QUERIES),
      map(&keep_k.k, args->k, true, args->stride_k, KEPT),
      map(&keep_k.v, args->v, true, args->stride_v, KEPT),
      map(&keep_q.q, args->q, false, args->stride_q, KEPT),
      map(&keep_q.dout, args->dout, false, own, KEPT),
      map(&keep_q.k, args->k, true, args->stride_k, plan::KEYS),
      map(&keep_q.v, args->v, true, args->stride_v, plan::KEYS),
      qm_cuda_check(
          cudaFuncSetAttribute(gather_dkv<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               plan::DKV_BYTES),
          "attention_backward"),
      qm_cuda_check(
          cudaFuncSetAttribute(gather_dq<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               plan::DQ_BYTES),
          "attention_backward"),
      qm_cuda_scratch(cuda, 2 * numbers * (int64_t)sizeof(float), (void **)&rows.minus_lse)};
  for (const int32_t status : statuses)
    if (status != QM_OK) return status;
  rows.delta = rows.minus_lse + numbers;
  const gradients<T> x = {rows, (T *)args->dq.data, (T *)args->dk.data, (T *)args->dv.data};
  const auto blocks = [&](unsigned tiles, int64_t heads) {
    const int64_t items = tiles * heads;
    return (unsigned)(items < cuda->multiprocessors ? items : cuda->multiprocessors);
  };
  const unsigned tiles_k = qm_attention_tiles(args->rows_k, args->sequences, KEPT);
  const unsigned tiles_q = qm_attention_tiles(args->rows_q, args->sequences, KEPT);
  const int64_t row_blocks = qm_ceil_div(args->rows_q, 128 / (D / 8)) * args->heads;
  if (row_blocks > 0)
    summarize<T, D><<<(unsigned)row_blocks, 128, 0, cuda->compute>>>(
        (const T *)args->dout.data, (const T *)args->out.data, (const float *)args->lse.data, rows,
        shape.rows_q, shape.heads);
  gather_dkv<T, D><<<blocks(tiles_k, args->kv_heads), THREADS, plan::DKV_BYTES, cuda->compute>>>(
      shape, keep_k, x, tiles_k);
  gather_dq<T, D><<<blocks(tiles_q, args->heads), THREADS, plan::DQ_BYTES, cuda->compute>>>(
      shape, keep_q, x, tiles_q);
  return qm_cuda_launched(cuda, "attention_backward");
}

int32_t qm_cuda_attention_backward_wgmma(qm_cuda *cuda, const qm_attention_backward_args *args) {
  return qm_with_half(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    return args->head_size == 64 ? launch<T, 64>(cuda, args) : launch<T, 128>(cuda, args);
  });
}
