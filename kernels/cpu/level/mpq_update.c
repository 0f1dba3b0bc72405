/* mpq_update.c - one Adam step of a quantized parameter, fused: every byte of codes, grid, moments
** and gradient is read once and written once.
**
** Reference: kernels/reference/mpq_update.c, equal bit for bit (IEEE sqrt and divide, no
**            contraction, the same random bits).
** Cost:      4 bits, f32 moments and gradient: reads 12.5 and writes 8.5 bytes an element, memory
**            bound; bf16 moments move 8 bytes less.
*/
#include "mpq_step.h"
#include "mpq_step_512.h"

enum { CHUNK_ROWS = 128 }; /* rows of one task */

static void enter_group(const update_call *call, update_block *block, int64_t g) {
  const qm_mpq_view *q = &call->args->q;
  if (!qm_mpq_enter_group(&block->grid, q, g)) return;
  for (int64_t j = 0; j < block->grid.count; j++) {
    block->rate[j] = qm_mpq_step_rate(call->step.rate, block->grid.scale[j]);
    block->zero[j] = qm_mpq_step_zero(q->asym, block->grid.scale[j], block->grid.zero[j]);
  }
}

/* Columns from .. n - 1 of a row as f32, in place or expanded into `buffer`. */
static float *f32_row(const qm_array *x, int64_t at, int64_t from, int64_t n, float *buffer) {
  if (x->dtype == QM_F32) return (float *)x->data + at;
  qm_expand(buffer + from, x->data, x->dtype, at + from, n - from);
  return buffer;
}

static void store_bf16(const update_block *block, const update_row *row, int64_t from) {
  const uint32_t *restrict random = block->random;
  const float *restrict m = block->m, *restrict v = block->v;
  uint16_t *restrict m_out = row->m, *restrict v_out = row->v;
  const int64_t n = block->grid.count;
  for (int64_t j = from; j < n; j++) {
    m_out[j] = qm_to_bf16_stochastic(m[j], qm_exp_avg_bits(random[j]));
    v_out[j] = qm_to_bf16_stochastic(v[j], qm_exp_avg_sq_bits(random[j]));
  }
}

/* The row's random bits; meanwhile the next row is on its way: the memory would idle here, and the
** hardware's own prefetching stops at every row's end. */
static void draw(const update_call *call, update_block *block, const update_row *row,
                 int64_t from) {
  enum { PIECE = QM_NOISE_WORDS };
  const qm_noise noise = qm_adam_noise(&call->step, QM_STREAM_CODES);
  for (int64_t j = from; j < block->grid.count; j += PIECE) {
    const int64_t count = QM_MIN(PIECE, block->grid.count - j);
    for (int64_t i = 0; i < count; i += 16) prefetch_next(call, row, j + i);
    qm_noise_words(block->random + j, &noise, (uint64_t)(row->element + j), count);
  }
}

/* The row from column `from` on, in plain loops. */
static void step_plainly(const update_call *call, update_block *block, update_row *row,
                         update_counts *counts, int64_t at, int64_t from) {
  const qm_mpq_update_args *args = call->args;
  const int64_t n = block->grid.count;
  float *m = NULL, *v = NULL;
  if (call->moments != MOMENTS_NONE) {
    m = f32_row(&args->exp_avg, at, from, n, block->m);
    v = f32_row(&args->exp_avg_sq, at, from, n, block->v);
  }
  if (args->options.rounding == QM_ROUND_STOCHASTIC || call->moments == MOMENTS_BF16)
    draw(call, block, row, from);
  choose_step(call, block, row, m, v, counts, from);
  if (call->moments == MOMENTS_BF16) store_bf16(block, row, from);
}

#ifdef STEP_512
/* Whole pieces of the row; returns the column they reach. */
static int64_t step_quickly(const update_call *call, update_block *block, const update_row *row,
                            update_counts *counts) {
  const int feedback = call->args->options.feedback, moments = call->moments;
  const int stochastic = call->args->options.rounding == QM_ROUND_STOCHASTIC;
  const int64_t end = block->grid.count / STEP_PIECE * STEP_PIECE;
  if (end == 0 || !step_enter_noise(call, block, row, end)) return 0;
#define STEP(f, r, m) step_pieces(call, block, row, counts, end, QM_FEEDBACK_##f, QM_ROUND_##r, m)
#define STEP_MOMENTS(f, r)                                                                         \
  if (moments == MOMENTS_F32)                                                                      \
    STEP(f, r, MOMENTS_F32);                                                                       \
  else if (moments == MOMENTS_BF16)                                                                \
    STEP(f, r, MOMENTS_BF16);                                                                      \
  else                                                                                             \
    STEP(f, r, MOMENTS_NONE)
  if (feedback == QM_FEEDBACK_MOMENTUM) {
    if (!stochastic || moments == MOMENTS_NONE) return 0;
    if (moments == MOMENTS_F32)
      STEP(MOMENTUM, STOCHASTIC, MOMENTS_F32);
    else
      STEP(MOMENTUM, STOCHASTIC, MOMENTS_BF16);
  } else if (feedback == QM_FEEDBACK_NONE && stochastic) {
    STEP_MOMENTS(NONE, STOCHASTIC);
  } else if (feedback == QM_FEEDBACK_NONE) {
    STEP_MOMENTS(NONE, NEAREST);
  } else if (stochastic) {
    STEP_MOMENTS(RESIDUAL, STOCHASTIC);
  } else {
    STEP_MOMENTS(RESIDUAL, NEAREST);
  }
#undef STEP_MOMENTS
#undef STEP
  return end;
}
#endif

/* The place of a row's moment or gradient. */
static char *place(const qm_array *x, int64_t at) {
  return x->data == NULL ? NULL : (char *)x->data + at * qm_element_size(x->dtype);
}

static void update_row_at(const update_call *call, update_block *block, int64_t p,
                          update_counts *counts) {
  const qm_mpq_update_args *args = call->args;
  const qm_mpq_view *q = &args->q;
  const int64_t n = block->grid.count, first = block->grid.first;
  const int64_t at = qm_mpq_feature(q, p) * q->n + first;
  const int64_t next = qm_mpq_feature(q, QM_MIN(p + 1, q->k - 1)) * q->n + first;
  const qm_mpq_place codes = qm_mpq_place_of(q, p);
  enter_group(call, block, qm_mpq_group(q, p));
  update_row row = {.grad = f32_row(&args->grad, at, 0, n, block->grad),
                    .m = place(&args->exp_avg, at),
                    .v = place(&args->exp_avg_sq, at),
                    .element = p * q->n + first,
                    .next_grad = place(&args->grad, next),
                    .next_m = place(&args->exp_avg, next),
                    .next_v = place(&args->exp_avg_sq, next),
                    .grad_bytes = qm_element_size(args->grad.dtype),
                    .moment_bytes = qm_element_size(args->exp_avg.dtype),
                    .codes = codes.words + first,
                    .new_codes = block->codes,
                    .shift = codes.shift,
                    .mask = qm_mpq_mask(codes.w_bit),
                    .span = qm_mpq_span_for(q, codes.w_bit)};
  const int32_t residual_bits = row.span.bits;
  if (codes.beyond) { /* the step works on whole fields */
    qm_mpq_join(block->joined, &codes, q, &block->grid);
    memset(block->parted, 0, (size_t)n * sizeof *block->parted);
    row.codes = block->joined;
    row.new_codes = block->parted;
    row.shift = 0;
  }
  if (residual_bits > 0) {
    row.residual = qm_mpq_words(q->residual.data, residual_bits, q, &block->grid, p);
    row.residual_shift = residual_bits * (int32_t)(p % (32 / residual_bits));
  }
  int64_t done = 0;
#ifdef STEP_512
  done = step_quickly(call, block, &row, counts);
#endif
  if (done < n) step_plainly(call, block, &row, counts, at, done);
  if (codes.beyond)
    for (int64_t j = 0; j < n; j++) block->codes[j] |= block->parted[j] << codes.shift;
  qm_mpq_flush_codes(&codes, block->codes, block->parted, &block->grid);
  if (residual_bits > 0)
    qm_mpq_flush(q->residual.data, block->residual, residual_bits, q, &block->grid, p);
}

static update_counts update_rows(const update_call *call, int64_t first_row, int64_t end_row,
                                 int64_t first_column, int64_t columns) {
  update_counts counts = {0};
  update_block block;
  block.grid.first = first_column;
  block.grid.count = columns;
  block.grid.group = -1;
  memset(block.codes, 0, sizeof block.codes);
  memset(block.residual, 0, sizeof block.residual);
  for (int64_t p = first_row; p < end_row; p++) update_row_at(call, &block, p, &counts);
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
      .moments = args->exp_avg.data == NULL       ? MOMENTS_NONE
                 : args->exp_avg.dtype == QM_BF16 ? MOMENTS_BF16
                                                  : MOMENTS_F32,
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
