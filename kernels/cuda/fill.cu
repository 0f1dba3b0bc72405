/* fill.cu - one value in every element: 16 bytes of it to an access. */
#include "device.cuh"
#include "integer.h"

enum { THREADS = 256 };

/* Bytes from out on, repeating the 16 of `value`; out aligned to 16. */
static __global__ void fill(uint4 *out, uint4 value, int64_t count, int32_t rest_bytes) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < count) out[i] = value;
  if (i == count)
    for (int byte = 0; byte < rest_bytes; byte++)
      ((uint8_t *)(out + count))[byte] = ((const uint8_t *)&value)[byte];
}

static __global__ void fill_each(void *out, int32_t dtype, double value, int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < count) qm_store_number(out, dtype, i, value);
}

int32_t qm_cuda_fill(void *context, const qm_fill_args *args) {
  QM_CUDA_ENTER(context);
  const qm_array *out = &args->out;
  if (out->count == 0) return QM_OK;
  if (qm_aligned(out->data, 16)) {
    uint4 value;
    const int64_t size = qm_element_size(out->dtype), bytes = out->count * size;
    for (int64_t i = 0; i < 16 / size; i++) qm_store_number(&value, out->dtype, i, args->value);
    const int64_t count = bytes / 16;
    fill<<<(unsigned)(count / THREADS + 1), THREADS, 0, cuda->compute>>>(
        (uint4 *)out->data, value, count, (int32_t)(bytes % 16));
  } else {
    fill_each<<<(unsigned)qm_ceil_div(out->count, THREADS), THREADS, 0, cuda->compute>>>(
        out->data, out->dtype, args->value, out->count);
  }
  return qm_cuda_launched(cuda, "fill");
}
