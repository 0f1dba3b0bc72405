/* mpq_step_512.h - the update step of 128 columns of a row with AVX-512: the plain loop's
** arithmetic (step_row in mpq_step.h), operation for operation.
**
** Such a piece goes through two loops. The first takes Adam to the move in codes and waits for the
** divider; it draws the random words meanwhile, a round of Philox after every vector. The second
** rounds, clamps, and puts the fields into their words. */
#ifndef QM_CPU_MPQ_STEP_512_H
#define QM_CPU_MPQ_STEP_512_H

#include "mpq_step.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#define STEP_512
#define QM_STEP_INLINE static inline __attribute__((always_inline))
enum { STEP_LANES = 16, STEP_PIECE = QM_NOISE_WORDS, STEP_VECTORS = STEP_PIECE / STEP_LANES };
_Static_assert(STEP_VECTORS == 8,
               "one before the rounds, one after each of 3 to 8, one at the end");

/* What the loops hand on. */
typedef struct step_piece {
  float move[STEP_PIECE], denominator[STEP_PIECE];
  float m[STEP_PIECE], v[STEP_PIECE]; /* next moments that are not stored yet */
  uint32_t words[STEP_PIECE];
  int32_t code[STEP_PIECE];
  __mmask16 ok[STEP_VECTORS], moved[STEP_VECTORS], clipped[STEP_VECTORS]; /* a bit each */
} step_piece;

/* What a row's columns have in common, and where they are: a copy of its own, for otherwise every
** store might have changed it. */
typedef struct step_row_512 {
  __m512 beta1, one_minus_beta1, beta2, one_minus_beta2, eps, grad_scale, decay, inject, minus_unit;
  __m512 low, high; /* the span's */
  __m512i top, half, bits, residual_shift, residual_mask, shift, mask;
  const float *grad, *zero, *rate, *scale;
  const uint32_t *codes, *residual;
  uint32_t *new_codes, *new_residual;
  void *m, *v;
  const char *next_grad, *next_m, *next_v;
  int64_t grad_bytes, element;
} step_row_512;

QM_STEP_INLINE __m512 step_splat(float x) { return _mm512_set1_ps(x); }
QM_STEP_INLINE __m512i step_integer(int32_t x) { return _mm512_set1_epi32(x); }

static inline step_row_512 step_row_512_of(const update_call *call, update_block *block,
                                           const update_row *row) {
  const qm_adam_numbers *c = &call->step;
  const qm_mpq_span *span = &row->span;
  return (step_row_512){
      .beta1 = step_splat(c->beta1),
      .one_minus_beta1 = step_splat(c->one_minus_beta1),
      .beta2 = step_splat(c->beta2),
      .one_minus_beta2 = step_splat(c->one_minus_beta2),
      .eps = step_splat(c->eps),
      .grad_scale = step_splat(c->grad_scale),
      .decay = step_splat(c->decay),
      .inject = step_splat(c->inject),
      .minus_unit = step_splat(-span->unit),
      .low = step_splat(span->low),
      .high = step_splat(span->high),
      .top = step_integer((int32_t)span->high + span->half),
      .half = step_integer(span->half),
      .bits = step_integer(span->bits),
      .residual_shift = step_integer(row->residual_shift),
      .residual_mask = step_integer((1 << span->bits) - 1),
      .shift = step_integer(row->shift),
      .mask = step_integer((int32_t)row->mask),
      .grad = row->grad,
      .zero = block->zero,
      .rate = block->rate,
      .scale = block->grid.scale,
      .codes = row->codes,
      .residual = row->residual,
      .new_codes = row->new_codes,
      .new_residual = block->residual,
      .m = row->m,
      .v = row->v,
      .next_grad = row->next_grad,
      .next_m = row->next_m,
      .next_v = row->next_v,
      .grad_bytes = row->grad_bytes,
      .element = row->element,
  };
}

/* Ones in the masks of a piece; the vector units have enough to do. */
QM_STEP_INLINE int64_t step_count(const __mmask16 masks[STEP_VECTORS]) {
  uint64_t words[2];
  memcpy(words, masks, sizeof words);
  return __builtin_popcountll(words[0]) + __builtin_popcountll(words[1]);
}
QM_STEP_INLINE __m512i step_field(const uint32_t *words, __m512i shift, __m512i mask) {
  return _mm512_and_si512(_mm512_srlv_epi32(_mm512_loadu_si512(words), shift), mask);
}
QM_STEP_INLINE void step_put_field(uint32_t *words, __m512i field, __m512i shift) {
  const __m512i shifted = _mm512_sllv_epi32(field, shift);
  _mm512_storeu_si512(words, _mm512_or_si512(_mm512_loadu_si512(words), shifted));
}
QM_STEP_INLINE __m512 step_moment(const void *moment, int64_t j, int kind) {
  if (kind == MOMENTS_F32) return _mm512_loadu_ps((const float *)moment + j);
  const uint16_t *half = (const uint16_t *)moment + j;
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)half));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Vector i of the piece at column `first`, from the gradient to the move; asks for the next row. */
QM_STEP_INLINE void step_adam(const step_row_512 *c, step_piece *piece, int64_t first, int32_t i,
                              int feedback, int kind) {
  const int64_t at = i * STEP_LANES, j = first + at, moment_bytes = kind == MOMENTS_F32 ? 4 : 2;
  const __m512i code = step_field(c->codes + j, c->shift, c->mask);
  const __m512 decay = c->decay * (_mm512_cvtepi32_ps(code) - _mm512_loadu_ps(c->zero + j));
  const __m512 g = _mm512_loadu_ps(c->grad + j) * c->grad_scale;
  const __m512 rate = _mm512_loadu_ps(c->rate + j), largest = step_splat(FLT_MAX);
  __m512 d, m = g, v = g, denominator = g;
  __mmask16 ok = 0xFFFF;
  __builtin_prefetch(c->next_grad + j * c->grad_bytes);
  if (kind != MOMENTS_NONE) {
    __builtin_prefetch(c->next_m + j * moment_bytes);
    __builtin_prefetch(c->next_v + j * moment_bytes);
    m = c->beta1 * step_moment(c->m, j, kind) + c->one_minus_beta1 * g;
    v = c->beta2 * step_moment(c->v, j, kind) + c->one_minus_beta2 * g * g;
    denominator = _mm512_sqrt_ps(v) + c->eps;
    d = rate * m / denominator + decay;
    ok = _mm512_cmp_ps_mask(v, largest, _CMP_LE_OQ);
  } else {
    d = rate * g + decay;
  }
  ok = _mm512_mask_cmp_ps_mask(ok, _mm512_abs_ps(d), largest, _CMP_LE_OQ);
  /* The one of the smaller magnitude, with the first one's sign. */
  const __m512 limit = step_splat(QM_MPQ_MOVE_MAX), scaled = d * c->minus_unit;
  _mm512_storeu_ps(piece->move + at, _mm512_maskz_range_ps(ok, scaled, limit, 2));
  _mm512_storeu_si512(piece->code + at, code);
  piece->ok[i] = ok;
  if (feedback == QM_FEEDBACK_MOMENTUM) _mm512_storeu_ps(piece->denominator + at, denominator);
  if (kind == MOMENTS_BF16 || feedback == QM_FEEDBACK_MOMENTUM) _mm512_storeu_ps(piece->m + at, m);
  if (kind == MOMENTS_BF16) _mm512_storeu_ps(piece->v + at, v);
  if (kind != MOMENTS_F32) return;
  if (feedback != QM_FEEDBACK_MOMENTUM) _mm512_mask_storeu_ps((float *)c->m + j, ok, m);
  _mm512_mask_storeu_ps((float *)c->v + j, ok, v);
}

/* What rounding took away goes into the momentum. */
QM_STEP_INLINE void step_feedback(const step_row_512 *c, step_piece *piece, int64_t first,
                                  int32_t i, __m512i start, __m512i got, int kind) {
  const int64_t at = i * STEP_LANES, j = first + at;
  const __m512 move = _mm512_loadu_ps(piece->move + at);
  const __m512 target = _mm512_cvtepi32_ps(start) + move;
  const __mmask16 above = _mm512_cmp_ps_mask(target, c->low, _CMP_GE_OQ);
  const __mmask16 inside = _mm512_mask_cmp_ps_mask(above, target, c->high, _CMP_LE_OQ);
  const __m512 rest = move - _mm512_cvtepi32_ps(_mm512_sub_epi32(got, start));
  const __m512 lost = _mm512_maskz_mul_ps(inside, _mm512_loadu_ps(c->scale + j), rest);
  const __m512 pull = c->inject * _mm512_loadu_ps(piece->denominator + at);
  const __m512 m = _mm512_loadu_ps(piece->m + at) - pull * lost;
  if (kind == MOMENTS_F32)
    _mm512_mask_storeu_ps((float *)c->m + j, piece->ok[i], m);
  else
    _mm512_storeu_ps(piece->m + at, m);
}

/* Vector i, from the move to the new code. Integers are half a code larger than in the plain loop,
** as fields hold them, so that none is negative. */
QM_STEP_INLINE void step_round(const step_row_512 *c, step_piece *piece, int64_t first, int32_t i,
                               int feedback, int rounding, int kind) {
  const int64_t at = i * STEP_LANES, j = first + at;
  const __m512i code = _mm512_loadu_si512(piece->code + at);
  const __m512 move = _mm512_loadu_ps(piece->move + at);
  __m512i start = code, wanted;
  if (feedback == QM_FEEDBACK_RESIDUAL) {
    const __m512i residual = step_field(c->residual + j, c->residual_shift, c->residual_mask);
    start = _mm512_or_si512(_mm512_sllv_epi32(code, c->bits), residual);
  }
  if (rounding == QM_ROUND_STOCHASTIC) {
    /* ceil(move - u), exactly: rounding the difference up passes no integer. */
    enum { UP = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC };
    const __m512i random = _mm512_srli_epi32(_mm512_loadu_si512(piece->words + at), 8);
    const __m512 uniform = _mm512_cvtepi32_ps(random) * step_splat(0x1p-24f);
    const __m512 rest = _mm512_sub_round_ps(move, uniform, UP);
    wanted = _mm512_add_epi32(start, _mm512_cvt_roundps_epi32(rest, UP));
  } else {
    const __m512 target = _mm512_cvtepi32_ps(_mm512_sub_epi32(start, c->half)) + move;
    wanted = _mm512_add_epi32(_mm512_cvtps_epi32(target), c->half);
  }
  const __m512i raised = _mm512_max_epi32(wanted, _mm512_setzero_si512());
  const __m512i got = _mm512_min_epi32(raised, c->top);
  __m512i new_code = got;
  if (feedback == QM_FEEDBACK_RESIDUAL) {
    new_code = _mm512_srlv_epi32(got, c->bits);
    step_put_field(c->new_residual + j, _mm512_and_si512(got, c->residual_mask), c->residual_shift);
  }
  step_put_field(c->new_codes + j, new_code, c->shift);
  piece->moved[i] = _mm512_cmpneq_epi32_mask(new_code, code);
  piece->clipped[i] = _mm512_cmpneq_epi32_mask(got, wanted);
  if (feedback == QM_FEEDBACK_MOMENTUM) step_feedback(c, piece, first, i, start, got, kind);
}

/* bits + random; what bf16 keeps is in the upper halves. Feedback alone can leave a number that is
** not finite, which stays as it is. */
QM_STEP_INLINE __m512i step_raise(const float *x, __m512i random, int feedback) {
  const __m512i bits = _mm512_loadu_si512(x);
  if (feedback != QM_FEEDBACK_MOMENTUM) return _mm512_add_epi32(bits, random);
  const __m512 magnitude = _mm512_abs_ps(_mm512_castsi512_ps(bits));
  const __mmask16 finite = _mm512_cmp_ps_mask(magnitude, step_splat(FLT_MAX), _CMP_LE_OQ);
  return _mm512_mask_add_epi32(bits, finite, bits, random);
}
/* qm_exp_avg_sq_bits */
QM_STEP_INLINE __m512i step_halves(__m512i words) {
  return _mm512_srli_epi32(_mm512_add_epi32(words, _mm512_slli_epi32(words, 16)), 16);
}
/* Both moments of vectors i and i + 1 to bf16, as qm_to_bf16_stochastic. An arithmetic NaN is quiet
** already, and others never come here. */
QM_STEP_INLINE void step_narrow(const step_row_512 *row, const step_piece *piece, int64_t first,
                                int32_t i, int feedback) {
  static const uint16_t high[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const int64_t at = i * STEP_LANES, next = at + STEP_LANES, j = first + at;
  const __m512i order = _mm512_loadu_si512(high), low = _mm512_set1_epi32(0xFFFF);
  const __m512i a = _mm512_loadu_si512(piece->words + at);
  const __m512i b = _mm512_loadu_si512(piece->words + next);
  const __mmask32 ok = (__mmask32)piece->ok[i] | (__mmask32)piece->ok[i + 1] << 16;
  const __m512i m = _mm512_permutex2var_epi16(
      step_raise(piece->m + at, _mm512_and_si512(a, low), feedback), order,
      step_raise(piece->m + next, _mm512_and_si512(b, low), feedback));
  const __m512i v =
      _mm512_permutex2var_epi16(step_raise(piece->v + at, step_halves(a), QM_FEEDBACK_NONE), order,
                                step_raise(piece->v + next, step_halves(b), QM_FEEDBACK_NONE));
  _mm512_mask_storeu_epi16((uint16_t *)row->m + j, ok, m);
  _mm512_mask_storeu_epi16((uint16_t *)row->v + j, ok, v);
}

/* Both loops; `kind` of moments, like `feedback` and `rounding`, is a constant. */
QM_STEP_INLINE void step_one_piece(const step_row_512 *row, const qm_noise_keys *keys,
                                   step_piece *piece, int64_t first, int feedback, int rounding,
                                   int kind) {
  const uint64_t element_block = (uint64_t)(row->element + first) >> 2;
  qm_noise_state noise;
#define ADAM(i) step_adam(row, piece, first, i, feedback, kind)
#define ROUND(i) step_round(row, piece, first, i, feedback, rounding, kind)
  if (rounding == QM_ROUND_STOCHASTIC || kind == MOMENTS_BF16) {
    qm_noise_begin(&noise, keys, element_block);
    ADAM(0);
    _Pragma("GCC unroll 6") for (int32_t i = 1; i < 7; i++) {
      qm_noise_round(&noise, keys, i + 2);
      ADAM(i);
    }
    qm_noise_end(piece->words, &noise, keys);
    ADAM(7);
  } else {
    _Pragma("GCC unroll 8") for (int32_t i = 0; i < STEP_VECTORS; i++) ADAM(i);
  }
  _Pragma("GCC unroll 8") for (int32_t i = 0; i < STEP_VECTORS; i++) ROUND(i);
  if (kind == MOMENTS_BF16) {
    _Pragma("GCC unroll 4") for (int32_t i = 0; i < STEP_VECTORS; i += 2)
        step_narrow(row, piece, first, i, feedback);
  }
#undef ROUND
#undef ADAM
}

/* Make the keys; false where blocks of random words do not begin with columns, or where their
** numbers differ in the upper half. */
static inline int step_enter_noise(const update_call *call, update_block *block,
                                   const update_row *row, int64_t end) {
  const uint64_t first = (uint64_t)row->element >> 2, last = (uint64_t)(row->element + end) >> 2;
  if ((row->element & 3) != 0 || first >> 32 != last >> 32) return 0;
  const qm_noise noise = qm_adam_noise(&call->step, QM_STREAM_CODES);
  block->keys = qm_noise_prepare(&noise, first);
  return 1;
}

/* Columns [0, end) of the row; `end` is a multiple of STEP_PIECE. */
QM_STEP_INLINE void step_pieces(const update_call *call, update_block *block, const update_row *row,
                                update_counts *counts, int64_t end, int feedback, int rounding,
                                int kind) {
  const step_row_512 constants = step_row_512_of(call, block, row);
  const qm_noise_keys keys = block->keys;
  step_piece piece;
  for (int64_t first = 0; first < end; first += STEP_PIECE) {
    step_one_piece(&constants, &keys, &piece, first, feedback, rounding, kind);
    counts->moved += step_count(piece.moved);
    counts->clipped += step_count(piece.clipped);
    counts->skipped += STEP_PIECE - step_count(piece.ok);
  }
}
#endif

#endif
