/* mpq_linear.c - x W or x W^T from packed codes, every weight decoded where it is needed. */
#include "mpq.h"
#include "reference.h"

static double weight(const qm_mpq_view *q, int64_t p, int64_t n) {
  const int64_t g = qm_mpq_group(q, p);
  const float code = (float)qm_mpq_code(q, p, n);
  return (double)qm_mpq_decode(q->asym, code, qm_mpq_scale(q, g, n), qm_mpq_zero(q, g, n));
}

int32_t qm_reference_mpq_linear_group(void *context, const qm_mpq_linear_group_args *group) {
  int32_t status = QM_OK;
  for (int32_t i = 0; i < group->count && status == QM_OK; i++) {
    const qm_mpq_linear_args args = qm_mpq_linear_of(group, i);
    status = qm_reference_mpq_linear(context, &args);
  }
  return status;
}

int32_t qm_reference_mpq_linear(void *context, const qm_mpq_linear_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  const qm_array *x = &args->x, *out = &args->out;
  const int64_t inputs = args->transposed ? q->n : q->k, outputs = args->transposed ? q->k : q->n;
  for (int64_t m = 0; m < args->rows; m++) {
    for (int64_t j = 0; j < outputs; j++) {
      double sum = 0.0;
      for (int64_t i = 0; i < inputs; i++) {
        const int64_t p = args->transposed ? j : i, n = args->transposed ? i : j;
        const int64_t from = args->transposed ? n : qm_mpq_feature(q, p);
        sum += (double)qm_load(x->data, x->dtype, m * inputs + from) * weight(q, p, n);
      }
      const int64_t to = args->transposed ? qm_mpq_feature(q, j) : j;
      qm_store(out->data, out->dtype, m * outputs + to, (float)sum);
    }
  }
  return QM_OK;
}
