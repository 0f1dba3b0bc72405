/* softmax.cu - softmax of each row, a block to a row. Reference: kernels/reference/reduce.c. */
#include "row.cuh"

template <typename T>
static __global__ void __launch_bounds__(QM_ROW_THREADS)
    softmax(const T *x, T *out, int64_t columns) {
  const int64_t row = (int64_t)blockIdx.x * columns;
  const qm_row_sum whole = qm_row_reduce(x + row, columns);
  const float inverse = 1.0f / whole.sum;
  qm_row_map(x + row, out + row, columns,
             [&](float v, int64_t) { return qm_row_exp(v, whole.most) * inverse; });
}

int32_t qm_cuda_softmax(void *context, const qm_softmax_args *args) {
  QM_CUDA_ENTER(context);
  if (args->rows == 0 || args->columns == 0) return QM_OK;
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    softmax<T><<<(unsigned)args->rows, QM_ROW_THREADS, 0, cuda->compute>>>(
        (const T *)args->x.data, (T *)args->out.data, args->columns);
    return qm_cuda_launched(cuda, "softmax");
  });
}
