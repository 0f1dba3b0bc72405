/* unary_backward.c - a gradient times an operation's derivative. Reference: elementwise.c there,
** within the bounds of unary.h. Near memory bound; pow, sin and cos are libm's. */
#include "unary.h"

static void derivative(int32_t op, const float *in, float *out, int64_t n, float p0, float p1) {
  switch (op) {
    case QM_ABS: EACH(x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x); break;
    case QM_EXP: EACH(qm_expf(x)); break;
    case QM_LOG: EACH(1.0f / x); break;
    case QM_SQRT: EACH(0.5f / __builtin_sqrtf(x)); break;
    case QM_RSQRT: EACH(-0.5f / (x * __builtin_sqrtf(x))); break;
    case QM_TANH: EACH(1.0f - tanh_of(x) * tanh_of(x)); break;
    case QM_SIGMOID: EACH(sigmoid_of(x) * (1.0f - sigmoid_of(x))); break;
    case QM_SILU: EACH(silu_grad_of(x)); break;
    case QM_GELU:
      if (p0 != 0.0f)
        EACH(gelu_tanh_grad_of(x));
      else
        EACH(gelu_grad_of(x));
      break;
    case QM_RELU: EACH(x > 0.0f ? 1.0f : x != x ? x : 0.0f); break;
    case QM_SQUARE: EACH(2.0f * x); break;
    case QM_POW: EACH_SLOWLY(p0 == 0.0f ? 0.0f : p0 * powf(x, p0 - 1.0f)) break;
    case QM_CLAMP: EACH(((x >= p0) & (x <= p1)) ? 1.0f : 0.0f); break;
    case QM_SIN: EACH_SLOWLY(cosf(x)) break;
    case QM_COS: EACH_SLOWLY(-sinf(x)) break;
    case QM_RECIPROCAL: EACH(-1.0f / (x * x)); break;
    default:
      for (int64_t j = 0; j < n; j++) out[j] = op == QM_NEG ? -1.0f : op == QM_AFFINE ? p0 : 0.0f;
  }
}

int32_t QM_CPU(unary_backward)(void *context, const qm_unary_backward_args *args) {
  (void)context;
  const int64_t count = args->x.count;
#pragma omp parallel for schedule(static) if (count >= QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float xs[QM_BLOCK], douts[QM_BLOCK], slopes[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    const float *x = qm_floats(&args->x, i, n, xs), *dout = qm_floats(&args->dout, i, n, douts);
    derivative(args->op, x, slopes, n, (float)args->p0, (float)args->p1);
    for (int64_t j = 0; j < n; j++) slopes[j] *= dout[j];
    qm_narrow(slopes, args->dx.data, args->dx.dtype, i, n);
  }
  return QM_OK;
}
