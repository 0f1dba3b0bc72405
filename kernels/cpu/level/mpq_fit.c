/* mpq_fit.c - scales and zeros that span the weights, one group and block of columns at a time.
**
** Reference: kernels/reference/mpq_fit.c, equal bit for bit (sums run over rows in the same order).
** Cost:      minmax reads the weight once; mse 41 times more, from the cache.
*/
#include <stdlib.h>

#include "mpq_block.h"

enum { FIT_COLUMNS = 256 };

/* The packed rows of each group, in order: rows[starts[g]] .. rows[starts[g + 1] - 1]. */
typedef struct group_rows {
  int64_t *starts, *rows;
} group_rows;

static int32_t sort_rows(const qm_mpq_view *q, group_rows *out) {
  out->starts = calloc((size_t)q->groups + 2, sizeof *out->starts);
  out->rows = malloc((size_t)q->k * sizeof *out->rows + 1);
  if (out->starts == NULL || out->rows == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  for (int64_t p = 0; p < q->k; p++) out->starts[qm_mpq_group(q, p) + 2]++;
  for (int64_t g = 0; g < q->groups; g++) out->starts[g + 2] += out->starts[g + 1];
  for (int64_t p = 0; p < q->k; p++) out->rows[out->starts[qm_mpq_group(q, p) + 1]++] = p;
  return QM_OK;
}

typedef struct fit_block {
  const qm_mpq_fit_args *args;
  int64_t first, count;      /* columns */
  const int64_t *rows, *end; /* packed rows of the group */
  qm_mpq_grid_kind kind;
  float lo[FIT_COLUMNS], hi[FIT_COLUMNS], w[FIT_COLUMNS];
  qm_mpq_grid best[FIT_COLUMNS];
} fit_block;

static const float *weight_row(fit_block *block, int64_t p) {
  const qm_array *w = &block->args->w;
  const int64_t at = qm_mpq_feature(&block->args->q, p) * block->args->q.n + block->first;
  if (w->dtype == QM_F32) return (const float *)w->data + at;
  qm_expand(block->w, w->data, w->dtype, at, block->count);
  return block->w;
}

static void find_ends(fit_block *block) {
  float *restrict lo = block->lo, *restrict hi = block->hi;
  const int32_t asym = block->args->q.asym;
  for (int64_t j = 0; j < block->count; j++) lo[j] = INFINITY;
  for (int64_t j = 0; j < block->count; j++) hi[j] = -INFINITY;
  for (const int64_t *p = block->rows; p < block->end; p++) {
    const float *restrict w = weight_row(block, *p);
    for (int64_t j = 0; j < block->count; j++) {
      const int finite = fabsf(w[j]) <= FLT_MAX;
      lo[j] = (finite & (w[j] < lo[j])) ? w[j] : lo[j];
      hi[j] = (finite & (w[j] > hi[j])) ? w[j] : hi[j];
    }
  }
  for (int64_t j = 0; j < block->count; j++) {
    if (lo[j] > hi[j]) lo[j] = hi[j] = 0.0f;
    lo[j] = asym && !(lo[j] < 0.0f) ? 0.0f : lo[j];
    hi[j] = asym && !(hi[j] > 0.0f) ? 0.0f : hi[j];
  }
}

static void squared_errors(fit_block *block, const qm_mpq_grid *grids, double *restrict errors) {
  const int32_t asym = block->args->q.asym;
  const float top = (float)qm_mpq_mask(block->kind.w_bit);
  float scale[FIT_COLUMNS], zero[FIT_COLUMNS];
  for (int64_t j = 0; j < block->count; j++) {
    scale[j] = grids[j].scale;
    zero[j] = grids[j].zero;
    errors[j] = 0.0;
  }
  for (const int64_t *p = block->rows; p < block->end; p++) {
    const float *restrict w = weight_row(block, *p);
    for (int64_t j = 0; j < block->count; j++) {
      const float y = asym ? w[j] / scale[j] + zero[j] : (w[j] + zero[j]) / scale[j];
      const float code = qm_mpq_rint(y > 0.0f ? (y < top ? y : top) : 0.0f);
      const float near = asym ? scale[j] * (code - zero[j]) : code * scale[j] - zero[j];
      const float error = fabsf(w[j]) <= FLT_MAX ? w[j] - near : 0.0f;
      errors[j] += (double)error * (double)error;
    }
  }
}

static void fit_group(fit_block *block) {
  const qm_mpq_fit_args *args = block->args;
  const int32_t tries = args->method == QM_FIT_MSE ? QM_MPQ_FIT_TRIES : 1;
  qm_mpq_grid grids[FIT_COLUMNS];
  double least[FIT_COLUMNS] = {0}, errors[FIT_COLUMNS] = {0};
  find_ends(block);
  for (int32_t i = 0; i < tries; i++) {
    const float factor = qm_mpq_fit_factor(args->range, i);
    for (int64_t j = 0; j < block->count; j++)
      grids[j] = qm_mpq_grid_scaled(block->lo[j], block->hi[j], factor, block->kind);
    if (tries > 1) squared_errors(block, grids, errors);
    for (int64_t j = 0; j < block->count; j++) {
      if (i > 0 && !(errors[j] < least[j])) continue;
      least[j] = errors[j];
      block->best[j] = grids[j];
    }
  }
}

static void store_grids(const fit_block *block, int64_t g) {
  const qm_mpq_view *q = &block->args->q;
  for (int64_t j = 0; j < block->count; j++) {
    const int64_t n = block->first + j;
    qm_store(q->scales.data, q->scales.dtype, g * q->n + n, block->best[j].scale);
    if (q->asym)
      qm_mpq_set_zero_point(q, g, n, (int64_t)block->best[j].zero);
    else
      qm_store(q->zeros.data, q->zeros.dtype, g * q->n + n, block->best[j].zero);
  }
}

int32_t QM_CPU(mpq_fit)(void *context, const qm_mpq_fit_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  group_rows order = {0};
  const int32_t status = sort_rows(q, &order);
  if (status == QM_OK) {
#pragma omp parallel for collapse(2) schedule(static) if (args->w.count > QM_MPQ_SERIAL_MAX)
    for (int64_t g = 0; g < q->groups; g++) {
      for (int64_t n = 0; n < q->n; n += FIT_COLUMNS) {
        fit_block block;
        block.args = args;
        block.first = n;
        block.count = QM_MIN(FIT_COLUMNS, q->n - n);
        block.rows = order.rows + order.starts[g];
        block.end = order.rows + order.starts[g + 1];
        const qm_mpq_rows *section =
            block.rows < block.end ? qm_mpq_section_of(q, *block.rows) : q->sections;
        block.kind = qm_mpq_grid_kind_of(q, section->w_bit);
        fit_group(&block);
        store_grids(&block, g);
      }
    }
  }
  free(order.starts);
  free(order.rows);
  return status;
}
