/* mpq.cuh - what the kernels of quantized parameters share on the device.
**
** Layout and formulas stand in kernels/mpq.h. Plain kernels give a thread one column of 32 packed
** rows, which are of one section and fill whole words at every width, so that no two threads write
** the same word. */
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
  if (q.group_map.data != NULL)
    place->group = ((const int32_t *)q.group_map.data)[p];
  else
    place->group =
        q.g_idx.data == NULL ? p / q.group_size : ((const int32_t *)q.g_idx.data)[place->feature];
  return qm_index_fits(late, operation, place->group, q.groups);
}

/* Threads of a plain kernel: 32 rows of one column each. */
static inline int64_t qm_mpq_strips(const qm_mpq_view &q) { return q.k / QM_MPQ_ROWS * q.n; }

/* Words of one column while they are filled, from the first row of a strip to its last. */
struct qm_mpq_word {
  uint32_t *words; /* the one being filled */
  int64_t stride;  /* to the next */
  int32_t bits, used;
  uint32_t filled;
  /* The low bits of `field` are the next row's. The row that ends a word stores it. */
  __device__ __forceinline__ void put(uint32_t field) {
    field &= qm_mpq_mask(bits);
    filled |= field << used;
    used += bits;
    if (used < 32) return;
    *words = filled;
    words += stride;
    used -= 32;
    filled = used == 0 ? 0 : field >> (bits - used);
  }
};
/* The codes of the strip from packed row p on, and its residuals. */
__device__ __forceinline__ qm_mpq_word qm_mpq_codes_of(const qm_mpq_view &q, int64_t p, int64_t n) {
  const qm_mpq_rows *section = qm_mpq_section_of(&q, p);
  const int64_t row = section->first_word + (p - section->first_row) / 32 * section->w_bit;
  return {(uint32_t *)q.data.data + row * q.n + n, q.n, section->w_bit, 0, 0};
}
__device__ __forceinline__ qm_mpq_word qm_mpq_residuals_of(const qm_mpq_view &q, int32_t bits,
                                                           int64_t p, int64_t n) {
  return {(uint32_t *)q.residual.data + p / 32 * bits * q.n + n, q.n, bits, 0, 0};
}

/* Zero points of one group that neighbouring lanes hold to packed words: all 32 lanes are 32
** columns from a multiple of 32 on. */
__device__ __forceinline__ void qm_mpq_store_zero_fields(const qm_mpq_view &q, int64_t g, int64_t n,
                                                         int64_t zero) {
  const uint32_t field = (uint32_t)(zero - q.zero_offset) & qm_mpq_mask(q.w_bit);
  const int32_t per_word = 32 / q.w_bit, lane = (int32_t)(n % 32);
  if (32 % q.w_bit != 0) { /* fields straddle words: every word is what all lanes have of it */
    for (int32_t i = 0; i < q.w_bit; i++) {
      const int32_t shift = lane * q.w_bit - 32 * i; /* where the field begins in word i */
      uint32_t part = shift <= -32 || shift >= 32 ? 0u
                      : shift < 0                 ? field >> -shift
                                                  : field << shift;
      for (int32_t offset = 16; offset > 0; offset /= 2)
        part |= __shfl_xor_sync(0xFFFFFFFFu, part, offset);
      if (lane == 0) ((uint32_t *)q.zeros.data)[(g * q.n + n) / 32 * q.w_bit + i] = part;
    }
    return;
  }
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
  const uint32_t offset = (uint32_t)q.zero_offset;
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const int64_t bit =
        (at + j) * bits; /* a group's row of words is whole: N is a multiple of 32 */
    if (j == 0 || BITS * COLUMNS > 32 || BITS == 0) word = words[bit >> 5];
    zero[j] = (float)((word >> (bit & 31) & mask) + offset);
  }
}
/* True where fields lie in one word each, and there is one width. */
static inline bool qm_mpq_is_whole(const qm_mpq_view &q) {
  return q.w_bit != 0 && 32 % q.w_bit == 0 && q.group_map.data == NULL;
}
/* True where qm_mpq_load_grid may read the grid so. */
static inline bool qm_mpq_grid_aligned(const qm_mpq_view &q, int64_t columns) {
  const int64_t size_bytes = columns * 2 < 16 && q.scales.dtype != QM_F32 ? columns * 2 : 16;
  return q.n % columns == 0 && qm_aligned(q.scales.data, size_bytes) &&
         (q.asym || qm_aligned(q.zeros.data, size_bytes));
}

#endif
