/* fill.cu - one value in every element. */
#include "device.cuh"
#include "dtype.h"

enum { THREADS = 256 };

template <typename T>
static __global__ void fill(T *out, T value, int64_t count) {
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride)
    out[i] = value;
}

template <typename T>
static int32_t launch(qm_cuda *cuda, const qm_array *out, T value) {
  fill<T><<<qm_blocks(cuda, out->count, THREADS), THREADS, 0, cuda->compute>>>((T *)out->data,
                                                                               value, out->count);
  return qm_cuda_launched(cuda, "fill");
}

int32_t qm_cuda_fill(void *context, const qm_fill_args *args) {
  QM_CUDA_ENTER(context);
  const qm_array *out = &args->out;
  const double value = args->value;
  switch (out->dtype) {
    case QM_F32: return launch<float>(cuda, out, (float)value);
    case QM_F16: return launch<uint16_t>(cuda, out, qm_to_f16((float)value));
    case QM_BF16: return launch<uint16_t>(cuda, out, qm_to_bf16((float)value));
    case QM_I8: return launch<int8_t>(cuda, out, (int8_t)value);
    case QM_U8: return launch<uint8_t>(cuda, out, (uint8_t)value);
    case QM_I16: return launch<int16_t>(cuda, out, (int16_t)value);
    case QM_I32: return launch<int32_t>(cuda, out, (int32_t)value);
    default: return launch<int64_t>(cuda, out, (int64_t)value);
  }
}
