/* dtype.h - the 16-bit float types in plain C: conversions that round half to even. */
#ifndef QM_DTYPE_H
#define QM_DTYPE_H

#include <stdint.h>
#include <string.h>

#include "inline.h"
#include "quartermoon.h"

QM_INLINE uint32_t qm_float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
QM_INLINE float qm_bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

QM_INLINE float qm_from_bf16(uint16_t x) { return qm_bits_float((uint32_t)x << 16); }
/* Branch-free, so that loops over it vectorize. */
QM_INLINE uint16_t qm_to_bf16(float x) {
  const uint32_t bits = qm_float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}
/* Stochastic: up with probability equal to the fraction; `random` supplies the low 16 bits. */
QM_INLINE uint16_t qm_to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t bits = qm_float_bits(x);
  const uint32_t rounded = (bits + (random & 0xFFFFu)) >> 16;
  return (uint16_t)((bits & 0x7F800000u) == 0x7F800000u ? qm_to_bf16(x) : rounded);
}

QM_INLINE float qm_from_f16(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, rest = x & 0x7FFFu;
  /* Move exponent and fraction into place; multiplying rebiases, subnormals exactly. */
  const float finite = qm_bits_float(rest << 13) * 0x1p112f;
  const uint32_t special = 0x7F800000u | ((rest & 0x3FFu) << 13);
  return qm_bits_float(sign | (rest >= 0x7C00u ? special : qm_float_bits(finite)));
}
/* Branch-free, so that loops over it vectorize. */
QM_INLINE uint16_t qm_to_f16(float x) {
  const uint32_t bits = qm_float_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7FFFFFFFu;
  /* Below 2^-14 let the adder round to a multiple of 2^-24. */
  const uint32_t subnormal = qm_float_bits(qm_bits_float(rest) + 0.5f) - 0x3F000000u;
  /* May carry into infinity, rightly. */
  const uint32_t normal = (rest + 0xFFFu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t finite = rest < 0x38800000u ? subnormal : normal;
  const uint32_t special = rest > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return (uint16_t)(sign | (rest >= 0x47800000u ? special : finite)); /* 2^16 and up */
}

/* Bytes of one element of any type. */
QM_INLINE int64_t qm_element_size(int32_t dtype) {
  const int8_t sizes[QM_DTYPE_COUNT] = {4, 2, 2, 1, 1, 2, 4, 8};
  return sizes[dtype];
}
/* One element of any float type as f32, and back. For reference kernels and slow paths. */
QM_INLINE float qm_load(const void *data, int32_t dtype, int64_t i) {
  if (dtype == QM_F32) return ((const float *)data)[i];
  const uint16_t half = ((const uint16_t *)data)[i];
  return dtype == QM_BF16 ? qm_from_bf16(half) : qm_from_f16(half);
}
QM_INLINE void qm_store(void *data, int32_t dtype, int64_t i, float x) {
  if (dtype == QM_F32)
    ((float *)data)[i] = x;
  else
    ((uint16_t *)data)[i] = dtype == QM_BF16 ? qm_to_bf16(x) : qm_to_f16(x);
}
/* x rounded to a float type: fl_T(x). */
QM_INLINE float qm_round_to(int32_t dtype, float x) {
  if (dtype == QM_F32) return x;
  return dtype == QM_BF16 ? qm_from_bf16(qm_to_bf16(x)) : qm_from_f16(qm_to_f16(x));
}

#endif
