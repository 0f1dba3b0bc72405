/* attention.h - what attention's two passes share: which keys a row sees, tiles of f32, their
** product.
**
** The query heads of one key head are stacked: row i * group + g of a sequence is query i under
** head g
** of the group, so that a decoding step still has `group` rows to multiply with.
*/
#ifndef QM_CPU_ATTENTION_H
#define QM_CPU_ATTENTION_H

#include "simd.h"

enum {
  TILE_KEYS = 64, /* keys of one tile */
  TILE_ROWS =
      QM_LANES == 16 ? 8 : 4, /* rows of one register block: 8 x 2 of 32 vectors, 4 x 2 of 16 */
};
#define LOG2_E 1.44269504088896341
#define LN_2 0.69314718055994531

/* One sequence under one key head. */
typedef struct sequence {
  int64_t queries, keys;                 /* how many */
  int64_t first_query, first_key;        /* their rows in the tensors */
  int64_t group, head, kv_head;          /* heads per key head, the first of them, the key head */
  int64_t heads, kv_heads, size, padded; /* head size, and rounded up to whole vectors */
  int32_t causal, window;
} sequence;

/* Offset of stacked row's elements in q and its kin, and of a key's in k and its kin. */
QM_ALWAYS_INLINE int64_t row_offset(const sequence *s, int64_t row) {
  const int64_t query = s->first_query + row / s->group;
  return (query * s->heads + s->head + row % s->group) * s->size;
}
QM_ALWAYS_INLINE int64_t key_offset(const sequence *s, int64_t key) {
  return ((s->first_key + key) * s->kv_heads + s->kv_head) * s->size;
}
/* Where in lse a stacked row stands. */
QM_ALWAYS_INLINE int64_t row_index(const sequence *s, int64_t row) {
  return (s->first_query + row / s->group) * s->heads + s->head + row % s->group;
}

/* The keys that a stacked row sees: from first_seen up to end_seen - 1. Both grow with the row. */
QM_ALWAYS_INLINE int64_t first_seen(const sequence *s, int64_t row) {
  const int64_t first = s->keys - s->queries + row / s->group - s->window + 1;
  return s->window == 0 || first < 0 ? 0 : QM_MIN(first, s->keys);
}
QM_ALWAYS_INLINE int64_t end_seen(const sequence *s, int64_t row) {
  const int64_t end = s->keys - s->queries + row / s->group + 1;
  return !s->causal ? s->keys : end < 0 ? 0 : end;
}
/* The part of the tile at `key` with n keys that rows first .. last see, from its start. */
QM_ALWAYS_INLINE int64_t tile_end(const sequence *s, int64_t first, int64_t last, int64_t key,
                                  int64_t n) {
  const int64_t end = QM_MIN(end_seen(s, last) - key, n);
  return end <= 0 || first_seen(s, first) >= key + n ? 0 : end;
}
/* Does every row see all of the tile's first `end` keys? */
QM_ALWAYS_INLINE int32_t all_seen(const sequence *s, int64_t first, int64_t last, int64_t key,
                                  int64_t end) {
  return end % QM_LANES == 0 && first_seen(s, last) <= key && end_seen(s, first) >= key + end;
}

/* Lanes of the vector at key + j that the row sees. */
QM_ALWAYS_INLINE qm_ivec seen(const sequence *s, int64_t row, int64_t key) {
  qm_ivec lane;
  for (int32_t i = 0; i < QM_LANES; i++) lane[i] = i;
  const int64_t first = first_seen(s, row) - key, end = end_seen(s, row) - key;
  const int32_t low = (int32_t)(first < 0 ? 0 : QM_MIN(first, QM_LANES));
  const int32_t high = (int32_t)(end < 0 ? 0 : QM_MIN(end, QM_LANES));
  return (lane >= low) & (lane < high);
}

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

QM_ALWAYS_INLINE int64_t pad(int64_t size) { return (size + QM_LANES - 1) / QM_LANES * QM_LANES; }

/* Rows of the longest sequence. */
QM_ALWAYS_INLINE int64_t longest(const qm_array *offsets) {
  const int32_t *cu = offsets->data;
  int64_t most = 0;
  for (int64_t s = 0; s + 1 < offsets->count; s++)
    most = cu[s + 1] - cu[s] > most ? cu[s + 1] - cu[s] : most;
  return most;
}

/* The unit'th of all (sequence, key head) pairs. */
static sequence find_sequence(int64_t unit, const qm_array *q, const qm_array *k,
                              const qm_array *cu_q, const qm_array *cu_k,
                              const qm_attention_options *options) {
  const int64_t heads = q->shape[1], kv_heads = k->shape[1], s = unit / kv_heads;
  const int32_t *queries = cu_q->data, *keys = cu_k->data;
  const int64_t group = heads / kv_heads, kv_head = unit % kv_heads, size = q->shape[2];
  return (sequence){.queries = queries[s + 1] - queries[s],
                    .keys = keys[s + 1] - keys[s],
                    .first_query = queries[s],
                    .first_key = keys[s],
                    .group = group,
                    .head = kv_head * group,
                    .kv_head = kv_head,
                    .heads = heads,
                    .kv_heads = kv_heads,
                    .size = size,
                    .padded = pad(size),
                    .causal = options->causal,
                    .window = options->window};
}

#endif
