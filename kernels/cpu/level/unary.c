/* unary.c - one operand. Reference: elementwise.c there, within 4 ulp and, for tanh, GELU and the
** derivatives, within 1e-6 of a value near 1. Near memory bound; pow, sin and cos are libm's. */
#include "unary.h"

/* Natural logarithm to 2 ulp: x = 2^e m, m in [sqrt(1/2), sqrt(2)), ln m by a polynomial in m - 1
** (Cephes' logf). Subnormals are scaled up first. */
static inline float log_of(float x) {
  const int tiny = x < 0x1p-126f;
  const uint32_t bits = qm_float_bits(tiny ? x * 0x1p25f : x) - 0x3F3504F3u;
  const float e = (float)((int32_t)bits >> 23) - (tiny ? 25.0f : 0.0f);
  const float m = qm_bits_float((bits & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f, square = m * m;
  float p = 7.0376836292e-2f;
  p = QM_FMA(p, m, -1.1514610310e-1f);
  p = QM_FMA(p, m, 1.1676998740e-1f);
  p = QM_FMA(p, m, -1.2420140846e-1f);
  p = QM_FMA(p, m, 1.4249322787e-1f);
  p = QM_FMA(p, m, -1.6668057665e-1f);
  p = QM_FMA(p, m, 2.0000714765e-1f);
  p = QM_FMA(p, m, -2.4999993993e-1f);
  p = QM_FMA(p, m, 3.3333331174e-1f);
  p = p * m * square;
  p = QM_FMA(e, -2.12194440e-4f, p);
  p = QM_FMA(-0.5f, square, p) + m;
  p = QM_FMA(e, 0.693359375f, p);
  const float infinite = x > 0.0f ? __builtin_inff() : -__builtin_inff();
  const float finite = ((x == 0.0f) | (x > 3.4028235e38f)) ? infinite : p;
  return x >= 0.0f ? finite : __builtin_nanf("");
}

static void power(const float *in, float *out, int64_t n, float exponent) {
  if (exponent == 2.0f)
    EACH(x * x);
  else if (exponent == 3.0f)
    EACH(x * x * x);
  else
    EACH_SLOWLY(powf(x, exponent))
}

static void apply(int32_t op, const float *in, float *out, int64_t n, float p0, float p1) {
  switch (op) {
    case QM_NEG: EACH(-x); break;
    case QM_ABS: EACH(__builtin_fabsf(x)); break;
    case QM_EXP: EACH(qm_expf(x)); break;
    case QM_LOG: EACH(log_of(x)); break;
    case QM_SQRT: EACH(__builtin_sqrtf(x)); break;
    case QM_RSQRT: EACH(1.0f / __builtin_sqrtf(x)); break;
    case QM_TANH: EACH(tanh_of(x)); break;
    case QM_SIGMOID: EACH(sigmoid_of(x)); break;
    case QM_SILU: EACH(x / (1.0f + qm_expf(-x))); break;
    case QM_GELU:
      if (p0 != 0.0f)
        EACH(gelu_tanh_of(x));
      else
        EACH(gelu_of(x));
      break;
    case QM_RELU: EACH(x < 0.0f ? 0.0f : x); break;
    case QM_SQUARE: EACH(x * x); break;
    case QM_POW: power(in, out, n, p0); break;
    case QM_CLAMP: EACH(x < p0 ? p0 : x > p1 ? p1 : x); break;
    case QM_AFFINE: EACH(p0 * x + p1); break;
    case QM_SIGN: EACH(x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x); break;
    case QM_FLOOR: EACH(__builtin_floorf(x)); break;
    case QM_ROUND: EACH(__builtin_rintf(x)); break;
    case QM_SIN: EACH_SLOWLY(sinf(x)) break;
    case QM_COS: EACH_SLOWLY(cosf(x)) break;
    case QM_RECIPROCAL: EACH(1.0f / x); break;
    case QM_GELU_GRAD:
      if (p0 != 0.0f)
        EACH(gelu_tanh_grad_of(x));
      else
        EACH(gelu_grad_of(x));
      break;
    default: EACH(silu_grad_of(x));
  }
}

int32_t QM_CPU(unary)(void *context, const qm_unary_args *args) {
  (void)context;
  const int64_t count = args->out.count;
#pragma omp parallel for schedule(static) if (count >= QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float block[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    float *out = qm_target(&args->out, i, block);
    apply(args->op, qm_floats(&args->x, i, n, block), out, n, (float)args->p0, (float)args->p1);
    qm_stored(&args->out, i, n, out);
  }
  return QM_OK;
}
