/* row.cuh - a row's largest value and its sum of exponentials, in one pass (arXiv 1805.02867).
**
** Everything is in powers of two: with L = log2(e) rounded to f32, exp(x - m) is taken as
** 2^(L x - base), base = fl(L m), so that an element costs one fmaf and one ex2.
*/
#ifndef QM_ROW_CUH
#define QM_ROW_CUH

#include "pack.cuh"

static constexpr float QM_LOG2_E = 1.44269504f;

/* 2^x to 2 ulp; below 2^-126 it is 0. */
__device__ __forceinline__ float qm_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* sum = sum of 2^(L x - base), base = L times the largest; of nothing, base is minus infinity. */
struct qm_row_sum {
  float base, sum;
  /* Where all are minus infinity, their distance from 0 stands for that from the largest. */
  __device__ __forceinline__ float shift() const { return base == -INFINITY ? 0.0f : base; }
  __device__ __forceinline__ float term(float x) const {
    return qm_exp2(fmaf(x, QM_LOG2_E, -shift()));
  }
  /* log of the sum of exp(x) less `chosen`. base belongs to L and not to log2(e). */
  __device__ __forceinline__ float loss(float chosen) const {
    return (float)((double)logf(sum) + (double)base * (1.0 / (double)QM_LOG2_E) - (double)chosen);
  }
};

__device__ __forceinline__ qm_row_sum qm_row_nothing() { return {-INFINITY, 0.0f}; }

template <int N>
__device__ __forceinline__ void qm_row_add(qm_row_sum &row, const float (&v)[N]) {
  float most = v[0];
#pragma unroll
  for (int i = 1; i < N; i++) most = fmaxf(most, v[i]);
  most *= QM_LOG2_E;
  if (most > row.base) {
    row.sum *= qm_exp2(row.base - most);
    row.base = most;
  }
#pragma unroll
  for (int i = 0; i < N; i++) row.sum += row.term(v[i]);
}

/* The warp's whole, in every lane. */
__device__ __forceinline__ qm_row_sum qm_row_warp_join(qm_row_sum row) {
  const float base = qm_warp_max(row.base);
  const qm_row_sum whole = {base, 0.0f};
  return {base, qm_warp_sum(row.sum * qm_exp2(row.base - whole.shift()))};
}

/* The block's whole, in every thread; `partial`, of 32, is written before the barrier and read
** behind
** it. Synchronizes the block. */
__device__ __forceinline__ qm_row_sum qm_row_block_join(qm_row_sum row, qm_row_sum *partial) {
  row = qm_row_warp_join(row);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = row;
  __syncthreads();
  const bool there = threadIdx.x % 32 < blockDim.x / 32;
  return qm_row_warp_join(there ? partial[threadIdx.x % 32] : qm_row_nothing());
}

/* A row as packs of 16 aligned bytes and the edges before and behind them. */
template <typename T>
struct qm_row_parts {
  static constexpr int N = qm_width<T>;
  int head, packs, edges;
  __device__ __forceinline__ qm_row_parts(const T *x, int64_t columns) {
    const int misaligned = (int)((uintptr_t)x % 16 / sizeof(T));
    head = misaligned == 0 ? 0 : N - misaligned;
    if (head > columns) head = (int)columns;
    packs = (int)((columns - head) / N);
    edges = (int)(columns - (int64_t)packs * N);
  }
  /* Where the edge element of this number stands. */
  __device__ __forceinline__ int64_t edge(int number) const {
    return number < head ? number : (int64_t)packs * N + number;
  }
};

#endif
