/* unary_backward.cu - a gradient times an operation's derivative, in f32. Reference:
** kernels/reference/elementwise.c. Memory bound but for pow. */
#include "pack.cuh"
#include "sigmoid.cuh"

template <int OP>
struct derivative {
  float p0, p1;
  __device__ __forceinline__ float operator()(float x) const {
    switch (OP) {
      case QM_NEG: return -1.0f;
      case QM_ABS: return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x;
      case QM_EXP: return expf(x);
      case QM_LOG: return 1.0f / x;
      case QM_SQRT: return 0.5f / sqrtf(x);
      case QM_RSQRT: return -0.5f / (x * sqrtf(x));
      case QM_TANH: {
        const float t = tanhf(x);
        return 1.0f - t * t;
      }
      case QM_SIGMOID: return qm_sigmoid(x) * (1.0f - qm_sigmoid(x));
      case QM_SILU: return qm_sigmoid(x) * fmaf(x, 1.0f - qm_sigmoid(x), 1.0f);
      case QM_GELU: return p0 != 0.0f ? qm_gelu_tanh_grad(x) : qm_gelu_grad(x);
      case QM_RELU: return x > 0.0f ? 1.0f : x != x ? x : 0.0f;
      case QM_SQUARE: return 2.0f * x;
      case QM_POW: return p0 == 0.0f ? 0.0f : p0 * powf(x, p0 - 1.0f);
      case QM_CLAMP: return x >= p0 && x <= p1 ? 1.0f : 0.0f;
      case QM_AFFINE: return p0;
      case QM_SIN: return cosf(x);
      case QM_COS: return -sinf(x);
      case QM_RECIPROCAL: return -1.0f / (x * x);
      default: return 0.0f;
    }
  }
};

/* dx may be dout or x: a thread reads what it writes before. */
template <int N, typename T, typename Op>
static __global__ void __launch_bounds__(QM_MAP_THREADS)
    unary_backward(const T *dout, const T *x, T *dx, int64_t count, bool packs, Op op) {
  const int64_t i = ((int64_t)blockIdx.x * QM_MAP_THREADS + threadIdx.x) * N;
  const bool whole = packs && i + N <= count;
  float d[N], v[N];
  qm_read<N>(dout + i, whole, count - i, d);
  qm_read<N>(x + i, whole, count - i, v);
#pragma unroll
  for (int j = 0; j < N; j++) v[j] = d[j] * op(v[j]);
  qm_write<N>(dx + i, whole, count - i, v);
}

template <int OP>
static int32_t launch(qm_cuda *cuda, const qm_unary_backward_args *args) {
  if (args->op != OP) {
    if constexpr (OP + 1 < QM_GELU_GRAD) return launch<OP + 1>(cuda, args);
    return QM_E_UNSUPPORTED;
  }
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = qm_width<T>;
    const T *dout = (const T *)args->dout.data, *x = (const T *)args->x.data;
    T *dx = (T *)args->dx.data;
    const bool packs = qm_packs<N>(dout) && qm_packs<N>(x) && qm_packs<N>(dx);
    const int64_t blocks = qm_ceil_div(args->x.count, (int64_t)N * QM_MAP_THREADS);
    unary_backward<N><<<(unsigned)blocks, QM_MAP_THREADS, 0, cuda->compute>>>(
        dout, x, dx, args->x.count, packs, derivative<OP>{(float)args->p0, (float)args->p1});
    return qm_cuda_launched(cuda, "unary_backward");
  });
}

int32_t qm_cuda_unary_backward(void *context, const qm_unary_backward_args *args) {
  QM_CUDA_ENTER(context);
  return args->x.count == 0 ? QM_OK : launch<0>(cuda, args);
}
