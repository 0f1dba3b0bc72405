/* gptq_rows.c - rounding a block of rows one after the other, each one's error made up for by those
** that follow. Source: GPTQ, arXiv 2210.17323, algorithm 1, for weights that lie [inputs, outputs].
**
**   c = clamp(round((w_k + zeros) / scales), 0, levels), of row k's group
**   e_k = (w_k - (scales c - zeros)) / u_kk
**   w_j = w_j - u_kj e_k for j > k;  w_k = scales c - zeros
*/
#include "reference.h"

int32_t qm_reference_check_groups(const qm_gptq_rows_args *args) {
  const int32_t *groups = args->groups.data;
  for (int64_t k = 0; k < args->rows; k++)
    if (groups[k] < 0 || groups[k] >= args->group_count)
      return qm_reference_host->fail(
          QM_E_ARGUMENT, "argument 'groups': expected groups in [0, G=%lld), got %d for row %lld",
          (long long)args->group_count, groups[k], (long long)k);
  return QM_OK;
}

int32_t qm_reference_gptq_rows(void *context, const qm_gptq_rows_args *args) {
  (void)context;
  const int32_t status = qm_reference_check_groups(args);
  const int64_t n = args->columns;
  const int32_t *groups = args->groups.data;
  const float *u = args->u.data, *scales = args->scales.data, *zeros = args->zeros.data;
  float *w = args->w.data, *errors = args->errors.data;
  for (int64_t k = 0; status == QM_OK && k < args->rows; k++)
    for (int64_t j = 0; j < n; j++) {
      const int64_t grid = groups[k] * n + j;
      const float y = rintf((w[k * n + j] + zeros[grid]) / scales[grid]);
      const float code = y > 0.0f ? fminf(y, args->levels) : 0.0f; /* NaN: 0 */
      const float value = code * scales[grid] - zeros[grid];
      const float error = (w[k * n + j] - value) / u[k * args->rows + k];
      for (int64_t i = k + 1; i < args->rows; i++) {
        const float part = u[k * args->rows + i] * error;
        w[i * n + j] -= part;
      }
      w[k * n + j] = value;
      errors[k * n + j] = error;
    }
  return status;
}
