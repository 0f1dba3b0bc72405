/* cuda_bf16.h - NVIDIA's bf16 type and conversions, by those of kernels/dtype.h. */
#ifndef QM_EMULATED_CUDA_BF16_H
#define QM_EMULATED_CUDA_BF16_H

#include "cuda_runtime.h"
#include "dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
static inline float __bfloat162float(__nv_bfloat16 x) { return qm_from_bf16(x.bits); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {qm_to_bf16(x)}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
static inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(__bfloat162float(a.x) + __bfloat162float(b.x),
                               __bfloat162float(a.y) + __bfloat162float(b.y));
}
/* The product of two is exact in a float; their sum with the third may round twice, so in double:
** 16 bits of product and 8 of c may lie further apart than 53 bits only where c is lost anyway. */
static inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  const double sum = (double)__bfloat162float(a) * __bfloat162float(b) + __bfloat162float(c);
  return __float2bfloat16_rn(emulate::round_to_odd(sum));
}
static inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

#endif
