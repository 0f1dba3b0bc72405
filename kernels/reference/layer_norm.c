/* layer_norm.c - layer normalisation and its gradient.
** Source: Ba, Kiros and Hinton, arXiv 1607.06450. With a residual, the sum that the next residual
** connection needs is formed on the way. */
#include "reference.h"

/* Element i of x, or of x + residual, which is then written (and rounded) as well. */
static double summed(const qm_layer_norm_args *args, int64_t i) {
  const int32_t dtype = args->x.dtype;
  const float x = qm_load(args->x.data, dtype, i);
  if (args->sum.data == NULL) return (double)x;
  qm_store(args->sum.data, dtype, i, x + qm_load(args->residual.data, dtype, i));
  return (double)qm_load(args->sum.data, dtype, i);
}

int32_t qm_reference_layer_norm(void *context, const qm_layer_norm_args *args) {
  (void)context;
  const int32_t dtype = args->x.dtype, weight_dtype = args->weight.dtype;
  const void *sum = args->sum.data != NULL ? args->sum.data : args->x.data;
  for (int64_t r = 0; r < args->rows; r++) {
    const int64_t row = r * args->columns;
    double total = 0.0, squares = 0.0;
    for (int64_t c = 0; c < args->columns; c++) total += summed(args, row + c);
    const double mean = total / (double)args->columns;
    for (int64_t c = 0; c < args->columns; c++) {
      const double x = (double)qm_load(sum, dtype, row + c) - mean;
      squares += x * x;
    }
    const double rstd = 1.0 / sqrt(squares / (double)args->columns + args->eps);
    ((float *)args->mean.data)[r] = (float)mean;
    ((float *)args->rstd.data)[r] = (float)rstd;
    for (int64_t c = 0; c < args->columns; c++) {
      const double y = ((double)qm_load(sum, dtype, row + c) - mean) * rstd;
      const double weight = (double)qm_load(args->weight.data, weight_dtype, c);
      const double bias =
          args->bias.data == NULL ? 0.0 : (double)qm_load(args->bias.data, weight_dtype, c);
      qm_store(args->out.data, dtype, row + c, (float)(y * weight + bias));
    }
  }
  return QM_OK;
}

/* y: element i of the normalised row r. */
static double normalised(const qm_layer_norm_backward_args *args, int64_t r, int64_t i) {
  const double mean = (double)((const float *)args->mean.data)[r];
  const double rstd = (double)((const float *)args->rstd.data)[r];
  return ((double)qm_load(args->sum.data, args->sum.dtype, i) - mean) * rstd;
}

/* g = dout weight: dx = rstd (g - mean(g) - y mean(g y)) + dsum; dweight += dout y and
** dbias += dout, over the rows. */
int32_t qm_reference_layer_norm_backward(void *context, const qm_layer_norm_backward_args *args) {
  (void)context;
  const int32_t dtype = args->sum.dtype, weight_dtype = args->weight.dtype;
  for (int64_t r = 0; r < args->rows; r++) {
    const int64_t row = r * args->columns;
    double mean_g = 0.0, mean_gy = 0.0;
    for (int64_t c = 0; c < args->columns; c++) {
      const double g = (double)qm_load(args->dout.data, dtype, row + c) *
                       (double)qm_load(args->weight.data, weight_dtype, c);
      mean_g += g / (double)args->columns;
      mean_gy += g * normalised(args, r, row + c) / (double)args->columns;
    }
    for (int64_t c = 0; c < args->columns; c++) {
      const double g = (double)qm_load(args->dout.data, dtype, row + c) *
                       (double)qm_load(args->weight.data, weight_dtype, c);
      const double y = normalised(args, r, row + c);
      double dx = (double)((const float *)args->rstd.data)[r] * (g - mean_g - y * mean_gy);
      if (args->dsum.data != NULL) dx += (double)qm_load(args->dsum.data, dtype, row + c);
      qm_store(args->dx.data, dtype, row + c, (float)dx);
    }
  }
  for (int64_t c = 0; c < args->columns; c++) {
    double dweight = 0.0, dbias = 0.0;
    for (int64_t r = 0; r < args->rows; r++) {
      const int64_t i = r * args->columns + c;
      const double dout = (double)qm_load(args->dout.data, dtype, i);
      dweight += dout * normalised(args, r, i);
      dbias += dout;
    }
    if (args->dweight.data != NULL) ((float *)args->dweight.data)[c] += (float)dweight;
    if (args->dbias.data != NULL) ((float *)args->dbias.data)[c] += (float)dbias;
  }
  return QM_OK;
}
