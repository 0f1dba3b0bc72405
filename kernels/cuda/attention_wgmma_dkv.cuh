/* attention_wgmma_dkv.cuh - the gradients of keys and values with Hopper's warpgroup products: a
** block takes tiles of keys and walks over the queries that see them. Part of
** attention_wgmma_backward.cu. */
#ifndef QM_ATTENTION_WGMMA_DKV_CUH
#define QM_ATTENTION_WGMMA_DKV_CUH

#include "attention_wgmma_backward.cuh"

/* Tile `item` of keys, those that the most queries see first; steps stays below 0 where there is
** none. */
template <int QUERIES>
static __device__ __forceinline__ void locate_keys(const qm_attention_shape &shape, uint32_t item,
                                                   kept_tile *tile) {
  int32_t s;
  tile->head = (int32_t)(item % (uint32_t)shape.kv_heads);
  const int32_t index = (int32_t)(item / (uint32_t)shape.kv_heads);
  if (!qm_attention_locate(shape.cu_k, shape.sequences, KEPT, index, &s, &tile->row)) return;
  tile->span = qm_attention_span_of(shape, s);
  qm_attention_queries(shape, tile->span, tile->row, &tile->first, &tile->close);
  qm_attention_queries(shape, tile->span, min(tile->row + KEPT, tile->span.k_end) - 1, &tile->open,
                       &tile->end);
  tile->first -= tile->first % ROWS_ALIGNED; /* those before see none of the keys */
  tile->steps =
      (max(tile->end - tile->first, 0) + QUERIES - 1) / QUERIES * (shape.heads / shape.kv_heads);
}

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS, 1)
    gather_dkv(qm_attention_shape shape, const __grid_constant__ maps from, gradients<T> x,
               uint32_t tiles) {
#ifdef QM_HAS_WGMMA_HERE
  using plan = backward_plan<D>;
  constexpr int QUERIES = plan::QUERIES, BYTES = QUERIES * D * 2, STAGES = plan::STAGES;
  extern __shared__ char unaligned[];
  char *const kept = qm_align_tile(unaligned); /* twice keys and values */
  char *const tile_q = kept + 4 * plan::KEPT_BYTES, *const tile_d = tile_q + STAGES * BYTES;
  __shared__ kept_tile tiles_at_work[4]; /* keys are given back before all is read of their tile */
  alignas(16) __shared__ float minus_lses[STAGES][QUERIES], deltas[STAGES][QUERIES];
  __shared__ uint64_t kept_full[2], kept_empty[2], full[STAGES], empty[STAGES];
  const int32_t shared_by = shape.heads / shape.kv_heads;

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      qm_barrier_open(&kept_full[i], 1);
      qm_barrier_open(&kept_empty[i], 128 * GROUPS);
    }
    for (int i = 0; i < STAGES; i++) {
      qm_barrier_open(&full[i], 1);
      qm_barrier_open(&empty[i], 128 * GROUPS); /* lanes read rows' numbers */
    }
    qm_barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) { /* the fetching group: one warp of it */
    qm_registers_release<plan::DKV_REGISTERS_LEFT>();
    if (threadIdx.x >= 32) return;
    int32_t step = 0; /* over all tiles */
    for (uint32_t turn = 0;; turn++) {
      kept_tile tile;
      tile.steps = -1;
      while (tile.steps < 0) {
        const uint32_t item = qm_next_item();
        if (item >= tiles * (uint32_t)shape.kv_heads) break;
        locate_keys<QUERIES>(shape, item, &tile);
      }
      const bool found = tile.steps >= 0;
      const uint32_t side = turn % 2;
      char *const tile_k = kept + side * 2 * plan::KEPT_BYTES;
      char *const tile_v = tile_k + plan::KEPT_BYTES;
      qm_barrier_wait(&kept_empty[side], turn / 2 % 2 ^ 1);
      if (threadIdx.x == 0) {
        tiles_at_work[turn % 4] = tile;
        qm_barrier_expect(&kept_full[side], found ? 2 * plan::KEPT_BYTES : 0);
        if (found) {
          qm_copy_rows<D, KEPT>(tile_k, &from.k, tile.head, tile.row, &kept_full[side]);
          qm_copy_rows<D, KEPT>(tile_v, &from.v, tile.head, tile.row, &kept_full[side]);
        }
      }
      if (!found) break;
      int32_t head = tile.head * shared_by, query = tile.first;
      for (int32_t i = 0; i < tile.steps; i++, step++) {
        const int32_t stage = step % STAGES;
        qm_barrier_wait(&empty[stage], step / STAGES % 2 ^ 1);
        if (threadIdx.x == 0) {
          constexpr uint32_t NUMBERS_BYTES = QUERIES * sizeof(float);
          const int64_t numbers_at = head * x.rows.stride + query;
          qm_barrier_expect(&full[stage], 2 * BYTES + 2 * NUMBERS_BYTES);
          qm_copy_rows<D, QUERIES>(tile_q + stage * BYTES, &from.q, head, query, &full[stage]);
          qm_copy_rows<D, QUERIES>(tile_d + stage * BYTES, &from.dout, head, query, &full[stage]);
          qm_copy_bulk(minus_lses[stage], x.rows.minus_lse + numbers_at, NUMBERS_BYTES,
                       &full[stage]);
          qm_copy_bulk(deltas[stage], x.rows.delta + numbers_at, NUMBERS_BYTES, &full[stage]);
        }
        query += QUERIES;
        if (query >= tile.end) {
          query = tile.first;
          head++;
        }
      }
    }
    qm_items_done();
    return;
  }

  qm_registers_take<plan::DKV_REGISTERS>();
  const int32_t group = (int32_t)threadIdx.x / 128 - 1, lane = threadIdx.x % 32, t = lane % 4;
  const int32_t warp_row = group * 64 + (int32_t)threadIdx.x % 128 / 32 * 16, g = lane / 4;
  const uint64_t kept_rows = qm_tile(kept + group * 64 * 128);
  const float scale = shape.scale * QM_LOG2E;
  float scores[QUERIES / 8][4], slopes[QUERIES / 8][4];
  uint32_t weights[QUERIES / 16][4], steep[QUERIES / 16][4];
  uint32_t held_keys[D / 16][4], held_values[D / 16][4];

  uint32_t side = 0; /* where the keys and values are */
  /* Begins the products that give scores and slopes */
  const auto differ = [&](int32_t step) {
    const int32_t stage = step % STAGES;
    qm_barrier_wait(&full[stage], step / STAGES % 2);
    const uint64_t queries = qm_tile(tile_q + stage * BYTES);
    const uint64_t douts = qm_tile(tile_d + stage * BYTES);
    if constexpr (plan::ROOM) {
      qm_multiply_fragments<T, D, QUERIES>(scores, held_keys, queries);
      qm_multiply_fragments<T, D, QUERIES>(slopes, held_values, douts);
    } else {
      const uint64_t keys = qm_tile_at(kept_rows, side * 2 * plan::KEPT_BYTES);
      const uint64_t values = qm_tile_at(keys, plan::KEPT_BYTES);
      qm_multiply_tiles<T, D, KEPT, QUERIES>(scores, keys, queries);
      qm_multiply_tiles<T, D, KEPT, QUERIES>(slopes, values, douts);
    }
  };

  int32_t step = 0;
  for (uint32_t turn = 0;; turn++) {
    side = turn % 2;
    qm_barrier_wait(&kept_full[side], turn / 2 % 2);
    const kept_tile &tile = tiles_at_work[turn % 4];
    const int32_t steps = tile.steps;
    if (steps < 0) return;
    if constexpr (plan::ROOM) {
      const char *const tile_k = kept + side * 2 * plan::KEPT_BYTES;
      qm_tile_fragments<D, KEPT>(held_keys, tile_k, warp_row);
      qm_tile_fragments<D, KEPT>(held_values, tile_k + plan::KEPT_BYTES, warp_row);
      qm_barrier_arrive(&kept_empty[side]);
    }
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    int32_t query = tile.first;
    /* Scores to P */
    const auto weigh = [&](int32_t stage) {
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          scores[n][j] = qm_weight(scores[n][j], scale, minus_lses[stage][n * 8 + 2 * t + j % 2]);
      if (query >= tile.open && query + QUERIES <= tile.close) return;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int32_t seen_first, seen_end;
        qm_attention_queries(shape, tile.span, tile.row + warp_row + g + 8 * half, &seen_first,
                             &seen_end);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; j++) {
            const int32_t of = query + n * 8 + 2 * t + j % 2;
            if (of < seen_first || of >= seen_end) scores[n][j] = 0.0f; /* whatever was there */
          }
      }
    };
    /* DP to dS */
    const auto slope = [&](int32_t stage) {
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float delta = deltas[stage][n * 8 + 2 * t + j % 2];
          slopes[n][j] = scores[n][j] * (slopes[n][j] - delta);
        }
      if (query < tile.open || query + QUERIES > tile.close) qm_hide_slopes(slopes, scores);
      query += QUERIES;
      if (query >= tile.end) query = tile.first;
    };
    const auto pack = [&]() {
#pragma unroll
      for (int at = 0; at < QUERIES / 16; at++) {
        qm_weights_fragment<T>(weights[at], scores, at);
        qm_weights_fragment<T>(steep[at], slopes, at);
      }
    };
    /* Begins dv += P^T dout, dk += dS^T q */
    const auto gather = [&](int32_t stage) {
      const uint64_t douts = qm_tile_along(tile_d + stage * BYTES, QUERIES * 128);
      const uint64_t queries = qm_tile_along(tile_q + stage * BYTES, QUERIES * 128);
#pragma unroll
      for (int at = 0; at < QUERIES / 16; at++)
        qm_product<T, 1>(dv, weights[at], qm_tile_at(douts, at * 16 * 128), false);
#pragma unroll
      for (int at = 0; at < QUERIES / 16; at++)
        qm_product<T, 1>(dk, steep[at], qm_tile_at(queries, at * 16 * 128), false);
      qm_products_commit();
    };

    const auto finish = [&](int32_t stage) {
      qm_pin(dv);
      qm_pin(dk);
      qm_products_begin();
      gather(stage);
      qm_products_wait<0>();
      qm_pin(dv);
      qm_pin(dk);
      qm_barrier_arrive(&empty[stage]);
    };
    const auto begin = [&](int32_t stage) {
      qm_products_begin();
      differ(step);
      qm_products_wait<1>();
      qm_pin(scores);
      weigh(stage);
      qm_products_wait<0>();
      qm_pin(slopes);
      slope(stage);
      pack();
    };

    if (plan::ROOM && steps > 0) {
      begin(step % STAGES);
      for (int32_t i = 1; i < steps; i++) {
        const int32_t before = step % STAGES, stage = ++step % STAGES;
        qm_pin(dv);
        qm_pin(dk);
        qm_products_begin();
        differ(step);
        gather(before);
        qm_products_wait<2>();
        qm_pin(scores);
        weigh(stage);
        qm_products_wait<1>();
        qm_pin(slopes);
        slope(stage);
        qm_products_wait<0>();
        qm_pin(dv);
        qm_pin(dk);
        qm_barrier_arrive(&empty[before]);
        pack();
      }
      finish(step++ % STAGES);
    } else {
      for (int32_t i = 0; i < steps; i++, step++) {
        begin(step % STAGES);
        finish(step % STAGES);
      }
    }
    if (!plan::ROOM) qm_barrier_arrive(&kept_empty[side]);
    const int32_t mine = tile.row + warp_row, there = tile.span.k_end - mine;
    const int64_t head_at = (int64_t)tile.head * D;
    qm_store_rows_wide(x.dk + mine * shape.stride_k + head_at, shape.stride_k, there, dk,
                       {shape.scale, shape.scale});
    qm_store_rows_wide(x.dv + mine * shape.stride_v + head_at, shape.stride_v, there, dv,
                       {1.0f, 1.0f});
  }
#endif
}

#endif
