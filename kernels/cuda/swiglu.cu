/* swiglu.cu - silu(gate) * up and its gradients. Arithmetic of kernels/reference/swiglu.c, but for
** the fast exponential and division: within a few ulp. Memory bound. */
#include "sigmoid.cuh"

enum { THREADS = 256 };

template <typename T, int WIDTH>
static __global__ void swiglu(const T *gate, const T *up, T *out, int64_t count) {
  using pack = qm_pack<T, WIDTH>;
  const int64_t stride = (int64_t)gridDim.x * THREADS, packs = count / WIDTH;
  const int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  qm_take_turn();
  for (int64_t i = first; i < packs; i += stride) {
    const pack gates = ((const pack *)gate)[i], ups = ((const pack *)up)[i];
    pack outs;
    for (int j = 0; j < WIDTH; j++) {
      const float g = qm_float(gates.at[j]);
      outs.at[j] = qm_as<T>(g * qm_sigmoid(g) * qm_float(ups.at[j]));
    }
    ((pack *)out)[i] = outs;
  }
  const int64_t rest = packs * WIDTH + first;
  if (rest >= count) return;
  const float g = qm_float(gate[rest]);
  out[rest] = qm_as<T>(g * qm_sigmoid(g) * qm_float(up[rest]));
}

/* d = dout, g = gate, u = up. */
static __device__ __forceinline__ float2 gradients(float d, float g, float u) {
  const float s = qm_sigmoid(g);
  return {d * u * (s * fmaf(g, 1.0f - s, 1.0f)), d * (g * s)};
}

template <typename T, int WIDTH>
static __global__ void swiglu_backward(const T *dout, const T *gate, const T *up, T *dgate, T *dup,
                                       int64_t count) {
  using pack = qm_pack<T, WIDTH>;
  const int64_t stride = (int64_t)gridDim.x * THREADS, packs = count / WIDTH;
  const int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  for (int64_t i = first; i < packs; i += stride) {
    const pack douts = ((const pack *)dout)[i];
    const pack gates = ((const pack *)gate)[i], ups = ((const pack *)up)[i];
    pack dgates, dups;
    for (int j = 0; j < WIDTH; j++) {
      const float2 both =
          gradients(qm_float(douts.at[j]), qm_float(gates.at[j]), qm_float(ups.at[j]));
      dgates.at[j] = qm_as<T>(both.x);
      dups.at[j] = qm_as<T>(both.y);
    }
    ((pack *)dgate)[i] = dgates;
    ((pack *)dup)[i] = dups;
  }
  const int64_t rest = packs * WIDTH + first;
  if (rest >= count) return;
  const float2 both = gradients(qm_float(dout[rest]), qm_float(gate[rest]), qm_float(up[rest]));
  dgate[rest] = qm_as<T>(both.x);
  dup[rest] = qm_as<T>(both.y);
}

int32_t qm_cuda_swiglu(void *context, const qm_swiglu_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t count = args->out.count;
  const bool aligned = qm_aligned(args->gate.data, 16) && qm_aligned(args->up.data, 16) &&
                       qm_aligned(args->out.data, 16);
  return qm_with_float(args->out.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int WIDTH = 16 / sizeof(T);
    const unsigned blocks = qm_blocks(cuda, count, THREADS * (aligned ? WIDTH : 1));
    qm_launch_early(cuda, aligned ? swiglu<T, WIDTH> : swiglu<T, 1>, dim3(blocks), dim3(THREADS), 0,
                    (const T *)args->gate.data, (const T *)args->up.data, (T *)args->out.data,
                    count);
    return qm_cuda_launched(cuda, "swiglu");
  });
}

int32_t qm_cuda_swiglu_backward(void *context, const qm_swiglu_backward_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t count = args->dout.count;
  const bool aligned = qm_aligned(args->dout.data, 16) && qm_aligned(args->gate.data, 16) &&
                       qm_aligned(args->up.data, 16) && qm_aligned(args->dgate.data, 16) &&
                       qm_aligned(args->dup.data, 16);
  return qm_with_float(args->dout.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int WIDTH = 16 / sizeof(T);
    const unsigned blocks = qm_blocks(cuda, count, THREADS * (aligned ? WIDTH : 1));
    (aligned ? swiglu_backward<T, WIDTH>
             : swiglu_backward<T, 1>)<<<blocks, THREADS, 0, cuda->compute>>>(
        (const T *)args->dout.data, (const T *)args->gate.data, (const T *)args->up.data,
        (T *)args->dgate.data, (T *)args->dup.data, count);
    return qm_cuda_launched(cuda, "swiglu_backward");
  });
}
