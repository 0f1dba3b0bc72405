/* amx.h - matrix products of bf16 in the AMX tile registers (Intel, from Sapphire Rapids on), and
** the layouts they want. Only for the v4 level, and only where the device found AMX (context->amx).
**
** One instruction adds a [16, 32] times b [32, 16] to c [16, 16]: a is bf16 by rows; b is 32-bit
** words [16, 16], of which word (k, n) holds elements (2 k, n) and (2 k + 1, n); c is f32.
** Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.
*/
#ifndef QM_CPU_AMX_H
#define QM_CPU_AMX_H

#include "simd.h"

#if defined(__x86_64__) && defined(__AVX512F__) && defined(__AVX512BW__)
#define QM_AMX 1
#define QM_AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

/* What LDTILECFG reads: palette 1, eight tiles of 16 rows of 64 bytes. */
typedef struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "as LDTILECFG reads it");

/* The thread's tiles become ours; *before is what others had set, for tiles_give_back. */
static inline QM_AMX_TARGET void tiles_take(tile_config *before) {
  tile_config config = {.palette = 1};
  for (int32_t i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  memset(before, 0, sizeof *before);
  _tile_storeconfig(before);
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&config);
}
static inline QM_AMX_TARGET void tiles_give_back(const tile_config *before) {
  if (before->palette == 0)
    _tile_release();
  else
    _tile_loadconfig(before);
}

/* c = a b, or c += a b where `add`: c f32 [rows, columns], a bf16 [rows, depth], b words
** [depth / 2, columns], each with its row's length in elements; all three multiples of 32. */
static __attribute__((noinline)) QM_AMX_TARGET void tiles_multiply(float *c, int64_t c_row,
                                                                   int32_t add, const uint16_t *a,
                                                                   int64_t a_row, const uint32_t *b,
                                                                   int64_t b_row, int64_t rows,
                                                                   int64_t columns, int64_t depth) {
  const size_t c_stride = (size_t)c_row * 4, a_stride = (size_t)a_row * 2,
               b_stride = (size_t)b_row * 4;
  __asm__ volatile("" ::: "memory"); /* gcc's tile loads do not say that they read memory */
  for (int64_t i = 0; i < rows; i += 32)
    for (int64_t j = 0; j < columns; j += 32) {
      float *c0 = c + i * c_row + j, *c1 = c0 + 16 * c_row;
      if (add) {
        _tile_loadd(0, c0, c_stride);
        _tile_loadd(1, c0 + 16, c_stride);
        _tile_loadd(2, c1, c_stride);
        _tile_loadd(3, c1 + 16, c_stride);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < depth; k += 32) {
        const uint16_t *ak = a + i * a_row + k;
        const uint32_t *bk = b + k / 2 * b_row + j;
        _tile_loadd(4, ak, a_stride);
        _tile_loadd(6, bk, b_stride);
        _tile_loadd(7, bk + 16, b_stride);
        _tile_loadd(5, ak + 16 * a_row, a_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c0, c_stride);
      _tile_stored(1, c0 + 16, c_stride);
      _tile_stored(2, c1, c_stride);
      _tile_stored(3, c1 + 16, c_stride);
    }
}

/* Two vectors of f32 as 32 bf16: low, then high. */
static inline QM_AMX_TARGET __m512i narrow_pair(qm_vec low, qm_vec high) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/* Two rows of 32 bf16 as 32 words: low's elements below high's. */
QM_ALWAYS_INLINE void pair(__m512i low, __m512i high, uint32_t *out) {
  static const uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_loadu_si512(order);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(low, first, high));
  _mm512_storeu_si512(out + QM_LANES, _mm512_permutex2var_epi16(low, second, high));
}

/* Which of 32 elements from d on belong to a row of n. */
QM_ALWAYS_INLINE __mmask32 row_mask(int64_t n, int64_t d) {
  return n - d >= 32 ? 0xFFFFFFFFu : n <= d ? 0 : (1u << (n - d)) - 1;
}

/* One bf16 row of n as it is, padded with zeros to `deep`; all zeros where x is NULL. */
QM_ALWAYS_INLINE void copy_row(const uint16_t *x, int64_t n, int64_t deep, uint16_t *out) {
  for (int64_t d = 0; d < deep; d += 32) {
    const __mmask32 mask = x == NULL ? 0 : row_mask(n, d);
    _mm512_storeu_si512(out + d, _mm512_maskz_loadu_epi16(mask, mask == 0 ? out : x + d));
  }
}

/* One row of n, times factor, as bf16; x is padded to whole pairs of vectors. */
static inline QM_AMX_TARGET void store_row(const float *x, float factor, int64_t n, uint16_t *out) {
  for (int64_t d = 0; d < n; d += 32) {
    const qm_vec low = qm_vec_load(x + d) * factor, high = qm_vec_load(x + d + QM_LANES) * factor;
    _mm512_mask_storeu_epi16(out + d, row_mask(n, d), narrow_pair(low, high));
  }
}

/* The product of two bf16 rows of n. */
static inline QM_AMX_TARGET float dot_rows(const uint16_t *x, const uint16_t *y, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < n; d += 32) {
    const __mmask32 mask = row_mask(n, d);
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + d),
                           (__m512bh)_mm512_maskz_loadu_epi16(mask, y + d));
  }
  return _mm512_reduce_add_ps(sum);
}

/* x words [rows, columns] to out [columns, rows], both multiples of 16: bf16 rows as the right
** operand of a product over columns; paired rows as the left operand of one over rows. */
static void transpose_words(const void *x, int64_t rows, int64_t columns, void *out,
                            int64_t out_row) {
  for (int64_t i = 0; i < rows; i += QM_LANES)
    for (int64_t j = 0; j < columns; j += QM_LANES)
      qm_vec_transpose((const float *)x + i * columns + j, columns, (float *)out + j * out_row + i,
                       out_row);
}

/* bf16 rows [rows, columns] to words [rows / 2, columns], row 2 k low and row 2 k + 1 high: the
** right operand of a product over the rows. */
static void pair_rows(const uint16_t *x, int64_t rows, int64_t columns, uint32_t *out) {
  for (int64_t k = 0; k < rows; k += 2, x += 2 * columns, out += columns)
    for (int64_t j = 0; j < columns; j += 32)
      pair(_mm512_loadu_si512(x + j), _mm512_loadu_si512(x + columns + j), out + j);
}

#endif
#endif
