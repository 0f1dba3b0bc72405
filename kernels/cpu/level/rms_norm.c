/* rms_norm.c - root mean square normalisation and its gradient, a row at a time in blocks.
** Reference: kernels/reference/rms_norm.c, within f32 rounding of the sums. Memory bound.
** The weight's gradient is summed per chunk of rows, then over the chunks in order; how many rows a
** chunk has depends on the shape alone, so the bits do not depend on the thread count.
*/
#include <stdlib.h>

#include "vector.h"

enum { CHUNKS_MAX = 64, CHUNK_ROWS_MIN = 32 };

/* Sum of squares of one row of x, or of x + residual, which is written (and rounded) on the way. */
static double row_squares(const qm_rms_norm_args *args, int64_t row) {
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
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < n; j++) squares += xs[j] * xs[j];
    total += (double)squares;
  }
  return total;
}

int32_t QM_CPU(rms_norm)(void *context, const qm_rms_norm_args *args) {
  (void)context;
  const qm_array *sum = args->sum.data != NULL ? &args->sum : &args->x;
#pragma omp parallel for schedule(static) if (args->x.count > QM_PARALLEL_MIN)
  for (int64_t r = 0; r < args->rows; r++) {
    float x_block[QM_BLOCK], weight_block[QM_BLOCK], out[QM_BLOCK];
    const int64_t row = r * args->columns;
    const double mean = row_squares(args, row) / (double)args->columns;
    const float rstd = (float)(1.0 / sqrt(mean + args->eps));
    ((float *)args->rstd.data)[r] = rstd;
    for (int64_t c = 0; c < args->columns; c += QM_BLOCK) {
      const int64_t n = QM_MIN(QM_BLOCK, args->columns - c);
      const float *x = qm_floats(sum, row + c, n, x_block);
      const float *weight = qm_floats(&args->weight, c, n, weight_block);
      for (int64_t j = 0; j < n; j++) out[j] = x[j] * rstd * weight[j];
      qm_narrow(out, args->out.data, args->out.dtype, row + c, n);
    }
  }
  return QM_OK;
}

/* The mean over one row of dout weight x rstd. */
static float row_mean(const qm_rms_norm_backward_args *args, int64_t row, float rstd) {
  float dout_block[QM_BLOCK], x_block[QM_BLOCK], weight_block[QM_BLOCK];
  double total = 0.0;
  for (int64_t c = 0; c < args->columns; c += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, args->columns - c);
    const float *dout = qm_floats(&args->dout, row + c, n, dout_block);
    const float *x = qm_floats(&args->sum, row + c, n, x_block);
    const float *weight = qm_floats(&args->weight, c, n, weight_block);
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; j++) dot += dout[j] * weight[j] * x[j];
    total += (double)dot;
  }
  return (float)(total * (double)rstd / (double)args->columns);
}

/* dx of one row; adds its part of the weight's gradient to dweight, where that is not NULL. */
static void row_backward(const qm_rms_norm_backward_args *args, int64_t r,
                         float *restrict dweight) {
  float dout_block[QM_BLOCK], x_block[QM_BLOCK], weight_block[QM_BLOCK], dsum_block[QM_BLOCK];
  float dx[QM_BLOCK];
  const int64_t row = r * args->columns;
  const float rstd = ((const float *)args->rstd.data)[r], mean = row_mean(args, row, rstd);
  for (int64_t c = 0; c < args->columns; c += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, args->columns - c);
    const float *dout = qm_floats(&args->dout, row + c, n, dout_block);
    const float *x = qm_floats(&args->sum, row + c, n, x_block);
    const float *weight = qm_floats(&args->weight, c, n, weight_block);
    for (int64_t j = 0; j < n; j++) dx[j] = rstd * (dout[j] * weight[j] - x[j] * rstd * mean);
    if (args->dsum.data != NULL) {
      const float *dsum = qm_floats(&args->dsum, row + c, n, dsum_block);
      for (int64_t j = 0; j < n; j++) dx[j] += dsum[j];
    }
    qm_narrow(dx, args->dx.data, args->dx.dtype, row + c, n);
    if (dweight != NULL) {
      float *restrict sums = dweight + c;
      for (int64_t j = 0; j < n; j++) sums[j] = QM_FMA(dout[j], x[j] * rstd, sums[j]);
    }
  }
}

int32_t QM_CPU(rms_norm_backward)(void *context, const qm_rms_norm_backward_args *args) {
  (void)context;
  const int64_t rows = args->rows, columns = args->columns;
  const int64_t share = (rows + CHUNKS_MAX - 1) / CHUNKS_MAX;
  const int64_t chunk_rows = share < CHUNK_ROWS_MIN ? CHUNK_ROWS_MIN : share;
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  float *partial = NULL;
  if (args->dweight.data != NULL && chunks > 0 && columns > 0) {
    partial = calloc((size_t)(chunks * columns), sizeof *partial);
    if (partial == NULL)
      return qm_reference_host->fail(QM_E_MEMORY, "rms_norm_backward: the host is out of memory");
  }
#pragma omp parallel for schedule(static) if (args->sum.count > QM_PARALLEL_MIN)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const int64_t end = QM_MIN((chunk + 1) * chunk_rows, rows);
    for (int64_t r = chunk * chunk_rows; r < end; r++)
      row_backward(args, r, partial == NULL ? NULL : partial + chunk * columns);
  }
  if (partial == NULL) return QM_OK;
  float *restrict dweight = args->dweight.data;
  for (int64_t chunk = 1; chunk < chunks; chunk++)
    for (int64_t c = 0; c < columns; c++) partial[c] += partial[chunk * columns + c];
  for (int64_t c = 0; c < columns; c++) dweight[c] += partial[c];
  free(partial);
  return QM_OK;
}
