/* mpq_block.h - blocks of columns of a quantized parameter, for loops that the compiler vectorizes.
**
** A kernel walks 32 packed rows at a time (whole words at every width) over a block of columns,
** whose scales and zeros it holds in f32 and reloads where the group changes. */
#ifndef QM_CPU_MPQ_BLOCK_H
#define QM_CPU_MPQ_BLOCK_H

#include "mpq.h"
#include "vector.h"

/* Columns of a block: 4 KiB of f32, one page of each operand's row. A multiple of 32, so that
** packed zero points begin at a word. */
enum { QM_MPQ_COLUMNS = 1024, QM_MPQ_ROWS = 32 };
/* Below this many elements a team of threads costs more than it brings. */
enum { QM_MPQ_SERIAL_MAX = 1 << 14 };

typedef struct qm_mpq_block {
  int64_t first, count; /* columns */
  int64_t group;        /* whose scales and zeros these are; -1: none yet */
  float scale[QM_MPQ_COLUMNS], zero[QM_MPQ_COLUMNS];
} qm_mpq_block;

static inline void qm_mpq_expand_zero_points(float *restrict out, const qm_mpq_view *q, int64_t g,
                                             int64_t first, int64_t count) {
  const int32_t bits = q->w_bit, per_word = 32 / bits;
  const uint32_t mask = qm_mpq_mask(bits), offset = (uint32_t)q->zero_offset;
  const uint32_t *words = (const uint32_t *)q->zeros.data + (g * q->n + first) / 32 * bits;
  if (32 % bits != 0) {
    for (int64_t j = 0; j < count; j++)
      out[j] = (float)(int32_t)(qm_stream_field(words, 1, bits, j) + offset);
    return;
  }
  for (int64_t word = 0; word < count / per_word; word++)
    for (int32_t i = 0; i < per_word; i++)
      out[word * per_word + i] = (float)(int32_t)((words[word] >> (bits * i) & mask) + offset);
}

/* Scales and zeros of group g; true where they were not there already. */
static inline int qm_mpq_enter_group(qm_mpq_block *block, const qm_mpq_view *q, int64_t g) {
  if (block->group == g) return 0;
  block->group = g;
  const int64_t at = g * q->n + block->first;
  qm_expand(block->scale, q->scales.data, q->scales.dtype, at, block->count);
  if (q->asym)
    qm_mpq_expand_zero_points(block->zero, q, g, block->first, block->count);
  else
    qm_expand(block->zero, q->zeros.data, q->zeros.dtype, at, block->count);
  return 1;
}

/* Where packed row p's codes are. */
typedef struct qm_mpq_place {
  uint32_t *words; /* the word row in which they begin, column 0 */
  int32_t w_bit, shift;
  int32_t beyond; /* 1 where they go on in the next word row, else 0 */
} qm_mpq_place;

static inline qm_mpq_place qm_mpq_place_of(const qm_mpq_view *q, int64_t p) {
  const qm_mpq_rows *section = qm_mpq_section_of(q, p);
  const int64_t bit = (p - section->first_row) * section->w_bit;
  const int32_t shift = (int32_t)(bit & 31);
  return (qm_mpq_place){
      .words = (uint32_t *)q->data.data + (section->first_word + (bit >> 5)) * q->n,
      .w_bit = section->w_bit,
      .shift = shift,
      .beyond = shift + section->w_bit > 32,
  };
}

/* The fields of a row that goes on in the next words; bits above them are none of theirs. */
static inline void qm_mpq_join(uint32_t *restrict out, const qm_mpq_place *place,
                               const qm_mpq_view *q, const qm_mpq_block *block) {
  const uint32_t *restrict words = place->words + block->first, *restrict next = words + q->n;
  const int32_t shift = place->shift;
  for (int64_t j = 0; j < block->count; j++) out[j] = words[j] >> shift | next[j] << (32 - shift);
}

/* Put filled words back where a row of `codes` is their last, and begin the next ones with what of
** it goes on there. */
static inline void qm_mpq_flush_codes(const qm_mpq_place *place, uint32_t *restrict filled,
                                      const uint32_t *restrict codes, const qm_mpq_block *block) {
  const size_t size_bytes = (size_t)block->count * sizeof *filled;
  const int32_t shift = place->shift;
  if (shift + place->w_bit < 32) return;
  memcpy(place->words + block->first, filled, size_bytes);
  if (place->beyond)
    for (int64_t j = 0; j < block->count; j++) filled[j] = codes[j] >> (32 - shift);
  else
    memset(filled, 0, size_bytes);
}

/* The words that hold packed row p's residuals of `bits`, from the block's first column on. */
static inline uint32_t *qm_mpq_words(void *words, int32_t bits, const qm_mpq_view *q,
                                     const qm_mpq_block *block, int64_t p) {
  return (uint32_t *)words + p / (32 / bits) * q->n + block->first;
}

/* The same for residuals. */
static inline void qm_mpq_flush(void *words, uint32_t *filled, int32_t bits, const qm_mpq_view *q,
                                const qm_mpq_block *grid, int64_t p) {
  const int64_t per_word = 32 / bits;
  if (p % per_word != per_word - 1) return;
  memcpy(qm_mpq_words(words, bits, q, grid, p), filled, (size_t)grid->count * sizeof *filled);
  memset(filled, 0, (size_t)grid->count * sizeof *filled);
}

/* floor and round for |x| < 2^22 without the instruction that old levels lack: adding 1.5 * 2^23
** rounds to an integer, halves to even. */
static inline float qm_mpq_rint(float x) { return (x + 12582912.0f) - 12582912.0f; }
static inline float qm_mpq_floor(float x) {
  const float rounded = qm_mpq_rint(x);
  return rounded > x ? rounded - 1.0f : rounded;
}

/* code * scale - zero, rounded once. Up to 8 bits times a 16-bit float is exact in f32, so that the
** old levels, where fma is a library call, need it for f32 scales alone. */
static inline float qm_mpq_decode_sym(float code, float scale, float zero, int exact_product) {
#if !defined(__FMA__) && !defined(__aarch64__)
  if (exact_product) return code * scale - zero;
#else
  (void)exact_product;
#endif
  return __builtin_fmaf(code, scale, -zero);
}

/* Packed row p of the block, decoded. */
static inline void qm_mpq_decode_row(float *restrict out, const qm_mpq_view *q,
                                     const qm_mpq_block *block, int64_t p, int with_residual) {
  const qm_mpq_place place = qm_mpq_place_of(q, p);
  const uint32_t *restrict words = place.words + block->first, *restrict next = words + q->n;
  const float *restrict scale = block->scale, *restrict zero = block->zero;
  const int32_t shift = place.shift;
  const uint32_t mask = qm_mpq_mask(place.w_bit);
  const int64_t n = block->count;
  if (place.beyond)
    for (int64_t j = 0; j < n; j++)
      out[j] = (float)(int32_t)((words[j] >> shift | next[j] << (32 - shift)) & mask);
  else
    for (int64_t j = 0; j < n; j++) out[j] = (float)(int32_t)(words[j] >> shift & mask);
  if (with_residual) {
    const qm_mpq_span span = qm_mpq_span_of(q);
    const uint32_t *restrict rest = qm_mpq_words(q->residual.data, span.bits, q, block, p);
    const int32_t rest_shift = span.bits * (int32_t)(p % (32 / span.bits));
    const uint32_t rest_mask = qm_mpq_mask(span.bits);
    const float step = 1.0f / span.unit; /* a power of two */
    for (int64_t j = 0; j < n; j++)
      out[j] += (float)((int32_t)(rest[j] >> rest_shift & rest_mask) - span.half) * step;
  }
  const int exact_product = q->scales.dtype != QM_F32 && !with_residual;
  if (q->asym)
    for (int64_t j = 0; j < n; j++) out[j] = scale[j] * (out[j] - zero[j]);
  else if (exact_product)
    for (int64_t j = 0; j < n; j++) out[j] = qm_mpq_decode_sym(out[j], scale[j], zero[j], 1);
  else
    for (int64_t j = 0; j < n; j++) out[j] = qm_mpq_decode_sym(out[j], scale[j], zero[j], 0);
}

#endif
