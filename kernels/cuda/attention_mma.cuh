/* attention_mma.cuh - what the tensor cores' attention kernels share: where a block works, tiles in
** shared memory, and products of tiles.
**
** A tile is ROWS x D elements with 8 more at the end of each row: ldmatrix then meets no two of its
** eight rows in one bank. One warp multiplies 16 rows (or two times 16) of a left tile with all
** rows
** of a right one.
*/
#ifndef QM_ATTENTION_MMA_CUH
#define QM_ATTENTION_MMA_CUH

#include "attention.cuh"
#include "mma.cuh"

enum { QM_WARPS = 4, QM_THREADS = 32 * QM_WARPS, QM_PAD = 8 };
constexpr float QM_LOG2E = 1.44269504088896340736f, QM_LN2 = 0.69314718055994530942f;

/* Block `tile` of all sequences' tiles of `tile_rows`: its sequence and first row, or false past
** the last. The grid has qm_attention_tiles of them, known without reading cu. */
static __device__ __forceinline__ bool qm_attention_locate(const int32_t *cu, int32_t sequences,
                                                           int32_t tile_rows, int32_t tile,
                                                           int32_t *sequence, int32_t *first) {
  const int32_t lane = threadIdx.x % 32;
  int32_t before = 0;
  for (int32_t base = 0; base < sequences; base += 32) {
    const int32_t s = base + lane;
    const int32_t length = s < sequences ? cu[s + 1] - cu[s] : 0;
    const int32_t tiles = (max(length, 0) + tile_rows - 1) / tile_rows;
    int32_t through = tiles; /* inclusive sum over the lanes */
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(0xFFFFFFFFu, through, offset);
      if (lane >= offset) through += other;
    }
    const unsigned reached = __ballot_sync(0xFFFFFFFFu, before + through > tile);
    if (reached != 0) {
      const int32_t at = __ffs((int)reached) - 1;
      const int32_t start = before + __shfl_sync(0xFFFFFFFFu, through - tiles, at);
      *sequence = base + at;
      *first = cu[*sequence] + (tile - start) * tile_rows;
      return true;
    }
    before += __shfl_sync(0xFFFFFFFFu, through, 31);
  }
  return false;
}
static inline unsigned qm_attention_tiles(int64_t rows, int64_t sequences, int64_t tile_rows) {
  return (unsigned)(rows / tile_rows + sequences);
}

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
    const float(&low)[4] = weights[2 * step];
    const float(&high)[4] = weights[2 * step + 1];
    const uint32_t left[4] = {qm_pair<T>(low[0], low[1]), qm_pair<T>(low[2], low[3]),
                              qm_pair<T>(high[0], high[1]), qm_pair<T>(high[2], high[3])};
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      uint32_t right[4];
      qm_columns_fragment<T, D>(right, b, step * 16, n * 16);
      qm_mma<T>(acc[2 * n], left, right[0], right[1]);
      qm_mma<T>(acc[2 * n + 1], left, right[2], right[3]);
    }
  }
}
/* Store an accumulator's 16 rows times `factor[row half]`; rows from `there` on are left out. */
template <typename T, int D>
static __device__ __forceinline__ void qm_store_rows(T *out, int64_t stride, int32_t there,
                                                     const float (&acc)[D / 8][4],
                                                     const float (&factor)[2]) {
  const int32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (g + 8 * half < there)
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        *(uint32_t *)(out + (g + 8 * half) * stride + n * 8 + 2 * t) =
            qm_pair<T>(acc[n][2 * half] * factor[half], acc[n][2 * half + 1] * factor[half]);
}

#endif
