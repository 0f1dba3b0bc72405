/* mpq_step.h - the update step of a row's columns in a plain loop, which the compiler vectorizes,
** and what it works on. mpq_update.c leads it through the parameter. */
#ifndef QM_CPU_MPQ_STEP_H
#define QM_CPU_MPQ_STEP_H

#include "mpq_block.h"
#include "noise.h"

/* What the step has for moments. */
enum { MOMENTS_NONE = 0, MOMENTS_F32 = 1, MOMENTS_BF16 = 2 };

/* What stays the same over one call. */
typedef struct update_call {
  const qm_mpq_update_args *args;
  qm_adam_numbers step;
  int moments; /* MOMENTS_* */
} update_call;

typedef struct update_counts {
  int64_t moved, clipped, skipped;
} update_counts;

/* One block at work: code and residual words before and after, and f32 rows. */
typedef struct update_block {
  qm_mpq_block grid;
  float rate[QM_MPQ_COLUMNS], zero[QM_MPQ_COLUMNS]; /* in code units, see qm_mpq_step_rate */
  uint32_t codes[QM_MPQ_COLUMNS], residual[QM_MPQ_COLUMNS]; /* words being filled */
  uint32_t joined[QM_MPQ_COLUMNS], parted[QM_MPQ_COLUMNS];  /* codes that straddle words */
  uint32_t random[QM_MPQ_COLUMNS];
  qm_noise_keys keys;
  float grad[QM_MPQ_COLUMNS], m[QM_MPQ_COLUMNS], v[QM_MPQ_COLUMNS]; /* where they are not f32 */
} update_block;

/* Operands of one row, from the block's first column on. */
typedef struct update_row {
  const float *grad;
  void *m, *v;                             /* as they lie */
  int64_t element;                         /* whose random bits the first column takes */
  const char *next_grad, *next_m, *next_v; /* of the row that is to come */
  int64_t grad_bytes, moment_bytes;        /* of one element */
  const uint32_t *codes, *residual;        /* words before */
  uint32_t *new_codes;                     /* words being filled */
  int32_t shift, residual_shift;
  uint32_t mask; /* of a code */
  qm_mpq_span span;
} update_row;

/* Ask for the cache lines of the next row's columns from j on: 16 of them, a line of f32. */
static inline void prefetch_next(const update_call *call, const update_row *row, int64_t j) {
  __builtin_prefetch(row->next_grad + j * row->grad_bytes);
  if (call->moments == MOMENTS_NONE) return;
  __builtin_prefetch(row->next_m + j * row->moment_bytes);
  __builtin_prefetch(row->next_v + j * row->moment_bytes);
}

/* The row from column `from` on, with f32 moments m and v or none; `feedback`, `rounding` and
** `has_moments` are constants. */
static inline __attribute__((always_inline)) void step_row(const update_call *call,
                                                           update_block *block,
                                                           const update_row *row, float *restrict m,
                                                           float *restrict v, update_counts *counts,
                                                           int64_t from, int feedback, int rounding,
                                                           int has_moments) {
  const qm_adam_numbers c = call->step;
  const qm_mpq_span span = row->span;
  const uint32_t mask = row->mask;
  const uint32_t residual_mask = span.bits > 0 ? qm_mpq_mask(span.bits) : 0;
  const int32_t shift = row->shift, residual_shift = row->residual_shift;
  const float *restrict grad = row->grad, *restrict rate = block->rate;
  const float *restrict zero = block->zero, *restrict scale = block->grid.scale;
  const uint32_t *restrict codes = row->codes, *restrict residual = row->residual;
  const uint32_t *restrict random = block->random;
  uint32_t *restrict new_codes = row->new_codes, *restrict new_residual = block->residual;
  int32_t moved = 0, clipped = 0, skipped = 0;
  for (int64_t j = from; j < block->grid.count; j++) {
    const int32_t code = (int32_t)(codes[j] >> shift & mask);
    const float decay = c.decay * ((float)code - zero[j]), g = grad[j] * c.grad_scale;
    float d, next_m = 0.0f, next_v = 0.0f, denominator = 0.0f;
    if (has_moments) {
      next_m = c.beta1 * m[j] + c.one_minus_beta1 * g;
      next_v = c.beta2 * v[j] + c.one_minus_beta2 * g * g;
      denominator = sqrtf(next_v) + c.eps;
      d = -(rate[j] * next_m / denominator + decay);
    } else {
      d = -(rate[j] * g + decay);
    }
    const int ok = (fabsf(d) <= FLT_MAX) & (next_v <= FLT_MAX);
    const float scaled = ok ? d * span.unit : 0.0f;
    const float floor_limited = scaled < -QM_MPQ_MOVE_MAX ? -QM_MPQ_MOVE_MAX : scaled;
    const float move = floor_limited > QM_MPQ_MOVE_MAX ? QM_MPQ_MOVE_MAX : floor_limited;
    int32_t start = code;
    if (feedback == QM_FEEDBACK_RESIDUAL)
      start = (code << span.bits) + (int32_t)(residual[j] >> residual_shift & residual_mask) -
              span.half;
    float wanted;
    if (rounding == QM_ROUND_STOCHASTIC) {
      const float u = qm_uniform_of(random[j]);
      wanted = (float)start + qm_mpq_stochastic(move, qm_mpq_floor(move), u);
    } else {
      wanted = qm_mpq_rint((float)start + move);
    }
    const float raised = wanted < span.low ? span.low : wanted;
    const float got = raised > span.high ? span.high : raised;
    const int32_t steps = (int32_t)got;
    int32_t new_code = steps;
    if (feedback == QM_FEEDBACK_RESIDUAL) {
      new_code = (steps + span.half) >> span.bits;
      new_residual[j] |= (uint32_t)(steps - (new_code << span.bits) + span.half) << residual_shift;
    }
    new_codes[j] |= (uint32_t)new_code << shift;
    moved += new_code != code;
    clipped += got != wanted;
    skipped += !ok;
    if (has_moments) {
      if (feedback == QM_FEEDBACK_MOMENTUM) {
        const float target = (float)start + move;
        const int inside = (target >= span.low) & (target <= span.high);
        const float lost = inside ? scale[j] * (move - (got - (float)start)) : 0.0f;
        next_m -= c.inject * denominator * lost;
      }
      m[j] = ok ? next_m : m[j];
      v[j] = ok ? next_v : v[j];
    }
  }
  counts->moved += moved;
  counts->clipped += clipped;
  counts->skipped += skipped;
}

static void choose_step(const update_call *call, update_block *block, const update_row *row,
                        float *m, float *v, update_counts *counts, int64_t from) {
  const int feedback = call->args->options.feedback;
  const int stochastic = call->args->options.rounding == QM_ROUND_STOCHASTIC;
  const int moments = call->moments != MOMENTS_NONE;
#define STEP(f, r, has_moments)                                                                    \
  step_row(call, block, row, m, v, counts, from, QM_FEEDBACK_##f, QM_ROUND_##r, has_moments)
  if (feedback == QM_FEEDBACK_NONE && stochastic && moments)
    STEP(NONE, STOCHASTIC, 1);
  else if (feedback == QM_FEEDBACK_MOMENTUM && stochastic)
    STEP(MOMENTUM, STOCHASTIC, 1);
  else if (feedback == QM_FEEDBACK_RESIDUAL && stochastic && moments)
    STEP(RESIDUAL, STOCHASTIC, 1);
  else if (feedback == QM_FEEDBACK_NONE && stochastic)
    STEP(NONE, STOCHASTIC, 0);
  else if (feedback == QM_FEEDBACK_RESIDUAL && stochastic)
    STEP(RESIDUAL, STOCHASTIC, 0);
  else if (feedback == QM_FEEDBACK_NONE && moments)
    STEP(NONE, NEAREST, 1);
  else if (feedback == QM_FEEDBACK_MOMENTUM)
    STEP(MOMENTUM, NEAREST, 1);
  else if (feedback == QM_FEEDBACK_RESIDUAL && moments)
    STEP(RESIDUAL, NEAREST, 1);
  else if (feedback == QM_FEEDBACK_NONE)
    STEP(NONE, NEAREST, 0);
  else
    STEP(RESIDUAL, NEAREST, 0);
#undef STEP
}

#endif
