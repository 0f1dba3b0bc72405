/* mpq.h - how a quantized parameter is laid out and what one update step's numbers are: the index
** arithmetic and the constants that every backend must share, once.
**
** Codes lie along K in sections of one width each, every column of a section a stream of bits;
** packed zero points are the same stream along a group's columns. For 1, 2, 4 and 8 bits no field
** straddles words. Packed row p holds feature q_perm[p]; its group is g_idx[feature], group_map[p],
** or p / group_size.
** Source: GPTQ's layout (also of 3 bits, as AutoGPTQ writes it); the MPQ and MBWQ layouts of
** bitorch-engine; exllamav2's EXL2 files.
*/
#ifndef QM_MPQ_H
#define QM_MPQ_H

#include <float.h>
#include <math.h>

#include "adam.h"
#include "backend.h"
#include "dtype.h"
#include "philox.h"

/* A group of products as the single ones that it is. */
QM_INLINE qm_mpq_linear_args qm_mpq_linear_of(const qm_mpq_linear_group_args *group, int32_t i) {
  qm_mpq_linear_args args;
  args.q = group->q[i];
  args.x = group->x;
  args.out = group->out[i];
  args.rows = group->rows;
  args.transposed = 0;
  return args;
}

/* ---- where things are ---- */

QM_INLINE int64_t qm_mpq_feature(const qm_mpq_view *q, int64_t p) {
  return q->q_perm.data == NULL ? p : ((const int32_t *)q->q_perm.data)[p];
}
QM_INLINE int64_t qm_mpq_group(const qm_mpq_view *q, int64_t p) {
  if (q->group_map.data != NULL) return ((const int32_t *)q->group_map.data)[p];
  return q->g_idx.data == NULL ? p / q->group_size
                               : ((const int32_t *)q->g_idx.data)[qm_mpq_feature(q, p)];
}
QM_INLINE uint32_t qm_mpq_mask(int32_t bits) { return (1u << bits) - 1u; }

/* Field i, `bits` wide, of a stream whose words lie `stride` apart. */
QM_INLINE uint32_t qm_stream_field(const uint32_t *words, int64_t stride, int32_t bits, int64_t i) {
  const int64_t bit = i * bits;
  const int32_t shift = (int32_t)(bit & 31);
  words += (bit >> 5) * stride;
  uint32_t field = words[0] >> shift;
  if (shift + bits > 32) field |= words[stride] << (32 - shift);
  return field & qm_mpq_mask(bits);
}
QM_INLINE void qm_stream_set_field(uint32_t *words, int64_t stride, int32_t bits, int64_t i,
                                   uint32_t field) {
  const int64_t bit = i * bits;
  const int32_t shift = (int32_t)(bit & 31);
  const uint32_t mask = qm_mpq_mask(bits);
  words += (bit >> 5) * stride;
  words[0] = (words[0] & ~(mask << shift)) | field << shift;
  if (shift + bits > 32)
    words[stride] = (words[stride] & ~(mask >> (32 - shift))) | field >> (32 - shift);
}

/* The section of packed row p. */
QM_INLINE const qm_mpq_rows *qm_mpq_section_of(const qm_mpq_view *q, int64_t p) {
  const qm_mpq_rows *section = q->sections;
  while (p >= section->end_row) section++;
  return section;
}
/* The code of packed row p, column n. */
QM_INLINE uint32_t qm_mpq_code(const qm_mpq_view *q, int64_t p, int64_t n) {
  const qm_mpq_rows *section = qm_mpq_section_of(q, p);
  const uint32_t *words = (const uint32_t *)q->data.data + section->first_word * q->n + n;
  return qm_stream_field(words, q->n, section->w_bit, p - section->first_row);
}
QM_INLINE void qm_mpq_set_code(const qm_mpq_view *q, int64_t p, int64_t n, uint32_t code) {
  const qm_mpq_rows *section = qm_mpq_section_of(q, p);
  uint32_t *words = (uint32_t *)q->data.data + section->first_word * q->n + n;
  qm_stream_set_field(words, q->n, section->w_bit, p - section->first_row, code);
}

/* Field p of column n, `bits` wide, in words [K * bits / 32, N]: codes of one width, residuals. */
QM_INLINE uint32_t qm_mpq_field(const void *words, int32_t bits, int64_t n_count, int64_t p,
                                int64_t n) {
  return qm_stream_field((const uint32_t *)words + n, n_count, bits, p);
}
QM_INLINE void qm_mpq_set_field(void *words, int32_t bits, int64_t n_count, int64_t p, int64_t n,
                                uint32_t field) {
  qm_stream_set_field((uint32_t *)words + n, n_count, bits, p, field);
}

/* asym: the zero point of group g, column n: field + zero_offset. */
QM_INLINE uint32_t qm_mpq_zero_point(const qm_mpq_view *q, int64_t g, int64_t n) {
  const uint32_t *words = (const uint32_t *)q->zeros.data + g * (q->n / 32 * q->w_bit);
  return qm_stream_field(words, 1, q->w_bit, n) + (uint32_t)q->zero_offset;
}
QM_INLINE void qm_mpq_set_zero_point(const qm_mpq_view *q, int64_t g, int64_t n, int64_t zero) {
  uint32_t *words = (uint32_t *)q->zeros.data + g * (q->n / 32 * q->w_bit);
  qm_stream_set_field(words, 1, q->w_bit, n,
                      (uint32_t)(zero - q->zero_offset) & qm_mpq_mask(q->w_bit));
}

QM_INLINE float qm_mpq_scale(const qm_mpq_view *q, int64_t g, int64_t n) {
  return qm_load(q->scales.data, q->scales.dtype, g * q->n + n);
}
/* asym: the zero point; sym: the product zero. */
QM_INLINE float qm_mpq_zero(const qm_mpq_view *q, int64_t g, int64_t n) {
  return q->asym ? (float)qm_mpq_zero_point(q, g, n)
                 : qm_load(q->zeros.data, q->zeros.dtype, g * q->n + n);
}

/* ---- codes and weights ---- */

/* asym: scale (code - zero); sym: code scale - zero, rounded once. `code` may carry a residual. */
QM_INLINE float qm_mpq_decode(int32_t asym, float code, float scale, float zero) {
  return asym ? scale * (code - zero) : fmaf(code, scale, -zero);
}
/* Where on the grid a weight lies, in codes. */
QM_INLINE float qm_mpq_encode(int32_t asym, float w, float scale, float zero) {
  return asym ? w / scale + zero : (w + zero) / scale;
}

/* The integers q 2^rb + r that a code and its residual of rb bits span; rb = 0: the codes. */
typedef struct qm_mpq_span {
  int32_t bits;    /* rb */
  int32_t half;    /* 2^(rb-1), or 0 */
  float unit;      /* 2^rb: steps to one code */
  float low, high; /* the range, inclusive */
} qm_mpq_span;

QM_INLINE qm_mpq_span qm_mpq_span_for(const qm_mpq_view *q, int32_t w_bit) {
  qm_mpq_span span;
  const int32_t bits = q->residual.data == NULL ? 0 : q->residual_bits, top = (1 << w_bit) - 1;
  span.bits = bits;
  span.half = bits == 0 ? 0 : 1 << (bits - 1);
  span.unit = (float)(1 << bits);
  span.low = (float)-span.half;
  span.high = (float)((top << bits) + (bits == 0 ? 0 : span.half - 1));
  return span;
}
/* That of a parameter of one width. */
QM_INLINE qm_mpq_span qm_mpq_span_of(const qm_mpq_view *q) {
  return qm_mpq_span_for(q, q->sections[0].w_bit);
}

/* ---- fitting a grid ---- */

/* What every grid of one width has in common. */
typedef struct qm_mpq_grid_kind {
  int32_t w_bit, asym, zero_offset;
  int32_t dtype; /* the scales' */
} qm_mpq_grid_kind;

QM_INLINE qm_mpq_grid_kind qm_mpq_grid_kind_of(const qm_mpq_view *q, int32_t w_bit) {
  const qm_mpq_grid_kind kind = {w_bit, q->asym, q->zero_offset, q->scales.dtype};
  return kind;
}

typedef struct qm_mpq_grid {
  float scale, zero; /* as stored: scale and sym's zero are numbers of the grid's type */
} qm_mpq_grid;

/* The grid whose ends are lo and hi. No scale is 0 or infinite, whatever comes. */
QM_INLINE qm_mpq_grid qm_mpq_grid_of(float lo, float hi, qm_mpq_grid_kind kind) {
  const int32_t dtype = kind.dtype;
  const float top = (float)qm_mpq_mask(kind.w_bit), first = (float)kind.zero_offset;
  const float constant = fabsf(hi) > 0.0f ? fabsf(hi) : 1e-5f;
  const float largest = dtype == QM_F16 ? 65504.0f : 0x1.FEp127f; /* f32 and bf16 hold it */
  qm_mpq_grid grid;
  const float span = hi - lo > 0.0f ? hi - lo : constant;
  grid.scale = qm_round_to(dtype, span / top);
  /* Where there is no zero point 0, a group without negative weights gives up the code below 0. */
  if (kind.asym && kind.w_bit > 1 && rintf(-lo / grid.scale) < first)
    grid.scale = qm_round_to(dtype, (hi > 0.0f ? hi : constant) / (top - 1.0f));
  if (!(grid.scale > 0x1p-24f)) grid.scale = 0x1p-24f;
  if (!(grid.scale < largest)) grid.scale = largest;
  grid.zero = qm_round_to(dtype, -lo);
  if (kind.asym) {
    const float zero = rintf(-lo / grid.scale);
    grid.zero = zero < first ? first : zero > top + first ? top + first : zero;
  }
  return grid;
}
/* The same with the span between lo and hi multiplied by `factor`: around 0 for asym, whose grid
** holds 0, around the middle for sym. */
QM_INLINE qm_mpq_grid qm_mpq_grid_scaled(float lo, float hi, float factor, qm_mpq_grid_kind kind) {
  if (kind.asym) return qm_mpq_grid_of(lo * factor, hi * factor, kind);
  const float middle = 0.5f * lo + 0.5f * hi, half = (0.5f * hi - 0.5f * lo) * factor;
  return qm_mpq_grid_of(middle - half, middle + half, kind);
}
/* What w loses on the grid, to compare grids with. */
QM_INLINE float qm_mpq_grid_error(float w, qm_mpq_grid grid, float top, int32_t asym) {
  const float y = rintf(qm_mpq_encode(asym, w, grid.scale, grid.zero));
  const float code = y > 0.0f ? (y < top ? y : top) : 0.0f;
  return w - (asym ? grid.scale * (code - grid.zero) : code * grid.scale - grid.zero);
}
/* QM_FIT_MSE tries the spans 1, 0.98, ... 0.2 times minmax's. */
enum { QM_MPQ_FIT_TRIES = 41 };
QM_INLINE float qm_mpq_fit_factor(double range, int32_t attempt) {
  return (float)(range * (1.0 - 0.02 * attempt));
}

/* ---- one update step ---- */

/* Group g, column n in code units: rate / scale, and the zero point (sym: zero / scale). A scale of
** 0 decodes every code alike; its codes rest. */
QM_INLINE float qm_mpq_step_rate(float rate, float scale) {
  return scale == 0.0f ? 0.0f : rate / scale;
}
QM_INLINE float qm_mpq_step_zero(int32_t asym, float scale, float zero) {
  return asym ? zero : scale == 0.0f ? 0.0f : zero / scale;
}
/* The steps of a stochastic move: ceil(move - u) for u uniform in [0, 1), a multiple of 2^-24, and
** low = floor(move). The probability of going up is the fraction, exactly: below, every operand of
** the comparison is exact, where the fraction 1 + move of a small negative move would not be. */
QM_INLINE float qm_mpq_stochastic(float move, float low, float u) {
  const float one = move < 0.0f ? 1.0f : 0.0f;
  return low + (u - one < move - (low + one) ? 1.0f : 0.0f);
}
/* Moves beyond this many steps leave every grid; the bound keeps all sums exact integers in f32. */
#define QM_MPQ_MOVE_MAX 1048576.0f

#endif
