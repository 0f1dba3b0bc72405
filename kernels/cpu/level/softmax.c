/* softmax.c - along the last dimension. Reference: reduce.c there, within the rounding of exp.
** Three passes over a row: largest, sum of exp, quotients; exp runs twice, for no row is kept. */
#include "vector.h"

static void softmax_row(const qm_softmax_args *args, int64_t first) {
  const int64_t columns = args->columns;
  float block[QM_BLOCK], largest = -INFINITY;
  double total = 0.0;
  for (int64_t i = 0; i < columns; i += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, columns - i);
    const float here = qm_largest(qm_floats(&args->x, first + i, n, block), n);
    largest = here > largest ? here : largest;
  }
  for (int64_t i = 0; i < columns; i += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, columns - i);
    const float *x = qm_floats(&args->x, first + i, n, block);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += qm_expf(x[j] - largest);
    total += (double)sum;
  }
  const float scale = (float)(1.0 / total);
  for (int64_t i = 0; i < columns; i += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, columns - i);
    const float *x = qm_floats(&args->x, first + i, n, block);
    float *out = qm_target(&args->out, first + i, block);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) out[j] = qm_expf(x[j] - largest) * scale;
    qm_stored(&args->out, first + i, n, out);
  }
}

int32_t QM_CPU(softmax)(void *context, const qm_softmax_args *args) {
  (void)context;
#pragma omp parallel for schedule(static) if (args->x.count >= QM_PARALLEL_MIN / 4)
  for (int64_t row = 0; row < args->rows; row++) softmax_row(args, row * args->columns);
  return QM_OK;
}
