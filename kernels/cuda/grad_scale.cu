/* grad_scale.cu - a step's scale and norm, where the gradients are. Arithmetic of
** kernels/reference/grad_scale.c, to the bit. */
#include "adam.h"
#include "device.cuh"

static __global__ void grad_scale(const float *squares, float *norm, float *scale, int64_t *skipped,
                                  double factor, double max_norm) {
  const qm_grad_measure measure = qm_grad_measure_of(*squares, factor, max_norm);
  *norm = measure.norm;
  *scale = measure.scale;
  *skipped += !(measure.norm <= FLT_MAX);
}

int32_t qm_cuda_grad_scale(void *context, const qm_grad_scale_args *args) {
  QM_CUDA_ENTER(context);
  grad_scale<<<1, 1, 0, cuda->compute>>>(
      (const float *)args->squares.data, (float *)args->norm.data, (float *)args->scale.data,
      (int64_t *)args->skipped.data, args->factor, args->max_norm);
  return qm_cuda_launched(cuda, "grad_scale");
}
