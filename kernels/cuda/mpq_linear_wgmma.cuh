/* mpq_linear_wgmma.cuh - x W for 17 to 64 rows, W of 4-bit codes, with Hopper's warpgroup products.
**
** Of a block's warpgroups one fetches x, and the others take 128 columns each: their lanes stream
** the words that they decode themselves, as in mpq_linear_few.cuh, and hold W, rounded to x's type,
** as operand A in registers. A warp's 32 columns are 16 rows in each of two products: lane (g =
** lane / 4, t = lane % 4) has columns 4 g .. 4 g + 3, two to a product, and word row t of every
** four. The tensor cores' sum goes over pairs of features i and i + 4 of a word, so x's tiles are
** stored in that order.
*/
#ifndef QM_MPQ_LINEAR_WGMMA_CUH
#define QM_MPQ_LINEAR_WGMMA_CUH

#include "attention_wgmma.cuh"
#include "mpq_linear.cuh"

namespace mpq_linear {

template <typename T_>
struct hopper_shape {
  using T = T_;
  static constexpr int groups = 2, threads = 128 * (groups + 1), rows = 64;
  static constexpr int deep = 1;               /* what `finish` asks for */
  static constexpr int depth = 16, stages = 4; /* steps of codes, tiles of x on their way */
};
struct hopper_layout {
  using S = hopper_shape<__half>;
  static constexpr int columns = 128 * S::groups, step = 32, tile = 64; /* features */
  static constexpr int tile_bytes = S::rows * tile * 2, ring_bytes = S::depth * S::groups * 2048;
  static constexpr int used_bytes = S::stages * tile_bytes + ring_bytes;
  static constexpr int sums_stride = S::rows * columns, sums_bytes = sums_stride * 4;
  static constexpr int bytes = (used_bytes > sums_bytes ? used_bytes : sums_bytes) + 1024;
};

/* The fetching warpgroup: tiles of 64 rows and 64 features of x, from feature `first` on. */
template <typename T>
static __device__ __forceinline__ void fetch_x(const task &p, int64_t first, int32_t tiles,
                                               char *tile_x, uint64_t *full, uint64_t *empty) {
  using S = hopper_shape<T>;
  using L = hopper_layout;
  constexpr int PIECES = S::rows / 16; /* of 8 features, to a thread */
  const int32_t octet = (int32_t)threadIdx.x % 8, first_row = (int32_t)threadIdx.x / 8;
  const int64_t feature = first + 8 * octet;
  const uint16_t *from = (const uint16_t *)p.x + first_row * p.k + feature;
  uint4 x[PIECES];
  const auto load = [&](int32_t tile) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      x[i] = make_uint4(0, 0, 0, 0);
      if (first_row + 16 * i < p.rows && tile < tiles && feature + tile * L::tile < p.k)
        x[i] = __ldg((const uint4 *)(from + 16 * i * p.k + tile * L::tile));
    }
  };
  load(0);
  for (int32_t tile = 0; tile < tiles; tile++) {
    const int32_t stage = tile % S::stages;
    qm_barrier_wait(&empty[stage], tile / S::stages % 2 ^ 1);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const uint32_t pairs[4] = {
          __byte_perm(x[i].x, x[i].z, 0x5410), __byte_perm(x[i].x, x[i].z, 0x7632),
          __byte_perm(x[i].y, x[i].w, 0x5410), __byte_perm(x[i].y, x[i].w, 0x7632)};
      const int32_t row = first_row + 16 * i;
      char *const line = tile_x + stage * L::tile_bytes + row * 128 + octet % 4 * 4;
#pragma unroll
      for (int j = 0; j < 4; j++) /* features j and j + 4 */
        *(uint32_t *)(line + ((octet / 4 * 4 + j) ^ row % 8) * 16) = pairs[j];
    }
    load(tile + 1);
    qm_stores_ready();
    qm_barrier_arrive(&full[stage]);
  }
}

/* A consuming warpgroup's sums over all steps. */
template <typename T>
struct hopper_product {
  using S = hopper_shape<T>;
  using L = hopper_layout;
  const task &p;
  const int32_t t = (int32_t)threadIdx.x % 4;
  int64_t column, grid_at; /* of the lane's first column: in W, and the next group's in the grid */
  const uint32_t *words;   /* of the step to ask for next */
  int32_t slots, steps, group_left, groups_left; /* steps of the group, groups to load */
  uint32_t asked = 0;
  uint2 raw_scale = {}, raw_zero = {};
  grid_pair grid[4];
  float sums[2][8][4];

  __device__ __forceinline__ hopper_product(const task &task_, int64_t first_step, int32_t steps_,
                                            char *ring)
      : p(task_), steps(steps_) {
    const int32_t thread = (int32_t)threadIdx.x - 128, g = thread % 32 / 4;
    column = (int64_t)blockIdx.x * L::columns + thread / 32 * 32 + 4 * g;
    if (column >= p.n) column = p.n - 4; /* what these lanes make of it goes nowhere */
    words = p.words + (first_step * 4 + t) * p.n + column;
    slots = (int32_t)__cvta_generic_to_shared(ring) + thread * 16;
    const int64_t group = first_step * L::step / p.group_size;
    grid_at = group * p.n + column;
    group_left = (int32_t)(((group + 1) * p.group_size - first_step * L::step) / L::step);
    groups_left = (int32_t)((p.k - 1) / p.group_size - group + 1);
    for (int i = 0; i < S::depth; i++) ask();
    load_next_grid();
    begin_group();
  }

  __device__ __forceinline__ void load_next_grid() {
    if (groups_left-- > 0) load_grid(p, grid_at, raw_scale, raw_zero);
    grid_at += p.n;
  }

  __device__ __forceinline__ void ask() {
    if (asked < (uint32_t)steps)
      copy_async(slots + asked % S::depth * S::groups * 2048, words, true);
    qm_copy_commit();
    asked++;
    words += 4 * p.n;
  }

  __device__ __forceinline__ void begin_group() {
    float scale[4], zero[4];
    widen_grid(p, raw_scale, raw_zero, scale, zero);
#pragma unroll
    for (int i = 0; i < 4; i++)
      grid[i] = make_grid<T>(scale[i], zero[i], scale[i], zero[i], p.asym);
    load_next_grid();
  }

  /* W's operands of step `at`, 0 behind the last. */
  __device__ __forceinline__ void decode(uint32_t at, uint32_t (&out)[2][2][4]) {
    uint32_t w[4] = {};
    const bool there = at < (uint32_t)steps;
    if (there && group_left == 0) {
      begin_group();
      group_left = (int32_t)((uint32_t)p.group_size / L::step);
    }
    group_left--;
    qm_copy_wait<S::depth - 1>();
    if (there) {
      const uint4 four = read_16(slots + at % S::depth * S::groups * 2048);
      w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          out[half][m][i] =
              weights<T>(w[2 * m + i % 2] >> (8 * half + i / 2 * 4), grid[2 * m + i % 2]);
    ask();
  }

  __device__ __forceinline__ void run(const char *tile_x, uint64_t *full, uint64_t *empty) {
    uint32_t a[2][2][2][4]; /* by step of the tile, half of it, product */
    for (int32_t tile = 0; 2 * tile < steps; tile++) {
      const int32_t stage = tile % S::stages;
      /* While the other warpgroup multiplies: between a product's begin and its end the compiler
      ** wants no new operands. */
      decode((uint32_t)(2 * tile), a[0]);
      decode((uint32_t)(2 * tile + 1), a[1]);
      qm_barrier_wait(&full[stage], tile / S::stages % 2);
      const uint64_t x = qm_tile(tile_x + stage * L::tile_bytes);
      qm_pin(sums[0]);
      qm_pin(sums[1]);
      qm_products_begin();
#pragma unroll
      for (int part = 0; part < 4; part++)
#pragma unroll
        for (int m = 0; m < 2; m++)
          qm_product<T, 0>(sums[m], a[part / 2][part % 2][m], qm_tile_at(x, part * 32),
                           tile == 0 && part == 0);
      qm_products_commit();
      qm_products_wait<0>();
      qm_pin(sums[0]);
      qm_pin(sums[1]);
      qm_barrier_arrive_warp(&empty[stage]);
    }
  }
};

template <typename T>
static __global__ __launch_bounds__(hopper_shape<T>::threads, 1) void multiply_hopper(task p) {
#ifdef QM_HAS_WGMMA_HERE
  using S = hopper_shape<T>;
  using L = hopper_layout;
  extern __shared__ char unaligned[];
  char *const tile_x = qm_align_tile(unaligned), *const ring = tile_x + S::stages * L::tile_bytes;
  __shared__ uint64_t full[S::stages], empty[S::stages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; i++) {
      qm_barrier_open(&full[i], 128);
      qm_barrier_open(&empty[i], 4 * S::groups);
    }
    qm_barriers_ready();
  }
  __syncthreads();
  const int64_t first = (int64_t)blockIdx.y * p.spans;
  const int64_t left = p.k / L::step - first;
  const int32_t steps = (int32_t)(left < p.spans ? left : p.spans);
  if (threadIdx.x < 128) {
    fetch_x<T>(p, first * L::step, (steps + 1) / 2, tile_x, full, empty);
    __syncthreads();
  } else {
    hopper_product<T> product(p, first, steps, ring);
    product.run(tile_x, full, empty);
    __syncthreads(); /* nobody reads the rings any more */
    const int32_t thread = (int32_t)threadIdx.x - 128, g = thread % 32 / 4, t = thread % 4;
    float *const out = (float *)tile_x + thread / 32 * 32 + 4 * g;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        *(float4 *)(out + (8 * n + 2 * t + i) * L::columns) =
            make_float4(product.sums[0][n][i], product.sums[0][n][i + 2], product.sums[1][n][i],
                        product.sums[1][n][i + 2]);
  }
  __syncthreads();
  finish<S, L>((const float *)tile_x, p, p.n);
#endif
}

template <typename T>
static int32_t launch_hopper(qm_cuda *cuda, task p) {
  using L = hopper_layout;
  const int64_t tiles = qm_ceil_div(p.n, L::columns), steps = p.k / L::step;
  const int64_t room = cuda->multiprocessors / tiles, most = qm_ceil_div(steps, 8);
  int64_t splits = tiles > TICKETS || room < 1 ? 1 : room < most ? room : most;
  p.spans = (int32_t)(qm_ceil_div(steps, 2 * splits) * 2); /* whole tiles of x */
  splits = qm_ceil_div(steps, p.spans);
  int32_t status =
      qm_cuda_check(cudaFuncSetAttribute(multiply_hopper<T>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, L::bytes),
                    "mpq_linear");
  if (status == QM_OK && splits > 1)
    status =
        qm_cuda_scratch(cuda, splits * p.rows * p.n * (int64_t)sizeof(float), (void **)&p.partial);
  if (status != QM_OK) return status;
  const dim3 grid((unsigned)tiles, (unsigned)splits);
  multiply_hopper<T><<<grid, hopper_shape<T>::threads, L::bytes, cuda->compute>>>(p);
  return qm_cuda_launched(cuda, "mpq_linear");
}

} /* namespace mpq_linear */

#endif
