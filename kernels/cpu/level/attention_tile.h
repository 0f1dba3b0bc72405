/* attention_tile.h - tiles of f32 and their product, for the attention of every level. */
#ifndef QM_CPU_ATTENTION_TILE_H
#define QM_CPU_ATTENTION_TILE_H

#include "attention.h"

enum {
  TILE_KEYS = 64, /* keys of one tile */
  TILE_ROWS =
      QM_LANES == 16 ? 8 : 4, /* rows of one register block: 8 x 2 of 32 vectors, 4 x 2 of 16 */
};

/* One row of a tensor as f32 times factor, padded with zeros. */
QM_ALWAYS_INLINE void expand_row(const sequence *s, const qm_array *x, int64_t offset, float factor,
                                 float *out) {
  qm_expand(out, x->data, x->dtype, offset, s->size);
  if (factor != 1.0f)
    for (int64_t d = 0; d < s->size; d++) out[d] *= factor;
  for (int64_t d = s->size; d < s->padded; d++) out[d] = 0.0f;
}

/* x [TILE_KEYS, padded] to out [padded, TILE_KEYS]; n rows of x matter. */
static void transpose_tile(const sequence *s, const float *x, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += QM_LANES)
    for (int64_t d = 0; d < s->padded; d += QM_LANES)
      qm_vec_transpose(x + i * s->padded + d, s->padded, out + d * TILE_KEYS + i, TILE_KEYS);
}

/* A matrix product's left operand: element (i, k) lies at data[i * row + k * step]. */
typedef struct left {
  const float *data;
  int64_t row, step;
} left;

/* c = keep c + a b for `rows` rows and `vectors` vectors, all in registers; keep NULL: c = a b. */
QM_ALWAYS_INLINE void multiply_block(float *c, int64_t c_row, const float *keep, left a,
                                     const float *b, int64_t b_row, int64_t depth,
                                     const int32_t rows, const int32_t vectors) {
  qm_vec sums[TILE_ROWS][2];
#pragma GCC unroll 8
  for (int32_t i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int32_t j = 0; j < vectors; j++)
      sums[i][j] = keep == NULL ? (qm_vec){0} : keep[i] * qm_vec_load(c + i * c_row + j * QM_LANES);
  for (int64_t k = 0; k < depth; k++) {
    const qm_vec b0 = qm_vec_load(b + k * b_row);
    const qm_vec b1 = vectors == 2 ? qm_vec_load(b + k * b_row + QM_LANES) : b0;
#pragma GCC unroll 8
    for (int32_t i = 0; i < rows; i++) {
      const qm_vec element = qm_vec_splat(a.data[i * a.row + k * a.step]);
      sums[i][0] = qm_vec_fma(element, b0, sums[i][0]);
      if (vectors == 2) sums[i][1] = qm_vec_fma(element, b1, sums[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int32_t i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int32_t j = 0; j < vectors; j++) qm_vec_store(c + i * c_row + j * QM_LANES, sums[i][j]);
}

#define MULTIPLY_ROWS(count)                                                                       \
  static __attribute__((noinline)) void multiply_##count(                                          \
      float *c, int64_t c_row, const float *keep, left a, const float *b, int64_t b_row,           \
      int64_t depth, int64_t vectors) {                                                            \
    int64_t j = 0;                                                                                 \
    for (; j + 2 <= vectors; j += 2)                                                               \
      multiply_block(c + j * QM_LANES, c_row, keep, a, b + j * QM_LANES, b_row, depth, count, 2);  \
    if (j < vectors)                                                                               \
      multiply_block(c + j * QM_LANES, c_row, keep, a, b + j * QM_LANES, b_row, depth, count, 1);  \
  }
#if defined(__AVX512F__)
MULTIPLY_ROWS(8)
#endif
MULTIPLY_ROWS(4)
MULTIPLY_ROWS(1)

/* c = keep c + a b for up to TILE_ROWS rows: c [rows, vectors], b [depth, vectors]. */
static void multiply(int64_t rows, float *c, int64_t c_row, const float *keep, left a,
                     const float *b, int64_t b_row, int64_t depth, int64_t vectors) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if (rows == 8) {
    multiply_8(c, c_row, keep, a, b, b_row, depth, vectors);
    return;
  }
#endif
  for (int64_t step; i < rows; i += step, a.data += step * a.row, c += step * c_row) {
    step = rows - i >= 4 ? 4 : 1;
    (step == 4 ? multiply_4 : multiply_1)(c, c_row, keep == NULL ? NULL : keep + i, a, b, b_row,
                                          depth, vectors);
  }
}

#endif
