/* unary.h - functions of one f32 that loops vectorize: tanh, GELU, and derivatives; within 4 ulp,
** for these within 1e-6 of a value near 1. */
#ifndef QM_CPU_UNARY_H
#define QM_CPU_UNARY_H

#include "vector.h"

/* Away from 0 by exp of -2 |x|, which cannot overflow; near it, where that cancels, by a polynomial
** (Cephes' tanhf). */
static inline float tanh_of(float x) {
  const float size = __builtin_fabsf(x), square = x * x;
  const float e = qm_expf(-2.0f * size), far = (1.0f - e) / (1.0f + e);
  float p = -5.70498872745e-3f;
  p = QM_FMA(p, square, 2.06390887954e-2f);
  p = QM_FMA(p, square, -5.37397155531e-2f);
  p = QM_FMA(p, square, 1.33314422036e-1f);
  p = QM_FMA(p, square, -3.33332819422e-1f);
  const float near = QM_FMA(p * square, x, x);
  return size < 0.625f ? near : __builtin_copysignf(far, x);
}

static inline float sigmoid_of(float x) { return 1.0f / (1.0f + qm_expf(-x)); }

/* Phi(x) and exp(-x^2 / 2): erf to 1.5e-7 (Abramowitz and Stegun 7.1.26). */
static inline float normal_of(float x, float *gauss) {
  const float size = __builtin_fabsf(x) * 0.70710678f, t = 1.0f / QM_FMA(0.3275911f, size, 1.0f);
  float p = 1.061405429f;
  p = QM_FMA(p, t, -1.453152027f);
  p = QM_FMA(p, t, 1.421413741f);
  p = QM_FMA(p, t, -0.284496736f);
  p = QM_FMA(p, t, 0.254829592f);
  *gauss = qm_expf(-0.5f * x * x);
  const float tail = 0.5f * p * t * *gauss;
  return x < 0.0f ? tail : 1.0f - tail;
}

static inline float gelu_of(float x) {
  float gauss;
  return x * normal_of(x, &gauss);
}
static inline float gelu_grad_of(float x) {
  float gauss;
  const float phi = normal_of(x, &gauss);
  return QM_FMA(0.39894228f * x, gauss, phi);
}
static inline float gelu_tanh_of(float x) {
  return 0.5f * x * (1.0f + tanh_of(0.79788456f * QM_FMA(0.044715f * x * x, x, x)));
}
static inline float gelu_tanh_grad_of(float x) {
  const float square = x * x, t = tanh_of(0.79788456f * QM_FMA(0.044715f * square, x, x));
  const float slope = 0.79788456f * QM_FMA(0.134145f, square, 1.0f);
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope;
}
static inline float silu_grad_of(float x) {
  const float sigmoid = sigmoid_of(x);
  return sigmoid * QM_FMA(x, 1.0f - sigmoid, 1.0f);
}

/* Statements over a block: out[j] = the expression, of x = in[j]. */
#define EACH(expression)                                                                           \
  do {                                                                                             \
    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                          \
      const float x = in[j];                                                                       \
      out[j] = (expression);                                                                       \
    }                                                                                              \
  } while (0)
/* For library functions, which have no vector form. */
#define EACH_SLOWLY(expression)                                                                    \
  for (int64_t j = 0; j < n; j++) {                                                                \
    const float x = in[j];                                                                         \
    out[j] = (expression);                                                                         \
  }

#endif
