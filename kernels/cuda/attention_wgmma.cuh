/* attention_wgmma.cuh - what the Hopper attention kernels share: copies of whole row tiles, and
** products of them. A tile of ROWS x D is D / 64 shared tiles of ROWS x 64, see wgmma.cuh. */
#ifndef QM_ATTENTION_WGMMA_CUH
#define QM_ATTENTION_WGMMA_CUH

#include "attention_softmax.cuh"
#include "attention_wgmma.h"
#include "wgmma.cuh"

/* The pass over the source that makes sm_90a code; others leave the kernels empty. */
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QM_HAS_WGMMA_HERE
#endif

/* Where the first tile begins: shared memory itself is aligned to less than 1024 bytes. */
static __device__ __forceinline__ char *qm_align_tile(char *shared) {
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
  return shared + ((1024 - at % 1024) % 1024);
}

/* Copy rows of one head. Rows past the tensor's end become zeros; rows of the next sequence arrive
** as they are, and must not be seen. */
template <int D, int ROWS>
static __device__ __forceinline__ void qm_copy_rows(char *tile, const CUtensorMap *map,
                                                    int32_t head, int32_t row, uint64_t *barrier) {
#pragma unroll
  for (int half = 0; half < D / 64; half++)
    qm_copy_tile(tile + half * ROWS * 128, map, half * 64, head, row, barrier);
}

/* Begin acc = a b^T for 64 rows of a tile of A_ROWS and all B_ROWS of another, both D wide. */
template <typename T, int D, int A_ROWS, int B_ROWS>
static __device__ __forceinline__ void qm_multiply_tiles(float (&acc)[B_ROWS / 8][4], uint64_t a,
                                                         uint64_t b) {
#pragma unroll
  for (int step = 0; step < D / 16; step++)
    qm_product<T, 0>(acc, qm_tile_at(a, step / 4 * (A_ROWS * 128) + step % 4 * 32),
                     qm_tile_at(b, step / 4 * (B_ROWS * 128) + step % 4 * 32), step == 0);
  qm_products_commit();
}

/* A warp's 16 rows of a tile of ROWS, from `row` on, in registers: fragments of 16 columns. */
template <int D, int ROWS>
static __device__ __forceinline__ void qm_tile_fragments(uint32_t (&out)[D / 16][4],
                                                         const char *tile, int32_t row) {
  const int32_t lane = threadIdx.x % 32, of = row + lane % 16;
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    const int32_t piece = (step % 4 * 2 + lane / 16) ^ of % 8;
    qm_ldmatrix(out[step], tile + step / 4 * (ROWS * 128) + of * 128 + piece * 16);
  }
}
/* Begin acc = a b^T for rows in registers and all B_ROWS of a tile, both D wide. */
template <typename T, int D, int B_ROWS>
static __device__ __forceinline__ void qm_multiply_fragments(float (&acc)[B_ROWS / 8][4],
                                                             const uint32_t (&a)[D / 16][4],
                                                             uint64_t b) {
#pragma unroll
  for (int step = 0; step < D / 16; step++)
    qm_product<T, 0>(acc, a[step], qm_tile_at(b, step / 4 * (B_ROWS * 128) + step % 4 * 32),
                     step == 0);
  qm_products_commit();
}

/* ---- blocks that stay and take one item after the other ---- */

/* Items taken by the launch at work, and blocks that are done with it; 0 between launches. */
static __device__ uint32_t qm_items_taken, qm_blocks_done;

/* The next item, the same in all lanes of the one warp that asks. */
static __device__ __forceinline__ uint32_t qm_next_item() {
  uint32_t item = 0;
  if (threadIdx.x % 32 == 0) item = atomicAdd(&qm_items_taken, 1u);
  return __shfl_sync(0xFFFFFFFFu, item, 0);
}
/* The block asks no more. */
static __device__ __forceinline__ void qm_items_done() {
  if (threadIdx.x % 32 != 0) return;
  __threadfence();
  if (atomicAdd(&qm_blocks_done, 1u) + 1 != gridDim.x * gridDim.y) return;
  qm_items_taken = 0;
  qm_blocks_done = 0;
}

/* Describe x [rows, heads, head_size], rows `stride` elements apart, for copies of box_rows rows of
** 64 columns of one head, swizzled; of all columns where there are fewer, as they lie. */
int32_t qm_map_rows(CUtensorMap *map, const qm_array *x, int64_t rows, int64_t heads,
                    int64_t head_size, int64_t stride, uint32_t box_rows);

#endif
