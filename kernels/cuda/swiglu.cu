/* swiglu.cu - silu(gate) * up and its gradients. Arithmetic of kernels/reference/swiglu.c. */
#include "device.cuh"

enum { THREADS = 256, WIDTH = 8 }; /* WIDTH elements to a thread and round */

static __device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T>
static __global__ void swiglu(const T *gate, const T *up, T *out, int64_t count) {
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) {
    const float g = qm_float(gate[i]);
    out[i] = qm_as<T>(g * sigmoid(g) * qm_float(up[i]));
  }
}

template <typename T>
static __global__ void swiglu_backward(const T *dout, const T *gate, const T *up, T *dgate, T *dup,
                                       int64_t count) {
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) {
    const float d = qm_float(dout[i]), g = qm_float(gate[i]), s = sigmoid(g);
    const float u = qm_float(up[i]);
    dup[i] = qm_as<T>(d * (g * s));
    dgate[i] = qm_as<T>(d * u * (s * (1.0f + g * (1.0f - s))));
  }
}

int32_t qm_cuda_swiglu(void *context, const qm_swiglu_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t count = args->out.count;
  return qm_with_float(args->out.dtype, [&](auto element) {
    using T = decltype(element);
    swiglu<T><<<qm_blocks(cuda, count, THREADS), THREADS, 0, cuda->compute>>>(
        (const T *)args->gate.data, (const T *)args->up.data, (T *)args->out.data, count);
    return qm_cuda_launched(cuda, "swiglu");
  });
}

int32_t qm_cuda_swiglu_backward(void *context, const qm_swiglu_backward_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t count = args->dout.count;
  return qm_with_float(args->dout.dtype, [&](auto element) {
    using T = decltype(element);
    swiglu_backward<T><<<qm_blocks(cuda, count, THREADS), THREADS, 0, cuda->compute>>>(
        (const T *)args->dout.data, (const T *)args->gate.data, (const T *)args->up.data,
        (T *)args->dgate.data, (T *)args->dup.data, count);
    return qm_cuda_launched(cuda, "swiglu_backward");
  });
}
