/* four.cuh - four neighbouring elements of a row as they lie in memory, and how a step's results go
** back there. */
#ifndef QM_FOUR_CUH
#define QM_FOUR_CUH

#include "adam.h"
#include "device.cuh"

template <typename T>
struct qm_four;
template <>
struct alignas(16) qm_four<float> {
  float4 raw;
  __device__ __forceinline__ float at(int j) const { return ((const float *)&raw)[j]; }
  __device__ __forceinline__ void expand(float out[4]) const {
    out[0] = raw.x, out[1] = raw.y, out[2] = raw.z, out[3] = raw.w;
  }
  __device__ __forceinline__ void keep(const float x[4]) {
    raw = make_float4(x[0], x[1], x[2], x[3]);
  }
};
template <>
struct alignas(8) qm_four<__nv_bfloat16> {
  uint2 raw;
  __device__ __forceinline__ float at(int j) const {
    return __uint_as_float((uint32_t)((const uint16_t *)&raw)[j] << 16);
  }
  __device__ __forceinline__ void expand(float out[4]) const {
    out[0] = __uint_as_float(raw.x << 16), out[1] = __uint_as_float(raw.x & 0xFFFF0000u);
    out[2] = __uint_as_float(raw.y << 16), out[3] = __uint_as_float(raw.y & 0xFFFF0000u);
  }
};
template <>
struct alignas(16) qm_four<uint32_t> {
  uint4 raw;
  __device__ __forceinline__ void expand(uint32_t out[4]) const {
    out[0] = raw.x, out[1] = raw.y, out[2] = raw.z, out[3] = raw.w;
  }
};

/* Store quad `quad` of both moments; `random` holds the elements' words. */
__device__ __forceinline__ void qm_store_moments(float *exp_avg, float *exp_avg_sq, uint32_t quad,
                                                 const float m[4], const float v[4],
                                                 const uint32_t random[4]) {
  (void)random;
  __stcs((float4 *)exp_avg + quad, make_float4(m[0], m[1], m[2], m[3]));
  __stcs((float4 *)exp_avg_sq + quad, make_float4(v[0], v[1], v[2], v[3]));
}
/* Adding random half words to the bits rounds; infinity and what is in bf16 already stay what they
** are. */
__device__ __forceinline__ uint32_t qm_round_pair(float a, float b, uint32_t random_a,
                                                  uint32_t random_b) {
  return __byte_perm(__float_as_uint(a) + random_a, __float_as_uint(b) + random_b, 0x7632);
}
__device__ __forceinline__ void qm_store_moments(__nv_bfloat16 *exp_avg, __nv_bfloat16 *exp_avg_sq,
                                                 uint32_t quad, const float m[4], const float v[4],
                                                 const uint32_t random[4]) {
  uint32_t first[4], second[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    first[j] = qm_exp_avg_bits(random[j]);
    second[j] = qm_exp_avg_sq_bits(random[j]);
  }
  __stcs((uint2 *)exp_avg + quad, make_uint2(qm_round_pair(m[0], m[1], first[0], first[1]),
                                             qm_round_pair(m[2], m[3], first[2], first[3])));
  __stcs((uint2 *)exp_avg_sq + quad, make_uint2(qm_round_pair(v[0], v[1], second[0], second[1]),
                                                qm_round_pair(v[2], v[3], second[2], second[3])));
}
__device__ __forceinline__ void qm_store_words(void *words, uint32_t quad, const uint32_t at[4]) {
  __stcs((uint4 *)words + quad, make_uint4(at[0], at[1], at[2], at[3]));
}

#endif
