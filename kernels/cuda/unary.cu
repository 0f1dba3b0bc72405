/* unary.cu - one operation on each element, in f32. Reference: kernels/reference/elementwise.c
** (which has GELU and SiLU's derivative in f64). */
#include "pack.cuh"
#include "sigmoid.cuh"

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <int OP>
struct operation {
  float p0, p1;
  __device__ __forceinline__ float operator()(float x) const {
    switch (OP) {
      case QM_NEG: return -x;
      case QM_ABS: return fabsf(x);
      case QM_EXP: return expf(x);
      case QM_LOG: return logf(x);
      case QM_SQRT: return sqrtf(x);
      case QM_RSQRT: return 1.0f / sqrtf(x);
      case QM_TANH: return tanhf(x);
      case QM_SIGMOID: return sigmoid(x);
      case QM_SILU: return x / (1.0f + expf(-x));
      case QM_GELU: return p0 != 0.0f ? qm_gelu_tanh(x) : qm_gelu(x);
      case QM_RELU: return x < 0.0f ? 0.0f : x;
      case QM_SQUARE: return x * x;
      case QM_POW: return powf(x, p0);
      case QM_CLAMP: return x < p0 ? p0 : x > p1 ? p1 : x;
      case QM_AFFINE: return p0 * x + p1;
      case QM_SIGN: return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x;
      case QM_FLOOR: return floorf(x);
      case QM_ROUND: return rintf(x);
      case QM_SIN: return sinf(x);
      case QM_COS: return cosf(x);
      case QM_RECIPROCAL: return 1.0f / x;
      case QM_GELU_GRAD: return p0 != 0.0f ? qm_gelu_tanh_grad(x) : qm_gelu_grad(x);
      default: {
        const float s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
      }
    }
  }
};

template <int OP>
static int32_t launch(qm_cuda *cuda, const qm_unary_args *args) {
  if (args->op != OP) {
    if constexpr (OP + 1 < QM_UNARY_COUNT) return launch<OP + 1>(cuda, args);
    return QM_E_UNSUPPORTED;
  }
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    return qm_map<T, T>(cuda, "unary", args->x.data, args->out.data, args->out.count,
                        operation<OP>{(float)args->p0, (float)args->p1});
  });
}

int32_t qm_cuda_unary(void *context, const qm_unary_args *args) {
  QM_CUDA_ENTER(context);
  return launch<0>(cuda, args);
}
