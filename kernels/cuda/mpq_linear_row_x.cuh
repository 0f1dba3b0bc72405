/* mpq_linear_row_x.cuh - x of mpq_linear_row.cuh in fixed point. */
#ifndef QM_MPQ_LINEAR_ROW_X_CUH
#define QM_MPQ_LINEAR_ROW_X_CUH

#include "mpq_linear_row_stages.cuh"

namespace mpq_linear {

#ifdef QM_HAS_WGMMA_HERE
/* Eight of x in fixed point, and their digits to where operand B reads them. There, of a unit, lie
** for each two steps of 32 features, each digit and each of four rows of words the row's even
** features in either step and its odd ones. The first digit has the sign. sums: of the upper two
** digits and of the last. */
static __device__ __forceinline__ void put_digits(const float (&x)[8], float power, uint32_t *to,
                                                  int32_t (&sums)[2]) {
  uint32_t digits[8]; /* the last one in the lowest byte */
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const uint32_t fixed = __float_as_uint(fmaf(x[j], power, 0x1.8p23f)); /* in 22 bits */
    digits[j] = (fixed & 0x7Fu) | (fixed << 1 & 0x7F00u) | (fixed << 2 & 0xFF0000u);
  }
  int32_t of_digit[3] = {};
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    const uint32_t *const d = digits + odd;
    const uint32_t low[2] = {__byte_perm(d[0], d[2], 0x5140), __byte_perm(d[4], d[6], 0x5140)};
    const uint32_t high[2] = {__byte_perm(d[0], d[2], 0x0062), __byte_perm(d[4], d[6], 0x0062)};
    const uint32_t words[3] = {__byte_perm(high[0], high[1], 0x5410),
                               __byte_perm(low[0], low[1], 0x7632),
                               __byte_perm(low[0], low[1], 0x5410)};
#pragma unroll
    for (int i = 0; i < 3; i++) {
      to[i * 16 + odd * 2] = words[i];
      of_digit[i] = __dp4a((int32_t)words[i], 0x01010101, of_digit[i]);
    }
  }
  sums[0] = 128 * of_digit[0] + of_digit[1];
  sums[1] = of_digit[2];
}

/* The warp's units of x, and their sums, to shared memory, two stages at a time, of which a lane
** takes eight features of one. Not unrolled: it stands between the row's arrival and its product,
** and is read from memory each time. */
template <typename T, int GROUPS, typename L>
static __device__ __forceinline__ void lay_out_row(const row_group &p, int warp, char *units,
                                                   row_sum *sums) {
  constexpr int LANES = 16 / GROUPS, AHEAD = 4;
  const int lane = threadIdx.x % 32, mine = lane % 16, step = mine / 4, t = mine % 4;
  const auto load = [&](int32_t stage) {
    const int32_t unit = stage * L::warps + warp;
    return unit < p.units ? ((const uint4 *)p.x)[unit * 16 + mine] : make_uint4(0, 0, 0, 0);
  };
  uint32_t *to = (uint32_t *)(units + lane / 16 * L::x_bytes) + step / 2 * 48 + t * 4 + step % 2;
  uint4 raw[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) raw[i] = load(2 * i + lane / 16);
#pragma unroll 1
  for (int32_t first = 0; first < p.stages; first += 2) {
    const int32_t stage = first + lane / 16;
    const uint32_t words[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
#pragma unroll
    for (int i = 1; i < AHEAD; i++) raw[i - 1] = raw[i];
    raw[AHEAD - 1] = load(stage + 2 * AHEAD);
    float x[8];
    uint32_t most = 0; /* by their bits, where NaN comes last */
#pragma unroll
    for (int j = 0; j < 8; j++) {
      x[j] = qm_half_of<T>(words[j / 2], j % 2);
      most = max(most, __float_as_uint(fabsf(x[j])));
    }
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2)
      most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, offset));
    /* By 2^(19 - exponent) the largest comes to lie below 2^20. */
    const uint32_t exponent = max(most >> 23, 20u);
    const float power = __uint_as_float((273u - exponent) << 23);
    int32_t both[2] = {};
    put_digits(x, power, to, both);
    to += 2 * L::x_bytes / 4;
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) {
      both[0] += __shfl_xor_sync(0xFFFFFFFFu, both[0], offset);
      both[1] += __shfl_xor_sync(0xFFFFFFFFu, both[1], offset);
    }
    if (lane % LANES != 0) continue;
    const uint32_t unit_bits = most < 0x7F800000u ? (exponent - 19u) << 23 : 0x7FFFFFFFu /* NaN */;
    const float unit = __uint_as_float(unit_bits);
    row_sum *const sum = sums + (stage * GROUPS + mine / LANES) * 2;
    sum[0] = {both[0], 8.0f * unit}; /* 2^7 / 16 */
    sum[1] = {both[1], 0.0625f * unit};
  }
}
#endif

} /* namespace mpq_linear */

#endif
