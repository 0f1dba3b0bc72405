/* mpq_linear_grid.cuh - scales and zero points of four columns, and weights by them. */
#ifndef QM_MPQ_LINEAR_GRID_CUH
#define QM_MPQ_LINEAR_GRID_CUH

#include "mpq_linear.cuh"

namespace mpq_linear {

/* Four scales, or zeros, of adjacent columns as loaded: 16-bit floats. */
__device__ __forceinline__ void widen(float (&out)[4], uint2 raw, int32_t is_bf16) {
  const uint32_t halves[2] = {raw.x, raw.y};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[i] = scale_of(halves[i / 2] >> (16 * (i % 2)), is_bf16);
  }
}
/* Of the grid's elements from `at` on, a multiple of 4. Zero points come as zeros.x, those of `at`
** and of the other four that share its 32 bits. Every register has one load alone: with two, of
** which one happens, the second would wait for the first. */
__device__ __forceinline__ void load_grid(const task &p, int64_t at, uint2 &scales, uint2 &zeros) {
  scales = __ldg((const uint2 *)((const uint16_t *)p.scales + at));
  const uint32_t *const from =
      (const uint32_t *)((const char *)p.zeros + (p.asym ? at / 8 * 4 : at * 2));
  zeros.x = __ldg(from);
  if (!p.asym) zeros.y = __ldg(from + 1);
}
/* Zero point i of the four; odd: whether they are the second four of 32 bits. */
__device__ __forceinline__ uint32_t point_of(uint2 zeros, int odd, int i) {
  return zeros.x >> (16 * odd + 4 * i) & 15u;
}
__device__ __forceinline__ void widen_grid(const task &p, uint2 scales, uint2 zeros, int odd,
                                           float (&scale)[4], float (&zero)[4]) {
  widen(scale, scales, p.bf16_scales);
  widen(zero, zeros, p.bf16_scales);
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (p.asym) zero[i] = (float)(point_of(zeros, odd, i) + (uint32_t)p.zero_offset);
}

/* A grid for the two weights of a register: W = (code - zero) hi + ((code - zero) lo + rest), with
** hi + lo the scale. code - zero is exact, the first product adds what hi lacks of the scale, and
** the last operation rounds: W as dequantized to T, but for a rare last place. Symmetric grids take
** 8 for the zero point, and rest is what is missing, near 0 as a rule. */
struct grid_pair {
  uint32_t minus_zero, hi, lo, rest;
};

template <typename T>
__device__ __forceinline__ grid_pair make_grid(float scale0, float zero0, float scale1, float zero1,
                                               int32_t asym) {
  const float bias = -pair_of<T>::bias;
  grid_pair out;
  out.minus_zero = qm_pair<T>(bias - (asym ? zero0 : 8.0f), bias - (asym ? zero1 : 8.0f));
  out.hi = qm_pair<T>(scale0, scale1);
  const auto hi = as_pair<T>(out.hi);
  out.lo = qm_pair<T>(scale0 - qm_float(hi.x), scale1 - qm_float(hi.y));
  out.rest = asym ? 0u : qm_pair<T>(fmaf(8.0f, scale0, -zero0), fmaf(8.0f, scale1, -zero1));
  return out;
}
/* Both weights of one column; the zero point of an asymmetric grid comes as it is stored. */
template <typename T>
__device__ __forceinline__ grid_pair make_column_grid(const task &p, float scale, uint32_t point,
                                                      float zero) {
  constexpr uint32_t minus_bias = pair_of<T>::magic | 0x80008000u;
  grid_pair out;
  out.minus_zero = minus_bias + (p.asym ? point + (uint32_t)p.zero_offset : 8u) * 0x00010001u;
  out.hi = qm_pair<T>(scale, scale);
  const float lo = scale - qm_float(as_pair<T>(out.hi).x), rest = fmaf(8.0f, scale, -zero);
  out.lo = qm_pair<T>(lo, lo);
  out.rest = p.asym ? 0u : qm_pair<T>(rest, rest);
  return out;
}
template <typename T>
__device__ __forceinline__ uint32_t weights(uint32_t codes, const grid_pair &grid) {
  const auto code = __hadd2(as_pair<T>(biased<T>(codes)), as_pair<T>(grid.minus_zero));
  const auto small = __hfma2(code, as_pair<T>(grid.lo), as_pair<T>(grid.rest));
  return as_bits(__hfma2(code, as_pair<T>(grid.hi), small));
}

} /* namespace mpq_linear */

#endif
