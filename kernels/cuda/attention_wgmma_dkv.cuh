/* attention_wgmma_dkv.cuh - the gradients of keys and values with Hopper's warpgroup products: a
** block
** keeps a tile of keys and walks over the queries that see it. Part of
** attention_wgmma_backward.cu. */
#ifndef QM_ATTENTION_WGMMA_DKV_CUH
#define QM_ATTENTION_WGMMA_DKV_CUH

#include "attention_wgmma.cuh"

enum { GROUPS = 2, KEPT = 64 * GROUPS, THREADS = 128 * (GROUPS + 1), STAGES = 2 };
enum {
  REGISTERS = 240,
  REGISTERS_LEFT = 24,
  ROW_LOADERS = 96 /* the copying group's other warps */
};

/* PASSING rows to a tile of those that pass: as many as the registers have room for. */
template <int D>
struct backward_plan {
  static constexpr int QUERIES = 64, KEYS = D == 64 ? 128 : 64;
  static constexpr int KEPT_BYTES = KEPT * D * 2;
  static constexpr int DKV_BYTES = 2 * KEPT_BYTES + STAGES * 2 * QUERIES * D * 2 + 1024;
  static constexpr int DQ_BYTES = 2 * KEPT_BYTES + STAGES * 2 * KEYS * D * 2 + 1024;
};

template <typename T>
struct gradients {
  const float *lse, *delta;
  T *dq, *dk, *dv;
};
struct maps {
  CUtensorMap q, k, v, dout;
};

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS, 1)
    gather_dkv(qm_attention_shape shape, const __grid_constant__ maps from, gradients<T> x) {
#ifdef QM_HAS_WGMMA_HERE
  constexpr int QUERIES = backward_plan<D>::QUERIES, BYTES = QUERIES * D * 2;
  constexpr int KEPT_BYTES = backward_plan<D>::KEPT_BYTES;
  extern __shared__ char unaligned[];
  char *const tile_k = qm_align_tile(unaligned), *const tile_v = tile_k + KEPT_BYTES;
  char *const tile_q = tile_v + KEPT_BYTES, *const tile_d = tile_q + STAGES * BYTES;
  __shared__ float lses[STAGES][QUERIES], deltas[STAGES][QUERIES];
  __shared__ uint64_t kept, full[STAGES], empty[STAGES];

  int32_t s, row;
  const int32_t kv_head = blockIdx.y, shared_by = shape.heads / shape.kv_heads;
  if (!qm_attention_locate(shape.cu_k, shape.sequences, KEPT, blockIdx.x, &s, &row)) return;
  const qm_attention_span span = qm_attention_span_of(shape, s);
  int32_t first, end, open, close; /* all keys of the tile are seen from open up to close */
  qm_attention_queries(shape, span, row, &first, &close);
  qm_attention_queries(shape, span, min(row + KEPT, span.k_end) - 1, &open, &end);
  const int32_t tiles = (max(end - first, 0) + QUERIES - 1) / QUERIES, steps = tiles * shared_by;

  if (threadIdx.x == 0) {
    qm_barrier_open(&kept, 1);
    for (int i = 0; i < STAGES; i++) {
      qm_barrier_open(&full[i], 1 + ROW_LOADERS);
      qm_barrier_open(&empty[i], 4 * GROUPS);
    }
    qm_barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    qm_registers_release<REGISTERS_LEFT>();
    if (threadIdx.x == 0) {
      qm_barrier_expect(&kept, 2 * KEPT_BYTES);
      qm_copy_rows<D, KEPT>(tile_k, &from.k, kv_head, row, &kept);
      qm_copy_rows<D, KEPT>(tile_v, &from.v, kv_head, row, &kept);
    }
    for (int32_t i = 0; i < steps; i++) {
      const int32_t stage = i % STAGES, head = kv_head * shared_by + i / tiles;
      const int32_t query = first + i % tiles * QUERIES;
      if (i >= STAGES) qm_barrier_wait(&empty[stage], (i / STAGES + 1) % 2);
      if (threadIdx.x == 0) {
        qm_barrier_expect(&full[stage], 2 * BYTES);
        qm_copy_rows<D, QUERIES>(tile_q + stage * BYTES, &from.q, head, query, &full[stage]);
        qm_copy_rows<D, QUERIES>(tile_d + stage * BYTES, &from.dout, head, query, &full[stage]);
      } else if (threadIdx.x >= 128 - ROW_LOADERS) {
        for (int32_t r = (int32_t)threadIdx.x - (128 - ROW_LOADERS); r < QUERIES;
             r += ROW_LOADERS) {
          const int64_t of = (int64_t)(query + r) * shape.heads + head;
          lses[stage][r] = query + r < end ? x.lse[of] : INFINITY;
          deltas[stage][r] = query + r < end ? x.delta[of] : 0.0f;
        }
        qm_barrier_arrive(&full[stage]);
      }
    }
    return;
  }

  qm_registers_take<REGISTERS>();
  const int32_t group = (int32_t)threadIdx.x / 128 - 1, lane = threadIdx.x % 32, t = lane % 4;
  const int32_t warp_row = group * 64 + (int32_t)threadIdx.x % 128 / 32 * 16, g = lane / 4;
  const uint64_t keys = qm_tile(tile_k + group * 64 * 128);
  const uint64_t values = qm_tile(tile_v + group * 64 * 128);
  const float scale = shape.scale * QM_LOG2E;
  int32_t seen_first[2], seen_end[2];
#pragma unroll
  for (int half = 0; half < 2; half++)
    qm_attention_queries(shape, span, row + warp_row + g + 8 * half, &seen_first[half],
                         &seen_end[half]);

  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  if (steps > 0) qm_barrier_wait(&kept, 0);
  for (int32_t i = 0; i < steps; i++) {
    const int32_t stage = i % STAGES, query = first + i % tiles * QUERIES;
    float scores[QUERIES / 8][4];
    uint32_t weights[QUERIES / 16][4];
    qm_barrier_wait(&full[stage], i / STAGES % 2);
    qm_products_begin();
    qm_multiply_tiles<T, D, KEPT, QUERIES>(scores, keys, qm_tile(tile_q + stage * BYTES));
    qm_products_wait<0>();
    qm_pin(scores);
    const bool masked = query < open || query + QUERIES > close;
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int32_t column = n * 8 + 2 * t + j % 2, of = query + column;
        const bool seen = !masked || (of >= seen_first[j / 2] && of < seen_end[j / 2]);
        const float p = exp2f(fmaf(scores[n][j], scale, -lses[stage][column] * QM_LOG2E));
        scores[n][j] = seen ? p : 0.0f;
      }
#pragma unroll
    for (int step = 0; step < QUERIES / 16; step++)
      qm_weights_fragment<T>(weights[step], scores, step);
    float slopes[QUERIES / 8][4];
    qm_pin(dv);
    qm_products_begin();
    qm_multiply_tiles<T, D, KEPT, QUERIES>(slopes, values, qm_tile(tile_d + stage * BYTES));
    const uint64_t douts = qm_tile_along(tile_d + stage * BYTES, QUERIES * 128);
#pragma unroll
    for (int step = 0; step < QUERIES / 16; step++)
      qm_product<T, 1>(dv, weights[step], qm_tile_at(douts, step * 16 * 128), false);
    qm_products_commit();
    qm_products_wait<1>();
    qm_pin(slopes);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        /* P as the product above takes it: its f32 has no registers to stay in */
        const float p = qm_half_of<T>(weights[n / 2][n % 2 * 2 + j / 2], j % 2);
        const float dp = slopes[n][j] - deltas[stage][n * 8 + 2 * t + j % 2];
        slopes[n][j] = p == 0.0f ? 0.0f : p * dp;
      }
    uint32_t steep[QUERIES / 16][4];
#pragma unroll
    for (int step = 0; step < QUERIES / 16; step++)
      qm_weights_fragment<T>(steep[step], slopes, step);
    qm_pin(dk);
    qm_products_begin();
    const uint64_t queries = qm_tile_along(tile_q + stage * BYTES, QUERIES * 128);
#pragma unroll
    for (int step = 0; step < QUERIES / 16; step++)
      qm_product<T, 1>(dk, steep[step], qm_tile_at(queries, step * 16 * 128), false);
    qm_products_commit();
    qm_products_wait<0>();
    qm_pin(dk);
    qm_pin(dv);
    if (lane == 0) qm_barrier_arrive(&empty[stage]);
  }
  const int32_t mine = row + warp_row, there = span.k_end - mine;
  qm_store_rows(x.dk + mine * shape.stride_k + (int64_t)kv_head * D, shape.stride_k, there, dk,
                {shape.scale, shape.scale});
  qm_store_rows(x.dv + mine * shape.stride_v + (int64_t)kv_head * D, shape.stride_v, there, dv,
                {1.0f, 1.0f});
#endif
}

#endif
