/* mpq_linear_forward.cuh - x W for 17 to 64 rows, W of 4-bit codes: tensor cores take W^T x^T.
**
** A lane (g = lane / 4, t = lane % 4) holds word row t of every four, that is 8 features, of
** columns 4 g .. 4 g + 3 of each 32: register i of a word pairs features i and i + 4. The registers
** hold W, rounded to x's type: for so many rows decoding costs less than multiplying, and sums of
** codes, scaled at a group's end as mpq_linear_few.cuh does it, would take too many registers.
*/
#ifndef QM_MPQ_LINEAR_FORWARD_CUH
#define QM_MPQ_LINEAR_FORWARD_CUH

#include "mpq_linear_grid.cuh"

namespace mpq_linear {

template <typename S_>
struct forward {
  using S = S_;
  using T = typename S::T;
  using L = layout<S, 32, 32>;
  static constexpr bool takes_groups = false;
  static constexpr int chunks = S::chunks, tiles = S::tiles;

  const task &p;
  char *memory;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int deep = threadIdx.x / 32 / S::wide, wide = threadIdx.x / 32 % S::wide;
  int64_t grid_at; /* the group's element of the grid, in the lane's first column */
  int32_t groups_left, words_at, x_at;
  int32_t here[chunks]; /* whether there are such columns */
  const uint32_t *words;
  int32_t units, loaded = 0; /* steps of 32 features: all, and those asked for */
  uint2 raw_scales[chunks], raw_zeros[chunks];
  grid_pair grids[chunks][4];
  float sums[chunks][2][tiles][4] = {};

  __device__ __forceinline__ forward(const task &task_, char *memory_) : p(task_), memory(memory_) {
    const int64_t column = ((int64_t)blockIdx.x * S::wide + wide) * L::tile + 4 * g;
    const int64_t first = ((int64_t)blockIdx.y * S::deep + deep) * p.spans * S::units;
    const int64_t all = p.k / 32 - first;
    units = all < 0 ? 0 : all < p.spans * S::units ? (int32_t)all : p.spans * S::units;
    words = p.words + (first * 4 + t) * p.n + column;
    const int64_t group = first * 32 / p.group_size;
    grid_at = group * p.n + column;
    groups_left = (int32_t)((p.k - 1) / p.group_size - group + 1);
    for (int c = 0; c < chunks; c++) here[c] = kept(column + 32 * c < p.n);
    words_at = kept(threadIdx.x * 16);
    x_at = kept(L::words_bytes + g * L::x_stride + (deep * L::span + t * 8) * 2);
  }

  __device__ __forceinline__ void load_words(int32_t stage) {
#pragma unroll
    for (int u = 0; u < S::units; u++) {
#pragma unroll
      for (int c = 0; c < chunks; c++)
        if (loaded < units && here[c])
          copy_async(stage + words_at + (u * chunks + c) * S::threads * 16, words + 32 * c, true);
      loaded++;
      words += 4 * p.n;
    }
  }

  __device__ __forceinline__ void load_grids() {
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      raw_scales[c] = raw_zeros[c] = make_uint2(0, 0);
      if (groups_left > 0 && here[c]) load_grid(p, grid_at + 32 * c, raw_scales[c], raw_zeros[c]);
    }
    groups_left--;
    grid_at += p.n;
  }

  __device__ __forceinline__ void begin_group() {
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      float scale[4], zero[4];
      widen(scale, raw_scales[c], p.bf16_scales);
      widen(zero, raw_zeros[c], p.bf16_scales);
#pragma unroll
      for (int i = 0; i < 4; i++)
        grids[c][i] = make_column_grid<T>(p, scale[i], point_of(raw_zeros[c], g % 2, i), zero[i]);
    }
    load_grids();
  }

  /* 32 features. */
  __device__ __forceinline__ void multiply(int32_t stage, int u) {
    const int32_t x_lane = stage + x_at + u * 64;
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      const uint4 four = read_16(stage + words_at + (u * chunks + c) * S::threads * 16);
      const uint32_t w[4] = {four.x, four.y, four.z, four.w};
      uint32_t a[2][2][4]; /* columns 2 j and 2 j + 1 of the lane's four, step s */
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const uint32_t codes = w[2 * j + i % 2] >> (8 * s + i / 2 * 4);
            a[j][s][i] = weights<T>(codes, grids[c][2 * j + i % 2]);
          }
#pragma unroll
      for (int b = 0; b < tiles; b++) {
        const uint4 r = read_16(x_lane + 8 * b * L::x_stride);
        const uint32_t x[4] = {__byte_perm(r.x, r.z, 0x5410), __byte_perm(r.x, r.z, 0x7632),
                               __byte_perm(r.y, r.w, 0x5410), __byte_perm(r.y, r.w, 0x7632)};
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int s = 0; s < 2; s++) qm_mma<T>(sums[c][j][b], a[j][s], x[2 * s], x[2 * s + 1]);
      }
    }
  }

  __device__ __forceinline__ void run() {
    x_loader<S, L> x(p, p.k, memory);
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
    const int32_t per_group = p.group_size / 32;
    int32_t group_left = per_group - (int32_t)((words_first() / 32) % per_group);
    begin_group();
    for (int32_t at = 0; at < p.spans; at++) {
      qm_copy_wait<S::stages - 2>();
      __syncthreads();
      load();
      const int32_t stage = base + at % S::stages * L::stage_bytes;
#pragma unroll
      for (int u = 0; u < S::units; u++) {
        if (at * S::units + u >= units) break;
        if (group_left == 0) {
          begin_group();
          group_left = per_group;
        }
        group_left--;
        multiply(stage, u);
      }
    }
    qm_copy_wait<0>();
    __syncthreads();
    float *out = (float *)memory + deep * S::rows * L::columns + wide * L::tile + 4 * g;
    put_sums<L>(out, t, sums);
    __syncthreads();
    finish<S, L>((const float *)memory, p, p.n);
  }

  /* The warp's first feature. */
  __device__ __forceinline__ int64_t words_first() const {
    return ((int64_t)blockIdx.y * S::deep + deep) * p.spans * L::span;
  }
};

} /* namespace mpq_linear */

#endif
