/* copy.cu - copies that convert. Reference: kernels/reference/copy.c, equal bit for bit. */
#include "integer.h"
#include "pack.cuh"

enum { THREADS = 256 };

static __global__ void convert_each(const void *x, int32_t from, void *out, int32_t to,
                                    int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < count) qm_convert(x, from, out, to, i);
}

struct same {
  __device__ float operator()(float x) const { return x; }
};

int32_t qm_cuda_copy(void *context, const qm_copy_args *args) {
  QM_CUDA_ENTER(context);
  const qm_array *x = &args->x, *out = &args->out;
  const int64_t count = out->count;
  if (count == 0) return QM_OK;
  if (x->dtype == out->dtype)
    return qm_cuda_check(
        cudaMemcpyAsync(out->data, x->data, (size_t)(count * qm_element_size(x->dtype)),
                        cudaMemcpyDeviceToDevice, cuda->compute),
        "copy");
  if (qm_is_float(x->dtype) && qm_is_float(out->dtype))
    return qm_with_float(x->dtype, [&](auto from) {
      return qm_with_float(out->dtype, [&](auto to) {
        return qm_map<decltype(from), decltype(to)>(cuda, "copy", x->data, out->data, count,
                                                    same{});
      });
    });
  convert_each<<<(unsigned)qm_ceil_div(count, THREADS), THREADS, 0, cuda->compute>>>(
      x->data, x->dtype, out->data, out->dtype, count);
  return qm_cuda_launched(cuda, "copy");
}
