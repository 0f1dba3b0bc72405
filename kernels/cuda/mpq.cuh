/* mpq.cuh - what the kernels of quantized parameters share on the device.
**
** Layout and formulas stand in kernels/mpq.h. Plain kernels give a thread one column of 32 packed
** rows, which are whole words at every width, so that no two threads write the same word. */
#ifndef QM_MPQ_CUH
#define QM_MPQ_CUH

#include "device.cuh"
#include "mpq.h"

enum { QM_MPQ_ROWS = 32 };

/* The feature and the group of packed row p; false, and noted as late error, where an index tensor
** points outside. */
struct qm_mpq_place {
  int64_t feature, group;
};
__device__ __forceinline__ bool qm_mpq_locate(const qm_mpq_view &q, qm_cuda_late *late,
                                              int32_t operation, int64_t p, qm_mpq_place *place) {
  place->feature = qm_mpq_feature(&q, p);
  if (!qm_index_fits(late, operation, place->feature, q.k)) return false;
  place->group =
      q.g_idx.data == NULL ? p / q.group_size : ((const int32_t *)q.g_idx.data)[place->feature];
  return qm_index_fits(late, operation, place->group, q.groups);
}

/* Threads of a plain kernel: 32 rows of one column each. */
static inline int64_t qm_mpq_strips(const qm_mpq_view &q) { return q.k / QM_MPQ_ROWS * q.n; }

/* A word of one column while it is filled, from its first row to its last. */
struct qm_mpq_word {
  void *words;
  int32_t bits;
  uint32_t filled;
  /* The low bits of `field` are row p's. The last row's call stores the word. */
  __device__ __forceinline__ void put(int64_t p, int64_t n, int64_t n_count, uint32_t field) {
    const int64_t per_word = 32 / bits;
    filled = __funnelshift_r(filled, field, bits);
    if (p % per_word == per_word - 1) ((uint32_t *)words)[p / per_word * n_count + n] = filled;
  }
};

/* Zero points of one group that neighbouring lanes hold, `field` = zero - 1 each, to packed words:
** all 32 lanes are 32 columns from a multiple of 32 on. */
__device__ __forceinline__ void qm_mpq_store_zero_fields(const qm_mpq_view &q, int64_t g, int64_t n,
                                                         uint32_t field) {
  const int32_t per_word = 32 / q.w_bit;
  uint32_t word = field << (q.w_bit * (int32_t)(n % per_word));
  for (int32_t offset = per_word / 2; offset > 0; offset /= 2)
    word |= __shfl_xor_sync(0xFFFFFFFFu, word, offset);
  if (n % per_word == 0) ((uint32_t *)q.zeros.data)[(g * q.n + n) / per_word] = word;
}

/* ---- four neighbouring columns ---- */

/* Four elements that lie in one access, as f32. */
__device__ __forceinline__ void qm_load4(const float *x, float out[4]) {
  const float4 four = __ldcs((const float4 *)x);
  out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
}
__device__ __forceinline__ void qm_load4(const __nv_bfloat16 *x, float out[4]) {
  const uint2 four = __ldcs((const uint2 *)x);
  out[0] = __uint_as_float(four.x << 16), out[1] = __uint_as_float(four.x & 0xFFFF0000u);
  out[2] = __uint_as_float(four.y << 16), out[3] = __uint_as_float(four.y & 0xFFFF0000u);
}

/* Scales and zeros (see qm_mpq_zero) of group g, columns n .. n + COLUMNS - 1; n a multiple of
** COLUMNS. Kept in caches: other rows use them. BITS: the width where it is known, else 0. */
template <int COLUMNS, int BITS>
__device__ __forceinline__ void qm_mpq_load_grid(const qm_mpq_view &q, int64_t g, int64_t n,
                                                 float scale[COLUMNS], float zero[COLUMNS]) {
  const int64_t at = g * q.n + n;
  auto expand = [&](const qm_array &x, float *out) {
    if (x.dtype == QM_F32) {
      const qm_pack<float, COLUMNS % 4 == 0 ? 4 : 1> *packs =
          (const qm_pack<float, COLUMNS % 4 == 0 ? 4 : 1> *)((const float *)x.data + at);
      constexpr int WIDTH = COLUMNS % 4 == 0 ? 4 : 1;
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) out[j] = packs[j / WIDTH].at[j % WIDTH];
      return;
    }
    const qm_pack<uint16_t, COLUMNS> pack =
        *(const qm_pack<uint16_t, COLUMNS> *)((const uint16_t *)x.data + at);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
      out[j] = x.dtype == QM_BF16 ? __uint_as_float((uint32_t)pack.at[j] << 16)
                                  : __half2float(__ushort_as_half(pack.at[j]));
  };
  expand(q.scales, scale);
  if (!q.asym) {
    expand(q.zeros, zero);
    return;
  }
  const int32_t bits = BITS != 0 ? BITS : q.w_bit;
  const uint32_t mask = qm_mpq_mask(bits), *words = (const uint32_t *)q.zeros.data;
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const int64_t bit =
        (at + j) * bits; /* a group's row of words is whole: N is a multiple of 32 */
    if (j == 0 || BITS * COLUMNS > 32 || BITS == 0) word = words[bit >> 5];
    zero[j] = (float)((word >> (bit & 31) & mask) + 1u);
  }
}
/* True where qm_mpq_load_grid may read the grid so. */
static inline bool qm_mpq_grid_aligned(const qm_mpq_view &q, int64_t columns) {
  const int64_t size_bytes = columns * 2 < 16 && q.scales.dtype != QM_F32 ? columns * 2 : 16;
  return q.n % columns == 0 && qm_aligned(q.scales.data, size_bytes) &&
         (q.asym || qm_aligned(q.zeros.data, size_bytes));
}

#endif
