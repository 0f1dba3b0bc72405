/* attention_wgmma_dkv.cuh - the gradients of keys and values with Hopper's warpgroup products: a
** block takes tiles of keys and walks over the queries that see them. Part of
** attention_wgmma_backward.cu. */
#ifndef QM_ATTENTION_WGMMA_DKV_CUH
#define QM_ATTENTION_WGMMA_DKV_CUH

#include "attention_wgmma.cuh"

enum { GROUPS = 2, KEPT = 64 * GROUPS, THREADS = 128 * (GROUPS + 1) };
enum { REGISTERS = 240, REGISTERS_LEFT = 24 };

/* KEPT rows stay while tiles of QUERIES or KEYS rows pass: as many as the registers have room for.
** AHEAD: there is also room for gather_dkv to begin a step's products before the last one's are done. */
template <int D>
struct backward_plan {
  static constexpr int QUERIES = 64, KEYS = D == 64 ? 128 : 64, DKV_STAGES = 3, DQ_STAGES = 3;
  static constexpr bool AHEAD = D == 64;
  static constexpr int KEPT_BYTES = KEPT * D * 2;
  static constexpr int DKV_BYTES = 2 * KEPT_BYTES + DKV_STAGES * 2 * QUERIES * D * 2 + 1024;
  static constexpr int DQ_BYTES = 2 * KEPT_BYTES + DQ_STAGES * 2 * KEYS * D * 2 + 1024;
};

/* What a query's row is to its gradients: see qm_minus_lse, and delta = dout . out. */
typedef float2 query_row;

template <typename T>
struct gradients {
  const query_row *rows; /* [H, RQ] */
  T *dq, *dk, *dv;
};
struct maps {
  CUtensorMap q, k, v, dout;
};

/* A tile that stays, as the fetching warp tells the others. */
struct kept_tile {
  qm_attention_span span;
  int32_t head, row;         /* head: of queries in gather_dq, of keys in gather_dkv */
  int32_t first, end, steps; /* the rows that pass, and in how many steps; < 0: no more tiles */
  int32_t open, close;       /* all rows of the tile meet those from open up to close */
};

/* Where a weight is 0 the slope is too, whatever the rows of others hold. */
template <int COLUMNS>
static __device__ __forceinline__ void qm_hide_slopes(float (&slopes)[COLUMNS][4],
                                                      const float (&weights)[COLUMNS][4]) {
#pragma unroll
  for (int n = 0; n < COLUMNS; n++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (weights[n][j] == 0.0f) slopes[n][j] = 0.0f;
}

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS, 1)
    gather_dkv(qm_attention_shape shape, const __grid_constant__ maps from, gradients<T> x,
               uint32_t tiles) {
#ifdef QM_HAS_WGMMA_HERE
  using plan = backward_plan<D>;
  constexpr int QUERIES = plan::QUERIES, BYTES = QUERIES * D * 2, STAGES = plan::DKV_STAGES;
  extern __shared__ char unaligned[];
  char *const tile_k = qm_align_tile(unaligned), *const tile_v = tile_k + plan::KEPT_BYTES;
  char *const tile_q = tile_v + plan::KEPT_BYTES, *const tile_d = tile_q + STAGES * BYTES;
  __shared__ kept_tile tiles_at_work[2];
  __shared__ query_row rows[STAGES][QUERIES];
  __shared__ uint64_t kept_full, kept_empty, full[STAGES], empty[STAGES];
  const int32_t shared_by = shape.heads / shape.kv_heads;

  if (threadIdx.x == 0) {
    qm_barrier_open(&kept_full, 1);
    qm_barrier_open(&kept_empty, 4 * GROUPS);
    for (int i = 0; i < STAGES; i++) {
      qm_barrier_open(&full[i], 1 + 32);
      qm_barrier_open(&empty[i], 4 * GROUPS);
    }
    qm_barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) { /* the fetching group: one warp of it */
    qm_registers_release<REGISTERS_LEFT>();
    if (threadIdx.x >= 32) return;
    const bool leads = threadIdx.x == 0;
    int32_t step = 0; /* over all tiles */
    for (uint32_t turn = 0;; turn++) {
      kept_tile tile;
      tile.steps = -1;
      for (uint32_t item; tile.steps < 0;) {
        if ((item = qm_next_item()) >= tiles * (uint32_t)shape.kv_heads) break;
        int32_t s;
        tile.head = (int32_t)(item % (uint32_t)shape.kv_heads);
        if (!qm_attention_locate(shape.cu_k, shape.sequences, KEPT,
                                 (int32_t)(item / (uint32_t)shape.kv_heads), &s, &tile.row))
          continue;
        tile.span = qm_attention_span_of(shape, s);
        qm_attention_queries(shape, tile.span, tile.row, &tile.first, &tile.close);
        qm_attention_queries(shape, tile.span, min(tile.row + KEPT, tile.span.k_end) - 1,
                             &tile.open, &tile.end);
        tile.steps = (max(tile.end - tile.first, 0) + QUERIES - 1) / QUERIES * shared_by;
      }
      const bool found = tile.steps >= 0;
      qm_barrier_wait(&kept_empty, turn % 2 ^ 1);
      if (leads) {
        tiles_at_work[turn % 2] = tile;
        qm_barrier_expect(&kept_full, found ? 2 * plan::KEPT_BYTES : 0);
        if (found) {
          qm_copy_rows<D, KEPT>(tile_k, &from.k, tile.head, tile.row, &kept_full);
          qm_copy_rows<D, KEPT>(tile_v, &from.v, tile.head, tile.row, &kept_full);
        }
      }
      if (!found) break;
      int32_t head = tile.head * shared_by, query = tile.first;
      for (int32_t i = 0; i < tile.steps; i++, step++) {
        const int32_t stage = step % STAGES;
        query_row mine[QUERIES / 32]; /* asked for before the wait */
#pragma unroll
        for (int r = 0; r < QUERIES / 32; r++) {
          const int32_t of = query + r * 32 + (int32_t)threadIdx.x;
          mine[r] = make_float2(-INFINITY, 0.0f);
          if (of < tile.end) mine[r] = x.rows[(int64_t)head * shape.rows_q + of];
        }
        qm_barrier_wait(&empty[stage], step / STAGES % 2 ^ 1);
        if (leads) {
          qm_barrier_expect(&full[stage], 2 * BYTES);
          qm_copy_rows<D, QUERIES>(tile_q + stage * BYTES, &from.q, head, query, &full[stage]);
          qm_copy_rows<D, QUERIES>(tile_d + stage * BYTES, &from.dout, head, query, &full[stage]);
        }
#pragma unroll
        for (int r = 0; r < QUERIES / 32; r++) rows[stage][r * 32 + threadIdx.x] = mine[r];
        qm_barrier_arrive(&full[stage]);
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

  qm_registers_take<REGISTERS>();
  const int32_t group = (int32_t)threadIdx.x / 128 - 1, lane = threadIdx.x % 32, t = lane % 4;
  const int32_t warp_row = group * 64 + (int32_t)threadIdx.x % 128 / 32 * 16, g = lane / 4;
  const uint64_t keys = qm_tile(tile_k + group * 64 * 128);
  const uint64_t values = qm_tile(tile_v + group * 64 * 128);
  const float scale = shape.scale * QM_LOG2E;
  float scores[QUERIES / 8][4], slopes[QUERIES / 8][4];
  uint32_t weights[QUERIES / 16][4], steep[QUERIES / 16][4];

  const auto differ = [&](int32_t step) { /* begins the products that give scores and slopes */
    const int32_t stage = step % STAGES;
    qm_barrier_wait(&full[stage], step / STAGES % 2);
    qm_multiply_tiles<T, D, KEPT, QUERIES>(scores, keys, qm_tile(tile_q + stage * BYTES));
    qm_multiply_tiles<T, D, KEPT, QUERIES>(slopes, values, qm_tile(tile_d + stage * BYTES));
  };

  int32_t step = 0;
  for (uint32_t turn = 0;; turn++) {
    qm_barrier_wait(&kept_full, turn % 2);
    const kept_tile &tile = tiles_at_work[turn % 2];
    const int32_t steps = tile.steps;
    if (steps < 0) return;
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    int32_t query = tile.first;
    const auto weigh = [&](int32_t stage) { /* scores to P */
      if (query < tile.open || query + QUERIES > tile.close) {
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
              if (of < seen_first || of >= seen_end) scores[n][j] = -INFINITY;
            }
        }
      }
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          scores[n][j] = qm_weight(scores[n][j], scale, rows[stage][n * 8 + 2 * t + j % 2].x);
    };
    const auto slope = [&](int32_t stage) { /* dP to dS */
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float dp = slopes[n][j] - rows[stage][n * 8 + 2 * t + j % 2].y;
          slopes[n][j] = scores[n][j] * dp;
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
    const auto gather = [&](int32_t stage) { /* begins dv += P^T dout, dk += dS^T q */
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
      if (lane == 0) qm_barrier_arrive(&empty[stage]);
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

    if (plan::AHEAD && steps > 0) {
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
        if (lane == 0) qm_barrier_arrive(&empty[before]);
        pack();
      }
      finish(step++ % STAGES);
    } else {
      for (int32_t i = 0; i < steps; i++, step++) {
        begin(step % STAGES);
        finish(step % STAGES);
      }
    }
    if (lane == 0) qm_barrier_arrive(&kept_empty);
    const int32_t mine = tile.row + warp_row, there = tile.span.k_end - mine;
    const int64_t head_at = (int64_t)tile.head * D;
    qm_store_rows(x.dk + mine * shape.stride_k + head_at, shape.stride_k, there, dk,
                  {shape.scale, shape.scale});
    qm_store_rows(x.dv + mine * shape.stride_v + head_at, shape.stride_v, there, dv, {1.0f, 1.0f});
  }
#endif
}

#endif
