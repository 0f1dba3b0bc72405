/* row.cuh - a row's largest value and its sum of exponentials, in one pass (arXiv 1805.02867). */
#ifndef QM_ROW_CUH
#define QM_ROW_CUH

#include "pack.cuh"

enum { QM_ROW_THREADS = 512 };

/* exp(x - most); with most minus infinity the row is all minus infinity, or NaN. */
__device__ __forceinline__ float qm_row_exp(float x, float most) {
  return exp2f((x - most) * 1.4426950409f);
}

struct qm_row_sum {
  float most, sum; /* sum of exp(x - most) */
};

__device__ __forceinline__ qm_row_sum qm_row_join(qm_row_sum a, qm_row_sum b) {
  const float most = fmaxf(a.most, b.most);
  /* Nothing but minus infinity so far: 0, or the NaN that is there. */
  if (most == -INFINITY) return {most, a.sum + b.sum};
  return {most, a.sum * qm_row_exp(a.most, most) + b.sum * qm_row_exp(b.most, most)};
}

/* Elements before x + i reach an aligned address. */
template <typename T>
__device__ __forceinline__ int64_t qm_row_head(const T *x, int64_t columns) {
  const int64_t misaligned = (int64_t)((uintptr_t)x % 16 / sizeof(T));
  const int64_t head = misaligned == 0 ? 0 : qm_width<T> - misaligned;
  return head < columns ? head : columns;
}

template <int N>
__device__ __forceinline__ void qm_row_add(qm_row_sum &state, const float (&v)[N]) {
  float most = v[0];
#pragma unroll
  for (int i = 1; i < N; i++) most = fmaxf(most, v[i]);
  if (most > state.most) { /* minus infinity, with nothing summed yet, gives a factor of 0 */
    state.sum *= qm_row_exp(state.most, most);
    state.most = most;
  }
  const float base = state.most == -INFINITY ? 0.0f : state.most;
#pragma unroll
  for (int i = 0; i < N; i++) state.sum += qm_row_exp(v[i], base);
}

/* The whole row's, in every thread of a block of QM_ROW_THREADS. Synchronizes the block. */
template <typename T>
__device__ __forceinline__ qm_row_sum qm_row_reduce(const T *x, int64_t columns) {
  constexpr int N = qm_width<T>;
  const int64_t head = qm_row_head(x, columns), packs = (columns - head) / N;
  const int64_t tail = head + packs * N + threadIdx.x;
  qm_row_sum state = {-INFINITY, 0.0f};
  for (int64_t i = threadIdx.x; i < packs; i += QM_ROW_THREADS) {
    float v[N];
    qm_read<N>(x + head + i * N, true, N, v);
    qm_row_add<N>(state, v);
  }
  if (threadIdx.x < head) {
    const float v[1] = {qm_float(x[threadIdx.x])};
    qm_row_add<1>(state, v);
  }
  if (tail < columns) {
    const float v[1] = {qm_float(x[tail])};
    qm_row_add<1>(state, v);
  }
  __shared__ qm_row_sum shared[QM_ROW_THREADS / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    state = qm_row_join(state, {__shfl_xor_sync(0xFFFFFFFFu, state.most, offset),
                                __shfl_xor_sync(0xFFFFFFFFu, state.sum, offset)});
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = state;
  __syncthreads();
  state = shared[0];
  for (int i = 1; i < QM_ROW_THREADS / 32; i++) state = qm_row_join(state, shared[i]);
  return state;
}

/* out[i] = op(x[i], i) over a row; x may be out. */
template <typename T, typename Op>
__device__ __forceinline__ void qm_row_map(const T *x, T *out, int64_t columns, Op op) {
  constexpr int N = qm_width<T>;
  const bool together = ((uintptr_t)x - (uintptr_t)out) % 16 == 0;
  const int64_t head = together ? qm_row_head(x, columns) : columns;
  const int64_t packs = (columns - head) / N;
  for (int64_t i = threadIdx.x; i < packs; i += QM_ROW_THREADS) {
    const int64_t first = head + i * N;
    float v[N];
    qm_read<N>(x + first, true, N, v);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = op(v[j], first + j);
    qm_write<N>(out + first, true, N, v);
  }
  for (int64_t i = threadIdx.x; i < head; i += QM_ROW_THREADS)
    out[i] = qm_as<T>(op(qm_float(x[i]), i));
  for (int64_t i = head + packs * N + threadIdx.x; i < columns; i += QM_ROW_THREADS)
    out[i] = qm_as<T>(op(qm_float(x[i]), i));
}

#endif
