/* mpq_linear_few.cuh - x W for up to 8 rows, W of 4-bit codes.
**
** Little is done with each code, so that all hangs on how many loads are on their way. No stages,
** no loops: a lane asks for all it will need at once, LOADS pieces of 16 bytes of codes with their
** grids and x, and the device is filled with as many blocks as that takes. Tensor cores sum code +
** bias times x and x itself, as in mpq_linear_forward.cuh, whose order of elements this is: lane (g
** = lane / 4, t = lane % 4) holds word row t of every four, columns 4 g .. 4 g + 3 of 32. Measured
** on an H200: 22.6 us at 4096 x 14336, one row, a third of a copy's pace.
*/
#ifndef QM_MPQ_LINEAR_FEW_CUH
#define QM_MPQ_LINEAR_FEW_CUH

#include "mpq_linear.cuh"

namespace mpq_linear {

constexpr int FEW_ROWS = 8, FEW_LOADS = 4, FEW_WARPS = 8, FEW_COLUMNS = 32;
constexpr int FEW_FEATURES = 32 * FEW_LOADS * FEW_WARPS; /* of a block */

/* What `finish` asks of a product's shape and layout. */
template <typename T_>
struct few_shape {
  using T = T_;
  static constexpr int rows = FEW_ROWS, threads = FEW_WARPS * 32, deep = FEW_WARPS;
};
struct few_layout {
  static constexpr int columns = FEW_COLUMNS;
};

template <typename T>
static __global__ __launch_bounds__(FEW_WARPS * 32, 3) void multiply_few(task p) {
  alignas(16) __shared__ float sums[FEW_WARPS][FEW_ROWS][FEW_COLUMNS];
  const int32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t column = (int64_t)blockIdx.x * FEW_COLUMNS + 4 * g;
  const int64_t first = ((int64_t)blockIdx.y * FEW_WARPS + warp) * (32 * FEW_LOADS);
  const bool here = column < p.n;
  const int32_t loads = here && first < p.k ? (int32_t)min((p.k - first) / 32, (int64_t)FEW_LOADS)
                                            : 0; /* k is a multiple of 32 */
  uint4 codes[FEW_LOADS], x[FEW_LOADS];
  uint2 scales[FEW_LOADS], zeros[FEW_LOADS];
#pragma unroll
  for (int i = 0; i < FEW_LOADS; i++) {
    codes[i] = make_uint4(0, 0, 0, 0);
    if (i < loads)
      codes[i] = __ldcs((const uint4 *)(p.words + (first / 8 + 4 * i + t) * p.n + column));
  }
#pragma unroll
  for (int i = 0; i < FEW_LOADS; i++) { /* a grid where a group begins */
    scales[i] = zeros[i] = make_uint2(0, 0);
    const int32_t feature = (int32_t)first + 32 * i;
    if (i < loads && (i == 0 || feature % p.group_size == 0))
      load_grid(p, feature / p.group_size * p.n + column, scales[i], zeros[i]);
  }
#pragma unroll
  for (int i = 0; i < FEW_LOADS; i++) {
    x[i] = make_uint4(0, 0, 0, 0);
    if (first + 32 * i < p.k && g < p.rows)
      x[i] = __ldg((const uint4 *)((const uint16_t *)p.x + g * p.k + first + 32 * i + 8 * t));
  }

  const uint32_t one = as_bits(typename pair_of<T>::type{qm_as<T>(1.0f), qm_as<T>(1.0f)});
  const uint32_t ones[4] = {one, one, one, one};
  float out[2][4] = {}, part[2][4] = {}, x_sum[4] = {};
  uint2 grid_scales, grid_zeros; /* of the group under way */
  const auto end_group = [&]() {
    float scale[4], zero[4];
    widen_grid(p, grid_scales, grid_zeros, scale, zero);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) { /* columns 2 j and 2 j + 1, rows 2 t and 2 t + 1 */
        const int c = 2 * j + i / 2;
        const float offset = pair_of<T>::bias + (p.asym ? zero[c] : 0.0f), sum = x_sum[i % 2];
        out[j][i] = fmaf(scale[c], fmaf(-offset, sum, part[j][i]), out[j][i]);
        if (!p.asym) out[j][i] = fmaf(-zero[c], sum, out[j][i]);
        part[j][i] = 0.0f;
      }
#pragma unroll
    for (int i = 0; i < 4; i++) x_sum[i] = 0.0f;
  };
#pragma unroll
  for (int i = 0; i < FEW_LOADS; i++) {
    if (i == 0 || ((int32_t)first + 32 * i) % p.group_size == 0) {
      if (i > 0) end_group();
      grid_scales = scales[i];
      grid_zeros = zeros[i];
    }
    const uint32_t b[4] = {__byte_perm(x[i].x, x[i].z, 0x5410), __byte_perm(x[i].x, x[i].z, 0x7632),
                           __byte_perm(x[i].y, x[i].w, 0x5410),
                           __byte_perm(x[i].y, x[i].w, 0x7632)};
    const uint32_t w[4] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
#pragma unroll
    for (int s = 0; s < 2; s++) {
      qm_mma<T>(x_sum, ones, b[2 * s], b[2 * s + 1]);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; r++) a[r] = biased<T>(w[2 * j + r % 2] >> (8 * s + r / 2 * 4));
        qm_mma<T>(part[j], a, b[2 * s], b[2 * s + 1]);
      }
    }
  }
  end_group();

#pragma unroll
  for (int i = 0; i < 2; i++) /* row 2 t + i */
    *(float4 *)&sums[warp][2 * t + i][4 * g] =
        make_float4(out[0][i], out[0][i + 2], out[1][i], out[1][i + 2]);
  __syncthreads();
  finish<few_shape<T>, few_layout>(&sums[0][0][0], p, p.n);
}

template <typename T>
static int32_t launch_few(qm_cuda *cuda, task p) {
  const int64_t tiles = qm_ceil_div(p.n, FEW_COLUMNS), splits = qm_ceil_div(p.k, FEW_FEATURES);
  if (tiles > TICKETS && splits > 1) return QM_E_UNSUPPORTED;
  if (splits > 1) {
    const int32_t status =
        qm_cuda_scratch(cuda, splits * p.rows * p.n * (int64_t)sizeof(float), (void **)&p.partial);
    if (status != QM_OK) return status;
  }
  const dim3 grid((unsigned)tiles, (unsigned)splits);
  multiply_few<T><<<grid, FEW_WARPS * 32, 0, cuda->compute>>>(p);
  return qm_cuda_launched(cuda, "mpq_linear");
}

} /* namespace mpq_linear */

#endif
