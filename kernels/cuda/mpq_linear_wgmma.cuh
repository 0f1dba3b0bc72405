/* mpq_linear_wgmma.cuh - x W for 17 to 64 rows, W of 4-bit codes and float zeros, on Hopper.
**
** Each of a block's warpgroups takes 128 columns: its lanes stream the words that they decode
** themselves, as in mpq_linear_few.cuh, and hold W, rounded to x's type, as operand A in registers.
** A warp's 32 columns are 16 rows in each of two products: lane (g = lane / 4, t = lane % 4) has
** columns 4 g .. 4 g + 3, two to a product, and word row t of every four. The tensor cores' sum
** goes over pairs of features i and i + 4 of a word. A kernel before lays x out so, in tiles as
** they lie in shared memory, which a warp beside the groups fetches whole. Where columns are too
** few to fill the device, the sum is split over blocks, and a kernel behind adds theirs.
*/
#ifndef QM_MPQ_LINEAR_WGMMA_CUH
#define QM_MPQ_LINEAR_WGMMA_CUH

#include "attention_wgmma.cuh"
#include "mpq_linear_grid.cuh"

namespace mpq_linear {

template <typename T_>
struct hopper_shape {
  using T = T_;
  static constexpr int groups = 3, consumers = 128 * groups, threads = consumers + 128, rows = 64;
  static constexpr int registers = 160, registers_left = 24;
  static constexpr int depth = 4, stages = 6; /* tiles of codes and of x on their way */
};
struct hopper_layout {
  using S = hopper_shape<__half>;
  static constexpr int columns = 128 * S::groups, step = 32, tile = 64; /* features */
  static constexpr int tile_bytes = S::rows * tile * 2;
  /* Of a step, 16 bytes of codes to a lane, and the scales and zeros of a group that it begins. */
  static constexpr int grid_at = S::consumers * 16, step_bytes = 2 * grid_at;
  static constexpr int slot_bytes = 2 * step_bytes;
  static constexpr int bytes = S::stages * tile_bytes + S::depth * slot_bytes + 1024;
};

/* Tile blockIdx.x of x, 64 rows of 64 features; what x lacks is zeros. A thread has half a row, 4
** octets of features. */
static __global__ __launch_bounds__(2 * hopper_layout::S::rows) void lay_out_x(task p, char *out) {
  using L = hopper_layout;
  qm_take_turn();
  const int32_t row = (int32_t)threadIdx.x / 2, half = (int32_t)threadIdx.x % 2;
  const int64_t feature = blockIdx.x * (int64_t)L::tile + 32 * half;
  uint4 x[4] = {};
  if (row < p.rows && feature < p.k)
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[i] = *((const uint4 *)((const uint16_t *)p.x + row * p.k + feature) + i);
  char *const line = out + blockIdx.x * (int64_t)L::tile_bytes + row * 128;
#pragma unroll
  for (int j = 0; j < 4; j++) { /* features j and j + 4 of each octet */
    const uint32_t select = j % 2 == 0 ? 0x5410 : 0x7632;
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      pairs[i] = j < 2 ? __byte_perm(x[i].x, x[i].z, select) : __byte_perm(x[i].y, x[i].w, select);
    *(uint4 *)(line + ((half * 4 + j) ^ row % 8) * 16) =
        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

template <typename T>
static __device__ __forceinline__ void store_rounded(void *out, int64_t at, float4 four) {
  *(uint2 *)((T *)out + at) = make_uint2(qm_pair<T>(four.x, four.y), qm_pair<T>(four.z, four.w));
}

/* A consuming warpgroup's sums over all steps. */
template <typename T>
struct hopper_product {
  using S = hopper_shape<T>;
  using L = hopper_layout;
  const task &p;
  const int32_t t = (int32_t)threadIdx.x % 4;
  int64_t column;        /* the lane's first */
  bool there;            /* W has it; what lanes beyond make of its last goes nowhere */
  int64_t grid_at;       /* the next group's element of the grid, in that column */
  const uint32_t *words; /* of the tile to ask for next */
  int32_t slots;         /* the lane's, by address of shared memory */
  int32_t steps_to_ask;
  int32_t group_to_ask = 0, group_left = 0; /* steps before the next group begins */
  int32_t next_steps; /* of the group that begins next: fewer where a split cuts the first */
  grid_pair grid[4];
  float sums[2][8][4];

  __device__ __forceinline__ hopper_product(const task &task_, int64_t first_step, int32_t steps,
                                            char *ring)
      : p(task_), steps_to_ask(steps) {
    const int32_t thread = (int32_t)threadIdx.x, g = thread % 32 / 4;
    column = (int64_t)blockIdx.x * L::columns + thread / 32 * 32 + 4 * g;
    there = column < p.n;
    if (!there) column = p.n - 4;
    words = p.words + (first_step * 4 + t) * p.n + column;
    slots = (int32_t)__cvta_generic_to_shared(ring) + thread * 16;
    const int64_t group = first_step * L::step / p.group_size;
    grid_at = group * p.n + column;
    next_steps = (int32_t)(((group + 1) * p.group_size - first_step * L::step) / L::step);
#pragma unroll
    for (int i = 0; i < S::depth; i++) ask(slots + i * L::slot_bytes, i == 0);
  }

  /* The next tile's words, and grids of groups that begin there, into that slot */
  __device__ __forceinline__ void ask(int32_t slot, bool first = false) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int32_t to = slot + i * L::step_bytes;
      if (steps_to_ask <= i) break;
      copy_async(to, words + i * 4 * p.n, true);
      if (group_to_ask == 0) {
        ask_grid(to + L::grid_at);
        group_to_ask = first && i == 0 ? next_steps : group_steps();
      }
      group_to_ask--;
    }
    qm_copy_commit();
    steps_to_ask -= 2;
    words += 8 * p.n;
  }
  __device__ __forceinline__ void ask_grid(int32_t to) {
    copy_async<8>(to, (const uint16_t *)p.scales + grid_at);
    if (p.asym)
      copy_async<4>(to + 8, (const char *)p.zeros + grid_at / 8 * 4);
    else
      copy_async<8>(to + 8, (const uint16_t *)p.zeros + grid_at);
    grid_at += p.n;
  }
  __device__ __forceinline__ int32_t group_steps() const {
    return (int32_t)((uint32_t)p.group_size / L::step);
  }

  __device__ __forceinline__ void begin_group(int32_t from) {
    const uint4 raw = read_16(from);
    float scale[4], zero[4];
    widen(scale, make_uint2(raw.x, raw.y), p.bf16_scales);
    widen(zero, make_uint2(raw.z, raw.w), p.bf16_scales);
#pragma unroll
    for (int i = 0; i < 4; i++)
      grid[i] = make_column_grid<T>(
          p, scale[i], point_of(make_uint2(raw.z, raw.w), (int)threadIdx.x / 4 % 2, i), zero[i]);
  }

  /* W's operands of a step. Behind the last (`more` is false) they are of whatever codes lie in the
  ** slot and of the last group's grid, for x's zeros to meet. */
  __device__ __forceinline__ void decode(int32_t slot, bool more, uint32_t (&out)[2][2][4]) {
    if (more && group_left == 0) {
      begin_group(slot + L::grid_at);
      group_left = next_steps;
      next_steps = group_steps();
    }
    group_left--;
    const uint4 four = read_16(slot);
    const uint32_t w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          out[half][m][i] =
              weights<T>(w[2 * m + i % 2] >> (8 * half + i / 2 * 4), grid[2 * m + i % 2]);
  }

  __device__ __forceinline__ void run(int32_t steps, const char *tile_x, uint64_t *full,
                                      uint64_t *empty) {
    uint32_t a[2][2][2][4]; /* by step of the tile, half of it, product */
    int32_t slot = slots;
    for (int32_t tile = 0; 2 * tile < steps; tile++) {
      const int32_t stage = tile % S::stages;
      /* While the other warpgroups multiply: between a product's begin and its end the compiler
      ** wants no new operands. */
      qm_copy_wait<S::depth - 1>();
      decode(slot, true, a[0]);
      decode(slot + L::step_bytes, 2 * tile + 1 < steps, a[1]);
      ask(slot);
      slot += L::slot_bytes;
      if (slot == slots + S::depth * L::slot_bytes) slot = slots;
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

  /* Sums to out, or those of a split to scratch. */
  __device__ __forceinline__ void store() {
    if (!there) return;
    const bool split = gridDim.y > 1;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int32_t row = 8 * n + 2 * t + i;
        if (row >= p.rows) continue;
        const float4 four =
            make_float4(sums[0][n][i], sums[0][n][i + 2], sums[1][n][i], sums[1][n][i + 2]);
        if (split)
          __stcg((float4 *)(p.partial + (blockIdx.y * p.rows + row) * p.n + column), four);
        else
          store_rounded<T>(p.out, row * p.n + column, four);
      }
  }
};

/* p.x is what lay_out_x made. */
template <typename T>
static __global__ __launch_bounds__(hopper_shape<T>::threads, 1) void multiply_hopper(task p) {
#ifdef QM_HAS_WGMMA_HERE
  using S = hopper_shape<T>;
  using L = hopper_layout;
  extern __shared__ char unaligned[];
  char *const tile_x = qm_align_tile(unaligned), *const ring = tile_x + S::stages * L::tile_bytes;
  __shared__ uint64_t full[S::stages], empty[S::stages];
  qm_let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; i++) {
      qm_barrier_open(&full[i], 1);
      qm_barrier_open(&empty[i], 4 * S::groups);
    }
    qm_barriers_ready();
  }
  __syncthreads();
  const int64_t first = (int64_t)blockIdx.y * p.spans;
  const int64_t left = p.k / L::step - first;
  const int32_t steps = (int32_t)(left < p.spans ? left : p.spans);
  if (threadIdx.x < S::consumers) {
    qm_registers_take<S::registers>();
    hopper_product<T> product(p, first, steps, ring);
    qm_await_previous();
    product.run(steps, tile_x, full, empty);
    product.store();
  } else {
    qm_registers_release<S::registers_left>();
    if (threadIdx.x > S::consumers) return;
    qm_await_previous();
    const char *from = (const char *)p.x + first * L::step / L::tile * L::tile_bytes;
    for (int32_t tile = 0; 2 * tile < steps; tile++, from += L::tile_bytes) {
      const int32_t stage = tile % S::stages;
      qm_barrier_wait(&empty[stage], tile / S::stages % 2 ^ 1);
      qm_barrier_expect(&full[stage], L::tile_bytes);
      qm_copy_bulk(tile_x + stage * L::tile_bytes, from, L::tile_bytes, &full[stage]);
    }
  }
#endif
}

/* The sums of all splits, four by four. */
template <typename T>
static __global__ __launch_bounds__(256) void add_splits(task p, int32_t splits) {
  qm_take_turn();
  const int64_t fours = p.rows * p.n / 4, at = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (at >= fours) return;
  const float4 *const part = (const float4 *)p.partial + at;
  float4 sum = __ldcg(part);
#pragma unroll 4
  for (int32_t i = 1; i < splits; i++) {
    const float4 more = __ldcg(part + i * fours);
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  store_rounded<T>(p.out, 4 * at, sum);
}

template <typename T>
static int32_t launch_hopper(qm_cuda *cuda, task p) {
  using L = hopper_layout;
  const int64_t tiles = qm_ceil_div(p.n, L::columns), steps = p.k / L::step;
  const int64_t room = cuda->multiprocessors / tiles, most = qm_ceil_div(steps, 8);
  int64_t splits = room < 1 ? 1 : room < most ? room : most;
  p.spans = (int32_t)(qm_ceil_div(steps, 2 * splits) * 2); /* whole tiles of x */
  splits = qm_ceil_div(steps, p.spans);
  static bool prepared[64]; /* by device */
  const int64_t x_tiles = qm_ceil_div(p.k, L::tile), x_bytes = x_tiles * L::tile_bytes;
  const int64_t sums_bytes = splits > 1 ? splits * p.rows * p.n * (int64_t)sizeof(float) : 0;
  char *scratch;
  int32_t status = prepare(cuda, multiply_hopper<T>, L::bytes, prepared);
  if (status == QM_OK) status = qm_cuda_scratch(cuda, x_bytes + sums_bytes, (void **)&scratch);
  if (status != QM_OK) return status;
  qm_launch_early(cuda, lay_out_x, dim3((unsigned)x_tiles), dim3(2 * L::S::rows), 0, p, scratch);
  p.x = scratch;
  p.partial = (float *)(scratch + x_bytes);
  const dim3 grid((unsigned)tiles, (unsigned)splits);
  qm_launch_early(cuda, multiply_hopper<T>, grid, dim3(hopper_shape<T>::threads), L::bytes, p);
  if (splits > 1)
    qm_launch_early(cuda, add_splits<T>, dim3((unsigned)qm_ceil_div(p.rows * p.n, 4 * 256)),
                    dim3(256), 0, p, (int32_t)splits);
  return qm_cuda_launched(cuda, "mpq_linear");
}

} /* namespace mpq_linear */

#endif
