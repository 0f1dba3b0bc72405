/* rms_norm.c - root mean square normalisation and its gradient.
** Source: Zhang and Sennrich, arXiv 1910.07467. With a residual, the sum that the next residual
** connection needs is formed on the way. */
#include "reference.h"

int32_t qm_reference_rms_norm(void *context, const qm_rms_norm_args *args) {
  (void)context;
  const int32_t dtype = args->x.dtype;
  const void *sum = args->sum.data != NULL ? args->sum.data : args->x.data;
  for (int64_t r = 0; r < args->rows; r++) {
    const int64_t row = r * args->columns;
    double squares = 0.0;
    for (int64_t c = 0; c < args->columns; c++) {
      if (args->sum.data != NULL)
        qm_store(
            args->sum.data, dtype, row + c,
            qm_load(args->x.data, dtype, row + c) + qm_load(args->residual.data, dtype, row + c));
      const double x = (double)qm_load(sum, dtype, row + c);
      squares += x * x;
    }
    const double mean = squares / (double)args->columns;
    const float rstd = (float)(1.0 / sqrt(mean + args->eps));
    ((float *)args->rstd.data)[r] = rstd;
    for (int64_t c = 0; c < args->columns; c++)
      qm_store(
          args->out.data, dtype, row + c,
          qm_load(sum, dtype, row + c) * rstd * qm_load(args->weight.data, args->weight.dtype, c));
  }
  return QM_OK;
}

/* y = x rstd, g = dout weight: dx = rstd (g - y mean(g y)) + dsum, dweight += dout y over rows. */
int32_t qm_reference_rms_norm_backward(void *context, const qm_rms_norm_backward_args *args) {
  (void)context;
  const int32_t dtype = args->sum.dtype, weight_dtype = args->weight.dtype;
  const float *rstd = args->rstd.data;
  for (int64_t r = 0; r < args->rows; r++) {
    const int64_t row = r * args->columns;
    double dot = 0.0;
    for (int64_t c = 0; c < args->columns; c++)
      dot += (double)qm_load(args->dout.data, dtype, row + c) *
             (double)qm_load(args->weight.data, weight_dtype, c) *
             (double)(qm_load(args->sum.data, dtype, row + c) * rstd[r]);
    const double mean = dot / (double)args->columns;
    for (int64_t c = 0; c < args->columns; c++) {
      const double y = (double)(qm_load(args->sum.data, dtype, row + c) * rstd[r]);
      const double g = (double)qm_load(args->dout.data, dtype, row + c) *
                       (double)qm_load(args->weight.data, weight_dtype, c);
      double dx = (double)rstd[r] * (g - y * mean);
      if (args->dsum.data != NULL) dx += (double)qm_load(args->dsum.data, dtype, row + c);
      qm_store(args->dx.data, dtype, row + c, (float)dx);
    }
  }
  if (args->dweight.data == NULL) return QM_OK;
  for (int64_t c = 0; c < args->columns; c++) {
    double sum = 0.0;
    for (int64_t r = 0; r < args->rows; r++)
      sum += (double)qm_load(args->dout.data, dtype, r * args->columns + c) *
             (double)(qm_load(args->sum.data, dtype, r * args->columns + c) * rstd[r]);
    ((float *)args->dweight.data)[c] += (float)sum;
  }
  return QM_OK;
}
