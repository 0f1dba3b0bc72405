/* mpq_update.c - one Adam step of a quantized parameter, fused: every byte of codes, grid, moments
** and gradient is read once and written once.
**
** Reference: kernels/reference/mpq_update.c, equal bit for bit (IEEE sqrt and divide, no
**            contraction, the same random bits).
** Cost:      4 bits, f32 moments and gradient: reads 12.5 and writes 8.5 bytes an element, memory
**            bound; bf16 moments move 8.5 bytes less and draw one more random word.
*/
#include "mpq_block.h"
#include "noise.h"

enum { CHUNK_ROWS = 128 }; /* rows of one task */

/* What stays the same over one call. */
typedef struct update_call {
  const qm_mpq_update_args *args;
  qm_adam_numbers step;
  qm_mpq_span span;
  int has_moments, half_moments; /* moments given; in bf16 */
} update_call;

typedef struct update_counts {
  int64_t moved, clipped, skipped;
} update_counts;

/* One block at work: code and residual words before and after, and f32 rows. */
typedef struct update_block {
  qm_mpq_block grid;
  float rate[QM_MPQ_COLUMNS], zero[QM_MPQ_COLUMNS]; /* in code units, see qm_mpq_step_rate */
  uint32_t codes[QM_MPQ_COLUMNS], residual[QM_MPQ_COLUMNS]; /* words being filled */
  uint32_t random[QM_MPQ_COLUMNS];
  float grad[QM_MPQ_COLUMNS], m[QM_MPQ_COLUMNS], v[QM_MPQ_COLUMNS]; /* where they are not f32 */
} update_block;

/* Operands of one row, from the block's first column on. */
typedef struct update_row {
  const float *grad;
  float *m, *v;
  const uint32_t *codes, *residual; /* words before */
  int32_t shift, residual_shift;
} update_row;

/* The row, for constant `feedback`, `rounding` and `has_moments`. */
static inline __attribute__((always_inline)) void step_row(const update_call *call,
                                                           update_block *block,
                                                           const update_row *row,
                                                           update_counts *counts, int feedback,
                                                           int rounding, int has_moments) {
  const qm_adam_numbers c = call->step;
  const qm_mpq_span span = call->span;
  const uint32_t mask = qm_mpq_mask(call->args->q.w_bit);
  const uint32_t residual_mask = span.bits > 0 ? qm_mpq_mask(span.bits) : 0;
  const int32_t shift = row->shift, residual_shift = row->residual_shift;
  const float *restrict grad = row->grad, *restrict rate = block->rate;
  const float *restrict zero = block->zero, *restrict scale = block->grid.scale;
  float *restrict m = row->m, *restrict v = row->v;
  const uint32_t *restrict codes = row->codes, *restrict residual = row->residual;
  const uint32_t *restrict random = block->random;
  uint32_t *restrict new_codes = block->codes, *restrict new_residual = block->residual;
  int32_t moved = 0, clipped = 0, skipped = 0;
  for (int64_t j = 0; j < block->grid.count; j++) {
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
      const float low = qm_mpq_floor(move);
      wanted = (float)start + low + (qm_uniform_of(random[j]) < move - low ? 1.0f : 0.0f);
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
                        update_counts *counts) {
  const int feedback = call->args->options.feedback;
  const int stochastic = call->args->options.rounding == QM_ROUND_STOCHASTIC;
  const int moments = call->has_moments;
#define STEP(f, r, m) step_row(call, block, row, counts, QM_FEEDBACK_##f, QM_ROUND_##r, m)
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

static void enter_group(const update_call *call, update_block *block, int64_t g) {
  const qm_mpq_view *q = &call->args->q;
  if (!qm_mpq_enter_group(&block->grid, q, g)) return;
  for (int64_t j = 0; j < block->grid.count; j++) {
    block->rate[j] = qm_mpq_step_rate(call->step.rate, block->grid.scale[j]);
    block->zero[j] = qm_mpq_step_zero(q->asym, block->grid.scale[j], block->grid.zero[j]);
  }
}

/* A row of f32, in place or expanded into `buffer`. */
static float *f32_row(const qm_array *x, int64_t at, int64_t count, float *buffer) {
  if (x->dtype == QM_F32) return (float *)x->data + at;
  qm_expand(buffer, x->data, x->dtype, at, count);
  return buffer;
}

static void store_bf16(const update_call *call, update_block *block, int64_t at, int64_t element) {
  const qm_mpq_update_args *args = call->args;
  const qm_noise noise = qm_adam_noise(&call->step, QM_STREAM_EXP_AVG);
  const uint32_t *restrict random = block->random;
  const float *restrict m = block->m, *restrict v = block->v;
  uint16_t *restrict m_out = (uint16_t *)args->exp_avg.data + at;
  uint16_t *restrict v_out = (uint16_t *)args->exp_avg_sq.data + at;
  qm_noise_words(block->random, &noise, (uint64_t)element, block->grid.count);
  for (int64_t j = 0; j < block->grid.count; j++) {
    m_out[j] = qm_to_bf16_stochastic(m[j], qm_exp_avg_bits(random[j]));
    v_out[j] = qm_to_bf16_stochastic(v[j], qm_exp_avg_sq_bits(random[j]));
  }
}

/* Ask for the cache lines of x that elements at .. at + count - 1 of a row lie in. */
static void prefetch(const qm_array *x, int64_t at, int64_t count) {
  const int64_t size_bytes = x->dtype == QM_F32 ? 4 : 2;
  const char *line = (const char *)x->data + at * size_bytes;
  for (int64_t i = 0; i < count * size_bytes; i += 64) __builtin_prefetch(line + i);
}

/* The row's random bits; meanwhile the next row is on its way: the memory would idle here, and the
** hardware's own prefetching stops at every row's end. */
static void draw(const update_call *call, update_block *block, int64_t element, int64_t next) {
  enum { PIECE = QM_NOISE_WORDS };
  const qm_mpq_update_args *args = call->args;
  const qm_noise noise = qm_adam_noise(&call->step, QM_STREAM_CODES);
  const int64_t n = block->grid.count;
  for (int64_t j = 0; j < n; j += PIECE) {
    const int64_t count = QM_MIN(PIECE, n - j);
    prefetch(&args->grad, next + j, count);
    if (call->has_moments) {
      prefetch(&args->exp_avg, next + j, count);
      prefetch(&args->exp_avg_sq, next + j, count);
    }
    qm_noise_words(block->random + j, &noise, (uint64_t)(element + j), count);
  }
}

static void update_row_at(const update_call *call, update_block *block, int64_t p,
                          update_counts *counts) {
  const qm_mpq_update_args *args = call->args;
  const qm_mpq_view *q = &args->q;
  const int64_t n = block->grid.count, element = p * q->n + block->grid.first;
  const int64_t at = qm_mpq_feature(q, p) * q->n + block->grid.first;
  const int32_t residual_bits = call->span.bits;
  enter_group(call, block, qm_mpq_group(q, p));
  update_row row = {.grad = f32_row(&args->grad, at, n, block->grad),
                    .codes = qm_mpq_words(q->data.data, q->w_bit, q, &block->grid, p),
                    .shift = q->w_bit * (int32_t)(p % (32 / q->w_bit))};
  if (residual_bits > 0) {
    row.residual = qm_mpq_words(q->residual.data, residual_bits, q, &block->grid, p);
    row.residual_shift = residual_bits * (int32_t)(p % (32 / residual_bits));
  }
  if (call->has_moments) {
    row.m = f32_row(&args->exp_avg, at, n, block->m);
    row.v = f32_row(&args->exp_avg_sq, at, n, block->v);
  }
  if (args->options.rounding == QM_ROUND_STOCHASTIC) {
    const int64_t next = qm_mpq_feature(q, QM_MIN(p + 1, q->k - 1)) * q->n + block->grid.first;
    draw(call, block, element, next);
  }
  choose_step(call, block, &row, counts);
  if (call->half_moments) store_bf16(call, block, at, element);
}

static update_counts update_rows(const update_call *call, int64_t first_row, int64_t end_row,
                                 int64_t first_column, int64_t columns) {
  const qm_mpq_view *q = &call->args->q;
  update_counts counts = {0};
  update_block block;
  block.grid.first = first_column;
  block.grid.count = columns;
  block.grid.group = -1;
  memset(block.codes, 0, sizeof block.codes);
  memset(block.residual, 0, sizeof block.residual);
  for (int64_t p = first_row; p < end_row; p++) {
    update_row_at(call, &block, p, &counts);
    qm_mpq_flush(q->data.data, block.codes, q->w_bit, q, &block.grid, p);
    if (call->span.bits > 0)
      qm_mpq_flush(q->residual.data, block.residual, call->span.bits, q, &block.grid, p);
  }
  return counts;
}

int32_t QM_CPU(mpq_update)(void *context, const qm_mpq_update_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  const qm_adam_source source = qm_adam_source_of(&args->options.adam, args->live.data,
                                                  args->scale.data, args->exp_avg.data == NULL);
  const update_call call = {
      .args = args,
      .step = qm_adam_in_force(&source),
      .span = qm_mpq_span_of(q),
      .has_moments = args->exp_avg.data != NULL,
      .half_moments = args->exp_avg.data != NULL && args->exp_avg.dtype == QM_BF16,
  };
  const int64_t count = q->k * q->n;
  int64_t moved = 0, clipped = 0, skipped = 0;
  if (call.step.skip) return QM_OK;
#pragma omp parallel for collapse(2) schedule(static) if (count > QM_MPQ_SERIAL_MAX) \
    reduction(+ : moved, clipped, skipped)
  for (int64_t p = 0; p < q->k; p += CHUNK_ROWS) {
    for (int64_t n = 0; n < q->n; n += QM_MPQ_COLUMNS) {
      const update_counts counts =
          update_rows(&call, p, QM_MIN(p + CHUNK_ROWS, q->k), n, QM_MIN(QM_MPQ_COLUMNS, q->n - n));
      moved += counts.moved;
      clipped += counts.clipped;
      skipped += counts.skipped;
    }
  }
  int64_t *health = args->health.data;
  if (health == NULL) return QM_OK;
  health[0] += count;
  health[1] += moved;
  health[2] += clipped;
  health[3] += skipped;
  return QM_OK;
}
