/* sigmoid.cuh - the sigmoid and what is made of it: SwiGLU, GELU (arXiv 1606.08415), their slopes.
** The fast exponential and division err by a few ulp, and cost little enough to run at the speed of
** memory. */
#ifndef QM_SIGMOID_CUH
#define QM_SIGMOID_CUH

#include "device.cuh"

__device__ __forceinline__ float qm_sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

/* 2 sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(u)) / 2 is sigmoid(2 u), which keeps its digits
** where the hyperbolic tangent nears -1. */
__device__ __forceinline__ float qm_gelu_inner(float x) {
  return 1.5957691216f * fmaf(0.044715f * x * x, x, x);
}
__device__ __forceinline__ float qm_gelu_tanh(float x) { return x * qm_sigmoid(qm_gelu_inner(x)); }
/* s + x s (1 - s) inner'(x); s (1 - s) is 0 before inner' overflows. */
__device__ __forceinline__ float qm_gelu_tanh_grad(float x) {
  const float s = qm_sigmoid(qm_gelu_inner(x));
  const float slope = 1.5957691216f * fmaf(3.0f * 0.044715f * x, x, 1.0f);
  return fmaf(x * slope, s * (1.0f - s), s);
}

/* Phi(x): erfc keeps its digits in the left tail. */
__device__ __forceinline__ float qm_normal_cdf(float x) { return 0.5f * erfcf(-0.7071067812f * x); }
__device__ __forceinline__ float qm_gelu(float x) { return x * qm_normal_cdf(x); }
__device__ __forceinline__ float qm_gelu_grad(float x) {
  return fmaf(0.3989422804f * x, __expf(-0.5f * x * x), qm_normal_cdf(x));
}

#endif
