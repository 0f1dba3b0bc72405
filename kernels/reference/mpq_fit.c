/* mpq_fit.c - scales and zeros that span the weights, group by group.
**
** QM_FIT_MINMAX: the least and the greatest finite weight (0 between them for asym) are the ends.
** QM_FIT_MSE: the shrunken span with the least squared error, the widest of equals.
*/
#include "mpq.h"
#include "reference.h"

static float weight_at(const qm_mpq_fit_args *args, int64_t p, int64_t n) {
  return qm_load(args->w.data, args->w.dtype, qm_mpq_feature(&args->q, p) * args->q.n + n);
}

/* A group's width is its rows', who all have the same; a group without rows has the first. */
static qm_mpq_grid_kind kind_of(const qm_mpq_view *q, int64_t g) {
  for (int64_t p = 0; p < q->k; p++)
    if (qm_mpq_group(q, p) == g) return qm_mpq_grid_kind_of(q, qm_mpq_section_of(q, p)->w_bit);
  return qm_mpq_grid_kind_of(q, q->sections[0].w_bit);
}

static double squared_error(const qm_mpq_fit_args *args, qm_mpq_grid_kind kind, int64_t g,
                            int64_t n, qm_mpq_grid grid) {
  const qm_mpq_view *q = &args->q;
  double sum = 0.0;
  for (int64_t p = 0; p < q->k; p++) {
    if (qm_mpq_group(q, p) != g) continue;
    const float w = weight_at(args, p, n);
    if (!(fabsf(w) <= FLT_MAX)) continue;
    const double error =
        (double)qm_mpq_grid_error(w, grid, (float)qm_mpq_mask(kind.w_bit), kind.asym);
    sum += error * error;
  }
  return sum;
}

static qm_mpq_grid fit(const qm_mpq_fit_args *args, qm_mpq_grid_kind kind, int64_t g, int64_t n) {
  const qm_mpq_view *q = &args->q;
  float lo = INFINITY, hi = -INFINITY;
  for (int64_t p = 0; p < q->k; p++) {
    if (qm_mpq_group(q, p) != g) continue;
    const float w = weight_at(args, p, n);
    if (!(fabsf(w) <= FLT_MAX)) continue;
    lo = w < lo ? w : lo;
    hi = w > hi ? w : hi;
  }
  if (lo > hi) lo = hi = 0.0f; /* a group without (finite) weights */
  if (q->asym) {
    lo = lo < 0.0f ? lo : 0.0f;
    hi = hi > 0.0f ? hi : 0.0f;
  }
  const int32_t tries = args->method == QM_FIT_MSE ? QM_MPQ_FIT_TRIES : 1;
  qm_mpq_grid best = {0};
  double least = HUGE_VAL;
  for (int32_t i = 0; i < tries; i++) {
    const qm_mpq_grid grid = qm_mpq_grid_scaled(lo, hi, qm_mpq_fit_factor(args->range, i), kind);
    const double error = tries == 1 ? 0.0 : squared_error(args, kind, g, n, grid);
    if (error < least || i == 0) {
      least = error;
      best = grid;
    }
  }
  return best;
}

int32_t qm_reference_mpq_fit(void *context, const qm_mpq_fit_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  for (int64_t g = 0; g < q->groups; g++) {
    const qm_mpq_grid_kind kind = kind_of(q, g);
    for (int64_t n = 0; n < q->n; n++) {
      const qm_mpq_grid grid = fit(args, kind, g, n);
      qm_store(q->scales.data, q->scales.dtype, g * q->n + n, grid.scale);
      if (q->asym)
        qm_mpq_set_zero_point(q, g, n, (int64_t)grid.zero);
      else
        qm_store(q->zeros.data, q->zeros.dtype, g * q->n + n, grid.zero);
    }
  }
  return QM_OK;
}
