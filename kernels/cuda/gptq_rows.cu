/* gptq_rows.cu - rounding rows with their errors made up for.
**
** Reference: kernels/reference/gptq_rows.c, equal bit for bit (IEEE divide, no contraction, each
**            weight's corrections in the order of the rows).
** Launch:    a block owns COLUMNS columns. Every warp rounds the row of the turn, and makes up for
**            its error in every WARPS-th of those behind; a turn ends at one barrier.
** Cost:      rows^2 N / 2 multiplications and subtractions in the first-level cache. Not measured.
*/
#include "device.cuh"

enum { COLUMNS = 32, WARPS = 8 };

static __global__ void __launch_bounds__(COLUMNS *WARPS)
    gptq_rows(const __grid_constant__ qm_gptq_rows_args args, qm_cuda_late *late) {
  const int64_t n = args.columns, rows = args.rows;
  const int64_t j = (int64_t)blockIdx.x * COLUMNS + threadIdx.x;
  const bool here = j < n;
  const int32_t *groups = (const int32_t *)args.groups.data;
  const float *u = (const float *)args.u.data, *scales = (const float *)args.scales.data;
  const float *zeros = (const float *)args.zeros.data;
  float *w = (float *)args.w.data, *errors = (float *)args.errors.data;
  for (int64_t k = 0; k < rows; k++) {
    float value = 0.0f, error = 0.0f;
    if (here) {
      const int64_t grid = groups[k] * n + j;
      value = w[k * n + j];
      if (qm_index_fits(late, QM_CUDA_OP_gptq_rows, groups[k], args.group_count)) {
        const float scale = scales[grid], zero = zeros[grid], y = rintf((value + zero) / scale);
        const float code = y > 0.0f ? fminf(y, args.levels) : 0.0f; /* NaN: 0 */
        const float rounded = code * scale - zero;
        error = (value - rounded) / u[k * rows + k];
        value = rounded;
      }
      for (int64_t i = k + 1 + threadIdx.y; i < rows; i += WARPS) {
        const float part = u[k * rows + i] * error;
        w[i * n + j] -= part;
      }
    }
    __syncthreads(); /* the next row is ready, and all have read this one */
    if (here && threadIdx.y == 0) {
      w[k * n + j] = value;
      errors[k * n + j] = error;
    }
  }
}

int32_t qm_cuda_gptq_rows(void *context, const qm_gptq_rows_args *args) {
  QM_CUDA_ENTER(context);
  if (args->w.count == 0) return QM_OK;
  const unsigned blocks = (unsigned)qm_ceil_div(args->columns, COLUMNS);
  gptq_rows<<<blocks, dim3(COLUMNS, WARPS), 0, cuda->compute>>>(*args, cuda->late_device);
  return qm_cuda_launched(cuda, "gptq_rows");
}
