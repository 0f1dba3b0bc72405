/* mpq_linear_transposed.cuh - x W^T for few rows, W of 4-bit codes: tensor cores take W x^T.
**
** A lane (g = lane / 4, t = lane % 4) holds word row g of eight, of columns 4 t .. 4 t + 3 of each
** 16: two words side by side make registers that pair columns, for features i (low halves) and
** i + 4 (high halves) of the word row.
**
** Scales and zeros vary along the sum. Up to 16 rows of bf16 they go into x: the tensor cores sum
** (code + bias) (x scale) - (bias + 8) (x scale) + x rest, where rest is (8 - zero) scale, or the
** symmetric grid's 8 scale - zero. Both of x's products round to bf16, which costs no more than
** rounding W would. For f16, whose range such products could leave, for more rows, and where the
** eight word rows are not of one group, the registers hold W, rounded to x's type.
*/
#ifndef QM_MPQ_LINEAR_TRANSPOSED_CUH
#define QM_MPQ_LINEAR_TRANSPOSED_CUH

#include "mpq_linear_grid.cuh"

namespace mpq_linear {

template <typename S_, bool SCALES_X>
struct transposed_ {
  using S = S_;
  using T = typename S::T;
  using L = layout<S, 64, 16>;
  static constexpr bool takes_groups = false;
  static constexpr int chunks = S::chunks, tiles = S::tiles;

  const task &p;
  char *memory;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int deep = threadIdx.x / 32 / S::wide, wide = threadIdx.x / 32 % S::wide;
  int64_t grid_at; /* the grid's element for the columns to load next */
  int32_t words_at, x_at;
  int32_t words_left, grids_left; /* columns, of those to load next and further */
  int32_t here[chunks];           /* whether there are such word rows */
  const uint32_t *words;
  uint2 raw_scales[S::units], raw_zeros[S::units];
  float sums[chunks][4][tiles][4] = {}, rest_sums[tiles][4] = {};

  __device__ __forceinline__ transposed_(const task &task_, char *memory_)
      : p(task_), memory(memory_) {
    const int64_t word_row = ((int64_t)blockIdx.x * S::wide + wide) * (L::tile / 8) + g;
    const int64_t column = ((int64_t)blockIdx.y * S::deep + deep) * p.spans * L::span + 4 * t;
    const int64_t left = p.n - column;
    words_left = left < 0 ? 0 : left < INT32_MAX ? (int32_t)left : INT32_MAX;
    for (int c = 0; c < chunks; c++) here[c] = kept(word_row + 8 * c < p.k / 8);
    /* A lane scales its row of x, whether or not there is its word row. */
    grids_left = SCALES_X || here[0] ? words_left : 0;
    grid_at = word_row * 8 / p.group_size * p.n + column;
    words = p.words + word_row * p.n + column;
    words_at = kept(threadIdx.x * 16);
    x_at = kept(L::words_bytes + g * L::x_stride + (deep * L::span + t * 4) * 2);
  }

  __device__ __forceinline__ void load_words(int32_t stage) {
#pragma unroll
    for (int u = 0; u < S::units; u++) {
#pragma unroll
      for (int c = 0; c < chunks; c++)
        if (words_left > 0 && here[c])
          copy_async(stage + words_at + (u * chunks + c) * S::threads * 16, words + 8 * c * p.n,
                     true);
      words_left -= 16;
      words += 16;
    }
  }

  __device__ __forceinline__ void load_grids() {
#pragma unroll
    for (int u = 0; u < S::units; u++) {
      raw_scales[u] = raw_zeros[u] = make_uint2(0, 0);
      if (grids_left > 0) load_grid(p, grid_at, raw_scales[u], raw_zeros[u]);
      grids_left -= 16;
      grid_at += 16;
    }
  }

  /* 16 columns. */
  __device__ __forceinline__ void multiply(int32_t stage, int u, uint2 raw_scale, uint2 raw_zero) {
    float scale[4], zero[4];
    widen_grid(p, raw_scale, raw_zero, t % 2, scale, zero);
    const int32_t x_lane = stage + x_at + u * 32;
    uint2 x[tiles];
#pragma unroll
    for (int b = 0; b < tiles; b++) x[b] = read_8(x_lane + 8 * b * L::x_stride);
    grid_pair left, right;
    if constexpr (SCALES_X) {
      const uint32_t one = as_bits(typename pair_of<T>::type{qm_as<T>(1.0f), qm_as<T>(1.0f)});
      const float bias = -pair_of<T>::bias - 8.0f;
      const uint32_t less = as_bits(typename pair_of<T>::type{qm_as<T>(bias), qm_as<T>(bias)});
      const uint32_t ones[4] = {one, one, one, one}, minus[4] = {less, less, less, less};
      float rest[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        rest[i] = p.asym ? scale[i] * (8.0f - zero[i]) : fmaf(8.0f, scale[i], -zero[i]);
#pragma unroll
      for (int b = 0; b < tiles; b++) {
        const auto low = as_pair<T>(x[b].x), high = as_pair<T>(x[b].y);
        const float v[4] = {qm_float(low.x), qm_float(low.y), qm_float(high.x), qm_float(high.y)};
        x[b] = make_uint2(qm_pair<T>(v[0] * scale[0], v[1] * scale[1]),
                          qm_pair<T>(v[2] * scale[2], v[3] * scale[3]));
        qm_mma<T>(rest_sums[b], minus, x[b].x, x[b].y);
        qm_mma<T>(rest_sums[b], ones, qm_pair<T>(v[0] * rest[0], v[1] * rest[1]),
                  qm_pair<T>(v[2] * rest[2], v[3] * rest[3]));
      }
    } else {
      left = make_grid<T>(scale[0], zero[0], scale[1], zero[1], p.asym);
      right = make_grid<T>(scale[2], zero[2], scale[3], zero[3], p.asym);
    }
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      const uint4 w = read_16(stage + words_at + (u * chunks + c) * S::threads * 16);
      const uint32_t halves[4] = {__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.x, w.y, 0x7632),
                                  __byte_perm(w.z, w.w, 0x5410), __byte_perm(w.z, w.w, 0x7632)};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint32_t codes = halves[j] >> (4 * i);
          a[j] = SCALES_X ? biased<T>(codes) : weights<T>(codes, j < 2 ? left : right);
        }
#pragma unroll
        for (int b = 0; b < tiles; b++) qm_mma<T>(sums[c][i][b], a, x[b].x, x[b].y);
      }
    }
  }

  __device__ __forceinline__ void run() {
    x_loader<S, L> x(p, p.n, memory);
    load_grids();
    const int32_t base = kept((int32_t)__cvta_generic_to_shared(memory));
    int32_t ask = 0; /* the stage to fill next */
    const auto load = [&] {
      const int32_t stage = base + ask % S::stages * L::stage_bytes;
      if (ask++ < p.spans) {
        load_words(stage);
        x.load(stage);
      }
      qm_copy_commit();
    };
    for (int32_t at = 0; at < S::stages - 1; at++) load();
    for (int32_t at = 0; at < p.spans; at++) {
      uint2 scales[S::units], zeros[S::units];
#pragma unroll
      for (int u = 0; u < S::units; u++) {
        scales[u] = raw_scales[u];
        zeros[u] = raw_zeros[u];
      }
      if (at + 1 < p.spans) load_grids();
      qm_copy_wait<S::stages - 2>();
      __syncthreads();
      load();
      const int32_t stage = base + at % S::stages * L::stage_bytes;
#pragma unroll
      for (int u = 0; u < S::units; u++) multiply(stage, u, scales[u], zeros[u]);
    }
    qm_copy_wait<0>();
    __syncthreads();
    float *out = (float *)memory + deep * S::rows * L::columns + wide * L::tile + 8 * g;
#pragma unroll
    for (int c = 0; c < chunks; c++)
#pragma unroll
      for (int b = 0; b < tiles; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float rest = rest_sums[b][i % 2];
          *(float4 *)(out + (8 * b + 2 * t + i % 2) * L::columns + 64 * c + i / 2 * 4) =
              make_float4(sums[c][0][b][i] + rest, sums[c][1][b][i] + rest, sums[c][2][b][i] + rest,
                          sums[c][3][b][i] + rest);
        }
    __syncthreads();
    finish<S, L>((const float *)memory, p, p.k);
  }
};

template <typename S>
using transposed = transposed_<S, false>;
template <typename S>
using transposed_scaling_x = transposed_<S, true>;

} /* namespace mpq_linear */

#endif
