/* gptq_rows.c - rounding rows with their errors made up for, a strip of columns at a time, which
** stays in the cache. Reference: kernels/reference/gptq_rows.c, equal bit for bit (no contraction).
**
** Columns do not meet, so strips go to threads. Measured: see scripts/bench.
*/
#include <math.h>

#include "cpu/cpu.h"

enum { STRIP = 64 };

static void round_strip(const qm_gptq_rows_args *args, int64_t first, int64_t count) {
  const int64_t n = args->columns, rows = args->rows;
  const int32_t *groups = args->groups.data;
  const float *u = args->u.data, levels = args->levels;
  float error[STRIP];
  for (int64_t k = 0; k < rows; k++) {
    const float *scales = (const float *)args->scales.data + groups[k] * n + first;
    const float *zeros = (const float *)args->zeros.data + groups[k] * n + first;
    float *w = (float *)args->w.data + k * n + first, *errors = (float *)args->errors.data;
    const float pivot = u[k * rows + k];
    for (int64_t j = 0; j < count; j++) {
      const float y = rintf((w[j] + zeros[j]) / scales[j]);
      const float most = y < levels ? y : levels, code = y > 0.0f ? most : 0.0f;
      const float value = code * scales[j] - zeros[j];
      error[j] = (w[j] - value) / pivot;
      w[j] = value;
      errors[k * n + first + j] = error[j];
    }
    for (int64_t i = k + 1; i < rows; i++) {
      const float factor = u[k * rows + i];
      float *later = (float *)args->w.data + i * n + first;
      for (int64_t j = 0; j < count; j++) {
        const float part = factor * error[j];
        later[j] -= part;
      }
    }
  }
}

int32_t QM_CPU(gptq_rows)(void *context, const qm_gptq_rows_args *args) {
  (void)context;
  const int32_t status = qm_reference_check_groups(args);
  if (status != QM_OK) return status;
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < args->columns; first += STRIP)
    round_strip(args, first, args->columns - first < STRIP ? args->columns - first : STRIP);
  return QM_OK;
}
