/* attention_wgmma_backward.cu - the gradients of flash attention with Hopper's warpgroup products,
** for
** 16-bit elements and head sizes 64 and 128.
**
** As in attention_mma_backward.cu one kernel keeps keys and walks over queries, another keeps
** queries
** and walks over keys, so that no sum depends on timing; a warpgroup keeps 64 rows.
*/
#include "attention_rows.h"
#include "attention_wgmma_dkv.cuh"

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS, 1)
    gather_dq(qm_attention_shape shape, const __grid_constant__ maps from, gradients<T> x) {
#ifdef QM_HAS_WGMMA_HERE
  constexpr int KEYS = backward_plan<D>::KEYS, BYTES = KEYS * D * 2;
  constexpr int KEPT_BYTES = backward_plan<D>::KEPT_BYTES;
  extern __shared__ char unaligned[];
  char *const tile_q = qm_align_tile(unaligned), *const tile_d = tile_q + KEPT_BYTES;
  char *const tile_k = tile_d + KEPT_BYTES, *const tile_v = tile_k + STAGES * BYTES;
  __shared__ uint64_t kept, full[STAGES], empty[STAGES];

  int32_t s, row;
  const int32_t tile = (int32_t)(gridDim.x - 1 - blockIdx.x), head = blockIdx.y;
  if (!qm_attention_locate(shape.cu_q, shape.sequences, KEPT, tile, &s, &row)) return;
  const qm_attention_span span = qm_attention_span_of(shape, s);
  int32_t first, end, open, close;
  qm_attention_keys(shape, span, row, &first, &close);
  qm_attention_keys(shape, span, min(row + KEPT, span.q_end) - 1, &open, &end);
  const int32_t steps = (max(end - first, 0) + KEYS - 1) / KEYS;

  if (threadIdx.x == 0) {
    qm_barrier_open(&kept, 1);
    for (int i = 0; i < STAGES; i++) {
      qm_barrier_open(&full[i], 1);
      qm_barrier_open(&empty[i], 4 * GROUPS);
    }
    qm_barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    qm_registers_release<REGISTERS_LEFT>();
    if (threadIdx.x != 0) return;
    const int32_t kv_head = (int32_t)((int64_t)head * shape.kv_heads / shape.heads);
    qm_barrier_expect(&kept, 2 * KEPT_BYTES);
    qm_copy_rows<D, KEPT>(tile_q, &from.q, head, row, &kept);
    qm_copy_rows<D, KEPT>(tile_d, &from.dout, head, row, &kept);
    for (int32_t i = 0; i < steps; i++) {
      const int32_t stage = i % STAGES, key = first + i * KEYS;
      if (i >= STAGES) qm_barrier_wait(&empty[stage], (i / STAGES + 1) % 2);
      qm_barrier_expect(&full[stage], 2 * BYTES);
      qm_copy_rows<D, KEYS>(tile_k + stage * BYTES, &from.k, kv_head, key, &full[stage]);
      qm_copy_rows<D, KEYS>(tile_v + stage * BYTES, &from.v, kv_head, key, &full[stage]);
    }
    return;
  }

  qm_registers_take<REGISTERS>();
  const int32_t group = (int32_t)threadIdx.x / 128 - 1, lane = threadIdx.x % 32, t = lane % 4;
  const int32_t warp_row = group * 64 + (int32_t)threadIdx.x % 128 / 32 * 16, g = lane / 4;
  const uint64_t queries = qm_tile(tile_q + group * 64 * 128);
  const uint64_t douts = qm_tile(tile_d + group * 64 * 128);
  const float scale = shape.scale * QM_LOG2E;
  float lse[2], delta[2];
  int32_t seen_first[2], seen_end[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int32_t query = row + warp_row + half * 8 + g;
    const int64_t of = (int64_t)query * shape.heads + head;
    const bool inside = query < span.q_end;
    lse[half] = inside ? x.lse[of] : INFINITY;
    delta[half] = inside ? x.delta[of] : 0.0f;
    seen_first[half] = seen_end[half] = 0;
    if (inside) qm_attention_keys(shape, span, query, &seen_first[half], &seen_end[half]);
  }

  float dq[D / 8][4] = {};
  if (steps > 0) qm_barrier_wait(&kept, 0);
  for (int32_t i = 0; i < steps; i++) {
    const int32_t stage = i % STAGES, key = first + i * KEYS;
    float scores[KEYS / 8][4], slopes[KEYS / 8][4];
    uint32_t steep[KEYS / 16][4];
    qm_barrier_wait(&full[stage], i / STAGES % 2);
    qm_products_begin();
    qm_multiply_tiles<T, D, KEPT, KEYS>(scores, queries, qm_tile(tile_k + stage * BYTES));
    qm_multiply_tiles<T, D, KEPT, KEYS>(slopes, douts, qm_tile(tile_v + stage * BYTES));
    qm_products_wait<0>();
    qm_pin(scores);
    qm_pin(slopes);
    const bool masked = key < open || key + KEYS > close;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int32_t at = key + n * 8 + 2 * t + j % 2;
        const bool seen = !masked || (at >= seen_first[j / 2] && at < seen_end[j / 2]);
        qm_differentiate(scores[n][j], slopes[n][j], scale, lse[j / 2], delta[j / 2], seen);
      }
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) qm_weights_fragment<T>(steep[step], slopes, step);
    qm_pin(dq);
    qm_products_begin();
    const uint64_t keys = qm_tile_along(tile_k + stage * BYTES, KEYS * 128);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++)
      qm_product<T, 1>(dq, steep[step], qm_tile_at(keys, step * 16 * 128), false);
    qm_products_commit();
    qm_products_wait<0>();
    qm_pin(dq);
    if (lane == 0) qm_barrier_arrive(&empty[stage]);
  }
  const int32_t mine = row + warp_row;
  qm_store_rows(x.dq + mine * shape.stride_q + (int64_t)head * D, shape.stride_q, span.q_end - mine,
                dq, {shape.scale, shape.scale});
#endif
}

template <typename T, int D>
static int32_t launch(qm_cuda *cuda, const qm_attention_backward_args *args,
                      const gradients<T> &x) {
  using plan = backward_plan<D>;
  const qm_attention_shape shape = qm_attention_shape_of(args);
  const int64_t own = args->heads * D; /* dout stands alone */
  const auto map = [&](CUtensorMap *out, const qm_array &a, bool key, int64_t stride, int box) {
    return qm_map_rows(out, &a, key ? args->rows_k : args->rows_q,
                       key ? args->kv_heads : args->heads, D, stride, (uint32_t)box);
  };
  maps keep_k, keep_q;
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
          "attention_backward")};
  for (const int32_t status : statuses)
    if (status != QM_OK) return status;
  const dim3 grid_q(qm_attention_tiles(args->rows_q, args->sequences, KEPT), (unsigned)args->heads);
  const dim3 grid_k(qm_attention_tiles(args->rows_k, args->sequences, KEPT),
                    (unsigned)args->kv_heads);
  gather_dkv<T, D><<<grid_k, THREADS, plan::DKV_BYTES, cuda->compute>>>(shape, keep_k, x);
  gather_dq<T, D><<<grid_q, THREADS, plan::DQ_BYTES, cuda->compute>>>(shape, keep_q, x);
  return qm_cuda_launched(cuda, "attention_backward");
}

int32_t qm_cuda_attention_backward_wgmma(qm_cuda *cuda, const qm_attention_backward_args *args) {
  float *delta;
  if (const int32_t status = qm_cuda_attention_delta(cuda, args, &delta)) return status;
  return qm_with_half(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    const gradients<T> x = {(const float *)args->lse.data, delta, (T *)args->dq.data,
                            (T *)args->dk.data, (T *)args->dv.data};
    return args->head_size == 64 ? launch<T, 64>(cuda, args, x) : launch<T, 128>(cuda, args, x);
  });
}
