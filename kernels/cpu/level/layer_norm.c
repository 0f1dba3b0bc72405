/* layer_norm.c - layer normalisation and its gradient, a row at a time in blocks.
** Reference: kernels/reference/layer_norm.c, within f32 rounding of the sums. Memory bound.
** The gradients of weight and bias are summed per chunk of rows, then over the chunks in order; how
** many rows a chunk has depends on the shape alone, so the bits do not depend on the thread count.
*/
#include <stdlib.h>

#include "vector.h"

enum { CHUNKS_MAX = 64, CHUNK_ROWS_MIN = 32 };

/* Sum of one row of x, or of x + residual, which is written (and rounded) on the way. */
static double row_total(const qm_layer_norm_args *args, int64_t row) {
  float xs[QM_BLOCK], residuals[QM_BLOCK];
  double total = 0.0;
  for (int64_t c = 0; c < args->columns; c += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, args->columns - c);
    qm_expand(xs, args->x.data, args->x.dtype, row + c, n);
    if (args->sum.data != NULL) {
      qm_expand(residuals, args->residual.data, args->x.dtype, row + c, n);
      for (int64_t j = 0; j < n; j++) xs[j] += residuals[j];
      qm_narrow(xs, args->sum.data, args->x.dtype, row + c, n);
      if (args->x.dtype != QM_F32) qm_expand(xs, args->sum.data, args->x.dtype, row + c, n);
    }
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += xs[j];
    total += (double)sum;
  }
  return total;
}

/* Sum of squares of one row's distances from the mean. */
static double row_squares(const qm_array *x, int64_t row, int64_t columns, float mean) {
  float block[QM_BLOCK];
  double total = 0.0;
  for (int64_t c = 0; c < columns; c += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, columns - c);
    const float *xs = qm_floats(x, row + c, n, block);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < n; j++) squares += (xs[j] - mean) * (xs[j] - mean);
    total += (double)squares;
  }
  return total;
}

int32_t QM_CPU(layer_norm)(void *context, const qm_layer_norm_args *args) {
  (void)context;
  const qm_array *sum = args->sum.data != NULL ? &args->sum : &args->x;
#pragma omp parallel for schedule(static) if (args->x.count > QM_PARALLEL_MIN)
  for (int64_t r = 0; r < args->rows; r++) {
    float x_block[QM_BLOCK], weight_block[QM_BLOCK], bias_block[QM_BLOCK], out[QM_BLOCK];
    const int64_t row = r * args->columns;
    const float mean = (float)(row_total(args, row) / (double)args->columns);
    const double variance = row_squares(sum, row, args->columns, mean) / (double)args->columns;
    const float rstd = (float)(1.0 / sqrt(variance + args->eps));
    ((float *)args->mean.data)[r] = mean;
    ((float *)args->rstd.data)[r] = rstd;
    for (int64_t c = 0; c < args->columns; c += QM_BLOCK) {
      const int64_t n = QM_MIN(QM_BLOCK, args->columns - c);
      const float *x = qm_floats(sum, row + c, n, x_block);
      const float *weight = qm_floats(&args->weight, c, n, weight_block);
      for (int64_t j = 0; j < n; j++) out[j] = (x[j] - mean) * rstd * weight[j];
      if (args->bias.data != NULL) {
        const float *bias = qm_floats(&args->bias, c, n, bias_block);
        for (int64_t j = 0; j < n; j++) out[j] += bias[j];
      }
      qm_narrow(out, args->out.data, args->out.dtype, row + c, n);
    }
  }
  return QM_OK;
}

/* The means over one row of g = dout weight and of g y. */
static void row_means(const qm_layer_norm_backward_args *args, int64_t row, float mean, float rstd,
                      float *mean_g, float *mean_gy) {
  float dout_block[QM_BLOCK], x_block[QM_BLOCK], weight_block[QM_BLOCK];
  double total_g = 0.0, total_gy = 0.0;
  for (int64_t c = 0; c < args->columns; c += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, args->columns - c);
    const float *dout = qm_floats(&args->dout, row + c, n, dout_block);
    const float *x = qm_floats(&args->sum, row + c, n, x_block);
    const float *weight = qm_floats(&args->weight, c, n, weight_block);
    float sum_g = 0.0f, sum_gy = 0.0f;
#pragma omp simd reduction(+ : sum_g, sum_gy)
    for (int64_t j = 0; j < n; j++) {
      sum_g += dout[j] * weight[j];
      sum_gy += dout[j] * weight[j] * (x[j] - mean);
    }
    total_g += (double)sum_g;
    total_gy += (double)sum_gy;
  }
  *mean_g = (float)(total_g / (double)args->columns);
  *mean_gy = (float)(total_gy * (double)rstd / (double)args->columns);
}

/* dx of one row; adds its part of the gradients of weight and bias to sums [2, columns], where that
** is not NULL. */
static void row_backward(const qm_layer_norm_backward_args *args, int64_t r, float *restrict sums) {
  float dout_block[QM_BLOCK], x_block[QM_BLOCK], weight_block[QM_BLOCK], dsum_block[QM_BLOCK];
  float y[QM_BLOCK], dx[QM_BLOCK], mean_g, mean_gy;
  const int64_t row = r * args->columns;
  const float mean = ((const float *)args->mean.data)[r];
  const float rstd = ((const float *)args->rstd.data)[r];
  row_means(args, row, mean, rstd, &mean_g, &mean_gy);
  for (int64_t c = 0; c < args->columns; c += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, args->columns - c);
    const float *dout = qm_floats(&args->dout, row + c, n, dout_block);
    const float *x = qm_floats(&args->sum, row + c, n, x_block);
    const float *weight = qm_floats(&args->weight, c, n, weight_block);
    for (int64_t j = 0; j < n; j++) y[j] = (x[j] - mean) * rstd;
    for (int64_t j = 0; j < n; j++) dx[j] = rstd * (dout[j] * weight[j] - mean_g - y[j] * mean_gy);
    if (args->dsum.data != NULL) {
      const float *dsum = qm_floats(&args->dsum, row + c, n, dsum_block);
      for (int64_t j = 0; j < n; j++) dx[j] += dsum[j];
    }
    qm_narrow(dx, args->dx.data, args->dx.dtype, row + c, n);
    if (sums == NULL) continue;
    float *restrict dweight = sums + c, *restrict dbias = sums + args->columns + c;
    for (int64_t j = 0; j < n; j++) dweight[j] = QM_FMA(dout[j], y[j], dweight[j]);
    for (int64_t j = 0; j < n; j++) dbias[j] += dout[j];
  }
}

int32_t QM_CPU(layer_norm_backward)(void *context, const qm_layer_norm_backward_args *args) {
  (void)context;
  const int64_t rows = args->rows, columns = args->columns;
  const int64_t share = (rows + CHUNKS_MAX - 1) / CHUNKS_MAX;
  const int64_t chunk_rows = share < CHUNK_ROWS_MIN ? CHUNK_ROWS_MIN : share;
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const int32_t wanted = args->dweight.data != NULL || args->dbias.data != NULL;
  float *partial = NULL;
  if (wanted && chunks > 0 && columns > 0) {
    partial = calloc((size_t)(chunks * 2 * columns), sizeof *partial);
    if (partial == NULL)
      return qm_reference_host->fail(QM_E_MEMORY, "layer_norm_backward: the host is out of memory");
  }
#pragma omp parallel for schedule(static) if (args->sum.count > QM_PARALLEL_MIN)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const int64_t end = QM_MIN((chunk + 1) * chunk_rows, rows);
    for (int64_t r = chunk * chunk_rows; r < end; r++)
      row_backward(args, r, partial == NULL ? NULL : partial + chunk * 2 * columns);
  }
  if (partial == NULL) return QM_OK;
  float *restrict outs[2] = {args->dweight.data, args->dbias.data};
  for (int64_t chunk = 1; chunk < chunks; chunk++)
    for (int64_t c = 0; c < 2 * columns; c++) partial[c] += partial[chunk * 2 * columns + c];
  for (int32_t which = 0; which < 2; which++)
    for (int64_t c = 0; c < columns && outs[which] != NULL; c++)
      outs[which][c] += partial[which * columns + c];
  free(partial);
  return QM_OK;
}
