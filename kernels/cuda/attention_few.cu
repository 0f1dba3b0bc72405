/* attention_few.cu - flash attention of few queries, as in generation, for 16-bit elements and head
** sizes 64 and 128: here reading keys and values takes the time, so the keys are split over blocks.
**
** A block takes one query row's heads that share a key head: up to 16, the rows of the tensor
** cores' products. Its warps take 16 keys at a time, straight from memory into the operands'
** registers: which element of a sum a register holds is free as long as both operands agree.
** Splits of one query meet in scratch, where the block that comes last adds them in order: the same
** bits every time. Source: Dao et al., Flash-Decoding, 2023.
*/
#include "attention_few.h"
#include "attention_few_sums.cuh"

/* How many blocks of a query and key head have left their sums; 0 between launches. */
static __device__ uint32_t tickets[TICKETS];

/* 16 bytes of a row, zeros where it is none of this split's. */
template <typename T>
static __device__ __forceinline__ uint4 piece(const T *row, bool there) {
  return there ? *(const uint4 *)row : make_uint4(0, 0, 0, 0);
}
static __device__ __forceinline__ uint32_t word(const uint4 &piece, int i) {
  return i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w;
}

/* The weights' sums over keys key .. end - 1, every WARPS-th 16 of them. Lane (g, t) holds of
** queries and keys the elements 8 t .. 8 t + 7 of each 32, of values the columns 8 g .. 8 g + 7 of
** each 64. */
template <typename T, int D>
static __device__ __forceinline__ void gather(const qm_attention_shape &shape, const T *q,
                                              const T *k, const T *v, int32_t group, int32_t key,
                                              int32_t end, qm_row_softmax &rows,
                                              float (&gathered)[D / 8][4]) {
  const int32_t g = (int32_t)threadIdx.x % 32 / 4, t = (int32_t)threadIdx.x % 4;
  const float scale = shape.scale * QM_LOG2E;
  uint4 queries[D / 32][2];
#pragma unroll
  for (int c = 0; c < D / 32; c++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      queries[c][half] = piece(q + (g + 8 * half) * D + 32 * c + 8 * t, g + 8 * half < group);

  for (; key < end; key += TILE) {
    uint4 keys[2][D / 32], values[D / 64][4];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int c = 0; c < D / 32; c++) {
        const int32_t row = key + 8 * n + g;
        keys[n][c] = piece(k + row * shape.stride_k + 32 * c + 8 * t, row < end);
      }
#pragma unroll
    for (int b = 0; b < D / 64; b++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int32_t row = key + 2 * t + i % 2 + i / 2 * 8;
        values[b][i] = piece(v + row * shape.stride_v + 64 * b + 8 * g, row < end);
      }
    float scores[2][4] = {}, keep[2];
#pragma unroll
    for (int c = 0; c < D / 32; c++)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const uint32_t a[4] = {word(queries[c][0], j), word(queries[c][1], j),
                               word(queries[c][0], j + 1), word(queries[c][1], j + 1)};
#pragma unroll
        for (int n = 0; n < 2; n++)
          qm_mma<T>(scores[n], a, word(keys[n][c], j), word(keys[n][c], j + 1));
      }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (key + 8 * n + 2 * t + i % 2 >= end) scores[n][i] = -INFINITY;
    qm_weigh(rows, scores, keep, scale);
    qm_scale_rows(gathered, keep);
    uint32_t weights[4];
    qm_weights_fragment<T>(weights, scores, 0);
#pragma unroll
    for (int b = 0; b < D / 64; b++)
#pragma unroll
      for (int j = 0; j < 8; j++) { /* column 8 g + j: of two rows, the halves of one word */
        const uint32_t half = j % 2 ? 0x7632 : 0x5410;
        qm_mma<T>(gathered[8 * b + j], weights,
                  __byte_perm(word(values[b][0], j / 2), word(values[b][1], j / 2), half),
                  __byte_perm(word(values[b][2], j / 2), word(values[b][3], j / 2), half));
      }
  }
}

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS)
    attend_few(qm_attention_shape shape, const T *q, const T *k, const T *v, T *out, float *lse,
               head_sums<D> *partial, qm_cuda_late *late) {
  extern __shared__ __align__(16) char memory[];
  head_sums<D> *const parts = (head_sums<D> *)memory; /* [WARPS][group] */
  const int32_t kv_head = (int32_t)blockIdx.x, query = (int32_t)blockIdx.y;
  const int32_t split = (int32_t)blockIdx.z, splits = (int32_t)gridDim.z;
  const int32_t group = shape.heads / shape.kv_heads, warp = (int32_t)threadIdx.x / 32;
  qm_take_turn();
  if (kv_head + query + split == 0) qm_attention_check(shape, late);
  const qm_attention_span span = qm_attention_span_at(shape, query);
  int32_t first, end;
  qm_attention_keys(shape, span, query, &first, &end);
  /* Two tiles, one after the other, take less time than two blocks that add up. */
  const int32_t keys = end - first, even = (keys + splits - 1) / splits;
  const int32_t split_keys =
      keys <= 2 * TILE ? 2 * TILE : max(TILE, (even + WARP_KEYS - 1) / WARP_KEYS * WARP_KEYS);
  const int32_t busy = keys == 0 ? 1 : (keys + split_keys - 1) / split_keys;
  if (split >= busy) return;
  first += split * split_keys;
  end = min(end, first + split_keys);

  qm_row_softmax rows;
  float gathered[D / 8][4] = {};
  const int64_t kv = (int64_t)kv_head * D;
  gather<T, D>(shape, q + query * shape.stride_q + kv * group, k + kv, v + kv, group,
               first + warp * WARP_KEYS, end, rows, gathered);

  const int32_t g = (int32_t)threadIdx.x % 32 / 4, t = (int32_t)threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    if (g + 8 * half >= group) continue;
    head_sums<D> *const mine = parts + warp * group + g + 8 * half;
#pragma unroll
    for (int b = 0; b < D / 64; b++)
#pragma unroll
      for (int i = 0; i < 2; i++) /* eight columns side by side */
#pragma unroll
        for (int j = 0; j < 8; j += 2)
          *(float2 *)(mine->values + 64 * b + 8 * (2 * t + i) + j) =
              make_float2(gathered[8 * b + j][2 * half + i], gathered[8 * b + j + 1][2 * half + i]);
    if (t != 0) continue;
    mine->most = rows.most[half];
    mine->sum = sum;
  }
  __syncthreads();

  const int64_t of = (int64_t)query * shape.heads + (int64_t)kv_head * group;
  head_sums<D> *const nowhere = NULL;
  if (busy == 1) return add_warps(parts, group, nowhere, out + of * D, lse + of);
  head_sums<D> *const splits_at = partial + of * splits; /* [splits][group] */
  add_warps(parts, group, splits_at + split * group, (T *)NULL, NULL);
  __shared__ uint32_t ticket;
  __threadfence();
  __syncthreads();
  uint32_t *const counter = tickets + query * shape.kv_heads + kv_head;
  if (threadIdx.x == 0) ticket = atomicAdd(counter, 1u);
  __syncthreads();
  if (ticket + 1 != (uint32_t)busy) return;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  add_splits(splits_at, busy, group, (float *)memory, out + of * D, lse + of);
}

bool qm_cuda_attention_is_few(const qm_attention_args *args) {
  return args->rows_q <= ROWS_MAX && args->heads <= GROUP_MAX * args->kv_heads &&
         (args->head_size == 64 || args->head_size == 128);
}

template <typename T, int D>
static int32_t launch(qm_cuda *cuda, const qm_attention_args *args) {
  const qm_attention_shape shape = qm_attention_shape_of(args);
  const int64_t blocks = args->rows_q * args->kv_heads, group = args->heads / args->kv_heads;
  /* As many blocks as there is room for at once by their registers, none without keys. */
  const int64_t room = (D == 64 ? 2 : 1) * (int64_t)cuda->multiprocessors / blocks;
  const int64_t tiles = qm_ceil_div(args->rows_k, TILE);
  const int64_t most = tiles < splits_most<D> ? tiles : splits_most<D>;
  const int64_t splits = room < 2 || most < 2 || blocks > TICKETS ? 1 : room < most ? room : most;
  head_sums<D> *partial = NULL;
  if (splits > 1) {
    const int64_t size_bytes = splits * blocks * group * (int64_t)sizeof *partial;
    const int32_t status = qm_cuda_scratch(cuda, size_bytes, (void **)&partial);
    if (status != QM_OK) return status;
  }
  const int64_t shared_bytes = WARPS * group * (int64_t)sizeof *partial;
  const int32_t status = qm_cuda_check(
      cudaFuncSetAttribute(attend_few<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           (int)(WARPS * GROUP_MAX * sizeof *partial)),
      "attention");
  if (status != QM_OK) return status;
  const dim3 grid((unsigned)args->kv_heads, (unsigned)args->rows_q, (unsigned)splits);
  qm_launch_early(cuda, attend_few<T, D>, grid, dim3(THREADS), (int32_t)shared_bytes, shape,
                  (const T *)args->q.data, (const T *)args->k.data, (const T *)args->v.data,
                  (T *)args->out.data, (float *)args->lse.data, partial, cuda->late_device);
  return qm_cuda_launched(cuda, "attention");
}

int32_t qm_cuda_attention_few(qm_cuda *cuda, const qm_attention_args *args) {
  return qm_with_half(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    return args->head_size == 64 ? launch<T, 64>(cuda, args) : launch<T, 128>(cuda, args);
  });
}
