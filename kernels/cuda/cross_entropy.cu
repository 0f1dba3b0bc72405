/* cross_entropy.cu - loss and gradient of softmax and the negative log-likelihood, a block to a
** row.
** Reference: kernels/reference/cross_entropy.c. A class out of range counts as ignored, and the
** next
** call that waits says so. */
#include "row.cuh"

template <typename T>
static __global__ void __launch_bounds__(QM_ROW_THREADS)
    cross_entropy(const T *logits, const int32_t *targets, float *loss, T *dlogits, int64_t columns,
                  float scale, int32_t ignore_index, qm_cuda_late *late) {
  const int64_t row = blockIdx.x;
  const int32_t target = targets[row];
  const bool counts =
      target != ignore_index && qm_index_fits(late, QM_CUDA_OP_cross_entropy, target, columns);
  const T *x = logits + row * columns;
  T *out = dlogits + row * columns;
  if (!counts) {
    if (threadIdx.x == 0) loss[row] = 0.0f;
    if (dlogits == nullptr) return;
    qm_row_map(x, out, columns, [](float, int64_t) { return 0.0f; });
    return;
  }
  const float chosen = qm_float(x[target]); /* before x, which out may be, is written */
  const qm_row_sum whole = qm_row_reduce(x, columns);
  if (threadIdx.x == 0) loss[row] = logf(whole.sum) + whole.most - chosen;
  if (dlogits == nullptr) return;
  const float inverse = 1.0f / whole.sum;
  qm_row_map(x, out, columns, [&](float v, int64_t i) {
    const float p = qm_row_exp(v, whole.most) * inverse;
    return scale * (i == target ? p - 1.0f : p);
  });
}

int32_t qm_cuda_cross_entropy(void *context, const qm_cross_entropy_args *args) {
  QM_CUDA_ENTER(context);
  if (args->rows == 0) return QM_OK;
  return qm_with_float(args->logits.dtype, [&](auto element) {
    using T = decltype(element);
    cross_entropy<T><<<(unsigned)args->rows, QM_ROW_THREADS, 0, cuda->compute>>>(
        (const T *)args->logits.data, (const int32_t *)args->targets.data, (float *)args->loss.data,
        (T *)args->dlogits.data, args->columns, (float)args->scale, args->ignore_index,
        cuda->late_device);
    return qm_cuda_launched(cuda, "cross_entropy");
  });
}
