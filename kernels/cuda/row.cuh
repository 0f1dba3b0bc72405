/* row.cuh - a row's largest value and its sum of exponentials, in one pass (arXiv 1805.02867). */
#ifndef QM_ROW_CUH
#define QM_ROW_CUH

#include "pack.cuh"

/* 2^x to 2 ulp; below 2^-126 it is 0. */
__device__ __forceinline__ float qm_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* sum = sum of exp(x - most); of nothing, most is minus infinity. */
struct qm_row_sum {
  float most, sum;
  /* Where all are minus infinity, their distance from 0 stands for that from the largest. */
  __device__ __forceinline__ float shift() const { return most == -INFINITY ? 0.0f : most; }
  __device__ __forceinline__ float term(float x) const {
    return qm_exp2((x - shift()) * 1.44269504f);
  }
};

__device__ __forceinline__ qm_row_sum qm_row_nothing() { return {-INFINITY, 0.0f}; }

template <int N>
__device__ __forceinline__ void qm_row_add(qm_row_sum &row, const float (&v)[N]) {
  float most = v[0];
#pragma unroll
  for (int i = 1; i < N; i++) most = fmaxf(most, v[i]);
  if (most > row.most) {
    row.sum *= qm_row_sum{most, 0.0f}.term(row.most);
    row.most = most;
  }
#pragma unroll
  for (int i = 0; i < N; i++) row.sum += row.term(v[i]);
}

/* The warp's whole, in every lane. */
__device__ __forceinline__ qm_row_sum qm_row_warp_join(qm_row_sum row) {
  const qm_row_sum whole = {qm_warp_max(row.most), 0.0f};
  return {whole.most, qm_warp_sum(row.sum * whole.term(row.most))};
}

/* The block's whole, in every thread; `partial`, of 32, is written before the barrier and read
** behind it. Synchronizes the block. */
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
