/* reduce.c - reductions along one dimension, the sum of squares and softmax. Sums run in f64. */
#include "reference.h"

/* Does x take the place of best? NaN does, once. */
static int wins(int32_t op, double x, double best) {
  if (best != best) return 0;
  return x != x || (op == QM_MIN ? x < best : x > best);
}

int32_t qm_reference_reduce(void *context, const qm_reduce_args *args) {
  (void)context;
  const int64_t length = args->length, inner = args->inner;
  for (int64_t i = 0; i < args->outer * inner; i++) {
    const int64_t first = i / inner * length * inner + i % inner;
    double sum = 0.0, best = 0.0;
    int64_t best_at = 0;
    for (int64_t j = 0; j < length; j++) {
      const double x = (double)qm_load(args->x.data, args->x.dtype, first + j * inner);
      sum += x;
      if (j == 0 || wins(args->op, x, best)) {
        best = x;
        best_at = j;
      }
    }
    if (args->op == QM_ARGMAX) {
      ((int32_t *)args->out.data)[i] = (int32_t)best_at;
    } else {
      const double value = args->op == QM_SUM    ? sum
                           : args->op == QM_MEAN ? sum / (double)length
                                                 : best;
      qm_store(args->out.data, args->out.dtype, i, (float)value);
    }
  }
  return QM_OK;
}

int32_t qm_reference_sum_squares(void *context, const qm_sum_squares_args *args) {
  (void)context;
  float *out = args->out.data;
  double sum = 0.0;
  for (int64_t at = 0; at < args->count; at++)
    for (int64_t i = 0; i < args->x[at].count; i++) {
      const double x = (double)qm_load(args->x[at].data, args->x[at].dtype, i);
      sum += x * x;
    }
  *out = (float)(args->accumulate ? sum + (double)*out : sum);
  return QM_OK;
}

int32_t qm_reference_softmax(void *context, const qm_softmax_args *args) {
  (void)context;
  const int32_t dtype = args->x.dtype;
  for (int64_t row = 0; row < args->rows; row++) {
    const int64_t first = row * args->columns, end = first + args->columns;
    float largest = -INFINITY;
    for (int64_t i = first; i < end; i++) largest = fmaxf(largest, qm_load(args->x.data, dtype, i));
    double sum = 0.0;
    for (int64_t i = first; i < end; i++)
      sum += exp((double)(qm_load(args->x.data, dtype, i) - largest));
    for (int64_t i = first; i < end; i++)
      qm_store(args->out.data, dtype, i,
               (float)(exp((double)(qm_load(args->x.data, dtype, i) - largest)) / sum));
  }
  return QM_OK;
}
