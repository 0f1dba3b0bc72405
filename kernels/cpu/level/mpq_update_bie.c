/* mpq_update_bie.c - bitorch-engine's update step by blocks of columns.
**
** Reference: kernels/reference/mpq_update_bie.c, equal bit for bit: the same elements (mpq_bie.h),
**            group means summed in the same order.
** Cost:      a mode for comparison: walks memory in rows and on all threads, no more.
*/
#include <stdlib.h>

#include "mpq_bie.h"
#include "mpq_block.h"

enum { BIE_COLUMNS = 32 }; /* as many as a word of packed zero points spans, at most */

/* One block of columns and its room: w, u [K, BIE_COLUMNS], sums [G, BIE_COLUMNS], counts [G]. */
typedef struct bie_block {
  int64_t first, count;
  float *w, *u;
  double *sums;
  int64_t *counts;
} bie_block;

static int open_block(bie_block *block, const qm_mpq_view *q) {
  const size_t rows = (size_t)q->k * BIE_COLUMNS, groups = (size_t)q->groups;
  block->w = malloc(rows * sizeof *block->w + 1);
  block->u = malloc(rows * sizeof *block->u + 1);
  block->sums = malloc(groups * BIE_COLUMNS * sizeof *block->sums + 1);
  block->counts = malloc(groups * sizeof *block->counts + 1);
  return block->w != NULL && block->u != NULL && block->sums != NULL && block->counts != NULL;
}

static void close_block(bie_block *block) {
  free(block->w);
  free(block->u);
  free(block->sums);
  free(block->counts);
}

static void step_rows(const qm_bie_step *step, bie_block *block) {
  const qm_mpq_view *q = &step->args->q;
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t g = qm_mpq_group(q, p), at = qm_mpq_feature(q, p) * q->n + block->first;
    float *w = block->w + p * BIE_COLUMNS, *u = block->u + p * BIE_COLUMNS;
    for (int64_t j = 0; j < block->count; j++) {
      const int64_t n = block->first + j;
      const float code = (float)qm_mpq_code(q, p, n);
      u[j] = qm_bie_direction(step, at + j);
      w[j] = qm_bie_decode(step, code, qm_mpq_scale(q, g, n), qm_mpq_zero(q, g, n));
      w[j] = qm_round_to(step->dtype, w[j] + -step->numbers.rate * u[j]);
    }
  }
}

static void move_zeros(const qm_bie_step *step, bie_block *block) {
  const qm_mpq_view *q = &step->args->q;
  memset(block->sums, 0, (size_t)q->groups * BIE_COLUMNS * sizeof *block->sums);
  memset(block->counts, 0, (size_t)q->groups * sizeof *block->counts);
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t g = qm_mpq_group(q, p);
    block->counts[g]++;
    for (int64_t j = 0; j < block->count; j++)
      block->sums[g * BIE_COLUMNS + j] += (double)qm_bie_mean_term(
          step, block->u[p * BIE_COLUMNS + j], qm_mpq_zero(q, g, block->first + j));
  }
  for (int64_t g = 0; g < q->groups; g++)
    for (int64_t j = 0; j < block->count; j++)
      qm_bie_move_zero(step, g, block->first + j, block->sums[g * BIE_COLUMNS + j],
                       block->counts[g]);
}

static void pack_rows(const qm_bie_step *step, const bie_block *block) {
  const qm_mpq_view *q = &step->args->q;
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t g = qm_mpq_group(q, p);
    const int32_t w_bit = qm_mpq_section_of(q, p)->w_bit;
    for (int64_t j = 0; j < block->count; j++) {
      const int64_t n = block->first + j;
      qm_mpq_set_code(q, p, n,
                      qm_bie_encode(step, w_bit, block->w[p * BIE_COLUMNS + j],
                                    qm_mpq_scale(q, g, n), qm_mpq_zero(q, g, n)));
    }
  }
}

int32_t QM_CPU(mpq_update_bie)(void *context, const qm_mpq_update_bie_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  const qm_adam_source source =
      qm_adam_source_of(&args->adam, args->live.data, args->scale.data, args->exp_avg.data == NULL);
  const qm_adam_numbers numbers = qm_adam_in_force(&source);
  if (numbers.skip) return QM_OK;
  const qm_bie_step step = qm_bie_step_of(args, &numbers);
  const int moves_zeros = numbers.noise.step % 5 == 0;
  bie_block block; /* room first: nothing is changed where there is none */
  const int64_t blocks = (q->n + BIE_COLUMNS - 1) / BIE_COLUMNS;
  int failed = 0;
#pragma omp parallel private(block) if (q->k * q->n > QM_MPQ_SERIAL_MAX)
  {
    if (!open_block(&block, q)) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; i++) {
      block.first = i * BIE_COLUMNS;
      block.count = QM_MIN(BIE_COLUMNS, q->n - block.first);
      if (failed) continue;
      step_rows(&step, &block);
      if (moves_zeros && !q->asym) move_zeros(&step, &block);
      pack_rows(&step, &block);
      if (moves_zeros && q->asym) move_zeros(&step, &block);
    }
    close_block(&block);
  }
  return failed ? qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory") : QM_OK;
}
