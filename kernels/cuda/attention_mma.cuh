/* attention_mma.cuh - what the tensor cores' attention kernels share: where a block works, tiles in
** shared memory, and products of tiles.
**
** A tile is ROWS x D elements with 8 more at the end of each row: ldmatrix then meets no two of its
** eight rows in one bank. One warp multiplies 16 rows (or two times 16) of a left tile with all
** rows of a right one.
*/
#ifndef QM_ATTENTION_MMA_CUH
#define QM_ATTENTION_MMA_CUH

#include "attention_softmax.cuh"

enum { QM_WARPS = 4, QM_THREADS = 32 * QM_WARPS, QM_PAD = 8 };

/* Fetch rows of a head in the background; rows from `there` on become zeros. */
template <typename T, int D, int ROWS>
static __device__ __forceinline__ void qm_fetch(T *tile, const T *x, int64_t stride,
                                                int32_t there) {
  constexpr int CHUNKS = D / 8;
  for (int32_t c = threadIdx.x; c < ROWS * CHUNKS; c += QM_THREADS) {
    const int32_t row = c / CHUNKS, column = c % CHUNKS * 8;
    const bool inside = row < there;
    qm_copy_async(tile + row * (D + QM_PAD) + column,
                  x + (inside ? (int64_t)row : 0) * stride + column, inside);
  }
}

/* Fragment A: 16 rows from `row` of a tile, columns 16 step and up. */
template <typename T, int D>
static __device__ __forceinline__ void qm_rows_fragment(uint32_t (&a)[4], const T *tile,
                                                        int32_t row, int32_t step) {
  const int32_t lane = threadIdx.x % 32;
  qm_ldmatrix(a, tile + (row + lane % 16) * (D + QM_PAD) + step * 16 + lane / 16 * 8);
}
/* Fragments B of two neighbouring groups of 8 rows of a tile, for products with its transpose. */
template <typename T, int D>
static __device__ __forceinline__ void qm_transpose_fragment(uint32_t (&b)[4], const T *tile,
                                                             int32_t row, int32_t step) {
  const int32_t lane = threadIdx.x % 32, part = lane / 8;
  qm_ldmatrix(b, tile + (row + part / 2 * 8 + lane % 8) * (D + QM_PAD) + step * 16 + part % 2 * 8);
}
/* Fragments B of two neighbouring groups of 8 columns of a tile, for products with itself. */
template <typename T, int D>
static __device__ __forceinline__ void qm_columns_fragment(uint32_t (&b)[4], const T *tile,
                                                           int32_t row, int32_t column) {
  const int32_t lane = threadIdx.x % 32, part = lane / 8;
  qm_ldmatrix_transposed(
      b, tile + (row + part % 2 * 8 + lane % 8) * (D + QM_PAD) + column + part / 2 * 8);
}

/* acc [16 x ROWS] = a's 16 rows from `row` times the transpose of b [ROWS x D]. */
template <typename T, int D, int ROWS>
static __device__ __forceinline__ void qm_multiply_transpose(float (&acc)[ROWS / 8][4], const T *a,
                                                             int32_t row, const T *b) {
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t left[4];
    qm_rows_fragment<T, D>(left, a, row, step);
#pragma unroll
    for (int n = 0; n < ROWS / 16; n++) {
      uint32_t right[4];
      qm_transpose_fragment<T, D>(right, b, n * 16, step);
      qm_mma<T>(acc[2 * n], left, right[0], right[1]);
      qm_mma<T>(acc[2 * n + 1], left, right[2], right[3]);
    }
  }
}
/* acc [16 x D] += weights [16 x ROWS], as an accumulator holds them, times b [ROWS x D]. */
template <typename T, int D, int ROWS>
static __device__ __forceinline__ void qm_multiply_weights(float (&acc)[D / 8][4],
                                                           const float (&weights)[ROWS / 8][4],
                                                           const T *b) {
#pragma unroll
  for (int step = 0; step < ROWS / 16; step++) {
    uint32_t left[4];
    qm_weights_fragment<T>(left, weights, step);
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      uint32_t right[4];
      qm_columns_fragment<T, D>(right, b, step * 16, n * 16);
      qm_mma<T>(acc[2 * n], left, right[0], right[1]);
      qm_mma<T>(acc[2 * n + 1], left, right[2], right[3]);
    }
  }
}
#endif
