/* cuda_fp16.h - NVIDIA's f16 type and conversions, by those of kernels/dtype.h. */
#ifndef QM_EMULATED_CUDA_FP16_H
#define QM_EMULATED_CUDA_FP16_H

#include "cuda_runtime.h"
#include "dtype.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
static inline float __half2float(__half x) { return qm_from_f16(x.bits); }
static inline __half __float2half_rn(float x) { return {qm_to_f16(x)}; }
static inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
static inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
static inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
static inline __half2 __hadd2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) + __half2float(b.x),
                           __half2float(a.y) + __half2float(b.y));
}
static inline __half __hfma(__half a, __half b, __half c) {
  const double sum = (double)__half2float(a) * __half2float(b) + __half2float(c);
  return __float2half_rn(emulate::round_to_odd(sum));
}
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

#endif
