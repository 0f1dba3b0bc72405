/* mpq_linear_wgmma.cuh - x W for 17 to 64 rows, W of 4-bit codes, with Hopper's warpgroup products.
**
** Of a block's 256 columns each of four warpgroups takes 64. Warps beside them fetch codes and x in
** units of 64 features, or of 32 where groups are no whole 64. The warpgroups hold operand A in
** registers, and while products of theirs run, they decode the next: where zero points are integers
** code - zero, which is exact, and a group's sums, times its scales, join those of the groups
** before; otherwise W rounded to x's type.
**
** A warp's 16 columns are the rows of A: lane (g = lane / 4, t = lane % 4) has columns 2 g and
** 2 g + 1, as rows g and g + 8, and word row t of every four. The tensor cores' sum goes over pairs
** of features i and i + 4 of a word. A kernel before lays x out so, in tiles as they lie in shared
** memory. Where columns are too few to fill the device, the blocks of a cluster split the sum, and
** each adds up some rows of it.
*/
#ifndef QM_MPQ_LINEAR_WGMMA_CUH
#define QM_MPQ_LINEAR_WGMMA_CUH

#include "mpq_linear_grid.cuh"
#include "mpq_linear_wgmma_stages.cuh"

namespace mpq_linear {

/* A lane's sums. STEPS: steps of a unit; groups are whole units. */
template <typename T, bool ASYM, int STEPS>
struct hopper_product {
  using L = hopper;

  const task &p;
  const int32_t t = (int32_t)threadIdx.x % 4;
  int32_t in_block;                         /* the lane's two columns, of the block's */
  uint32_t grid_at;                         /* of the next group's grid, in W's */
  uint32_t scales, next_scales, next_zeros; /* two each, as stored */
  uint32_t minus_zero[2];                   /* where they are integers; otherwise: */
  grid_pair grid[2];
  float part[8][4], sums[8][4] = {}; /* part: of a group where they are integers */

  __device__ __forceinline__ hopper_product(const task &task_, int32_t group) : p(task_) {
    in_block = (int32_t)(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 * 2);
    const int32_t column = (int32_t)blockIdx.x * L::columns + in_block;
    /* What lanes beyond W make of its last columns goes nowhere. */
    grid_at = (uint32_t)(group * (int32_t)p.n + min(column, (int32_t)p.n - 2));
    load_grid();
  }
  __device__ __forceinline__ void load_grid() {
    next_scales = __ldg((const uint32_t *)((const uint16_t *)p.scales + grid_at));
    next_zeros =
        __ldg((const uint32_t *)((const char *)p.zeros + (ASYM ? grid_at / 8 * 4 : grid_at * 2)));
    grid_at += (uint32_t)p.n;
  }

  __device__ __forceinline__ void begin_group(bool more) {
    scales = next_scales;
    if constexpr (ASYM) {
      constexpr uint32_t minus_bias = pair_of<T>::magic | 0x80008000u;
      const uint32_t zeros = next_zeros >> (grid_at % 8 * 4); /* n is a multiple of 8 */
#pragma unroll
      for (int i = 0; i < 2; i++)
        minus_zero[i] =
            minus_bias + ((zeros >> (4 * i) & 15u) + (uint32_t)p.zero_offset) * 0x00010001u;
    } else {
      float scale[4], zero[4];
      widen(scale, make_uint2(scales, 0), p.bf16_scales);
      widen(zero, make_uint2(next_zeros, 0), p.bf16_scales);
#pragma unroll
      for (int i = 0; i < 2; i++) grid[i] = make_grid<T>(scale[i], zero[i], scale[i], zero[i], 0);
    }
    if (more) load_grid();
  }

  /* Operands of half a unit, from words in shared memory. */
  __device__ __forceinline__ void decode(uint32_t words, int half, uint32_t (&out)[STEPS][4]) {
    const uint2 two = read_8((int32_t)words + (STEPS == 2 ? half * 4 * L::word_row : 0));
    const uint32_t w[2] = {two.x, two.y};
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t codes = w[i % 2] >> (8 * (STEPS == 2 ? k : half) + i / 2 * 4);
        if constexpr (ASYM)
          out[k][i] = as_bits(__hadd2(as_pair<T>(biased<T>(codes)), as_pair<T>(minus_zero[i % 2])));
        else
          out[k][i] = weights<T>(codes, grid[i % 2]);
      }
  }

  /* A group's sums to those of all. */
  __device__ __forceinline__ void end_group() {
    float scale[4];
    widen(scale, make_uint2(scales, 0), p.bf16_scales);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[n][i] = fmaf(scale[i / 2], part[n][i], sums[n][i]);
  }

  /* left: units of the first group. While the products of half a unit run, the other half is
  ** decoded. Products end, to be scaled, with a group where zero points are integers, and otherwise
  ** with the last unit. */
  __device__ __forceinline__ void run(int32_t units, int32_t left, int32_t group_units,
                                      hopper_turn turn) {
    /* By a shuffle: the compiler would rather compute it again and again. */
    const uint32_t words = __shfl_sync(0xFFFFFFFFu, L::tile_bytes + t * L::word_row + in_block * 4,
                                       (int)threadIdx.x % 32);
    uint32_t odd = 0; /* where in its tile a unit of one step lies */
    uint32_t a[2][STEPS][4];
    auto &running = ASYM ? part : sums;
    int32_t next_group = left;
    if (!ASYM) left = units;
    for (; units > 0; units -= left, left = group_units) {
      left = min(left, units);
      begin_group((ASYM ? left : next_group) < units);
      uint32_t to_free = 0; /* the barrier of a stage whose products may still run */
      qm_pin(running);
      for (int32_t unit = 0; unit < left; unit++) {
        if (!ASYM && unit == next_group) {
          next_group += group_units;
          begin_group(next_group < units);
        }
        qm_barrier_wait(turn.full, turn.phase);
        const uint64_t x = qm_tile(turn.at + odd);
        if (STEPS == 1) odd ^= 64; /* splits are whole tiles */
#pragma unroll
        for (int half = 0; half < 2; half++) {
          qm_products_wait<1>();
          if (half == 1 && unit > 0) qm_barrier_arrive(to_free);
          decode(turn.at + words, half, a[half]);
          qm_products_begin();
#pragma unroll
          for (int k = 0; k < STEPS; k++)
            qm_product<T, 0>(running, a[half][k], qm_tile_at(x, (half * STEPS + k) * 32),
                             ASYM && unit == 0 && half + k == 0);
          qm_products_commit();
        }
        to_free = turn.full + turn.to_empty;
        turn.next();
      }
      qm_products_wait<0>();
      qm_pin(running);
      qm_barrier_arrive(to_free);
      if (ASYM) end_group();
    }
  }

  /* Calls body(row, sums of the lane's two columns). */
  template <typename F>
  __device__ __forceinline__ void each_row(F body) const {
#pragma unroll
    for (int i = 0; i < 16; i++)
      body(8 * (i / 2) + 2 * t + i % 2, make_float2(sums[i / 2][i % 2], sums[i / 2][i % 2 + 2]));
  }
};

template <typename T>
static __device__ __forceinline__ void store_rounded(void *out, int64_t at, float4 four) {
  *(uint2 *)((T *)out + at) = make_uint2(qm_pair<T>(four.x, four.y), qm_pair<T>(four.z, four.w));
}

static __device__ __forceinline__ void add(float4 &sum, float4 more) {
  sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
}

/* The sums of a cluster's blocks, by way of each one's shared memory, to out. */
template <typename T, typename Product>
static __device__ __forceinline__ void add_cluster(const task &p, const Product &product,
                                                   float *own) {
  using L = hopper;
  qm_consumers_meet<L::consumers>(); /* all stages are read */
  product.each_row([&](int32_t row, float2 two) {
    *(float2 *)(own + row * L::columns + (product.in_block ^ row / 2 % 4 * 8)) = two;
  });
  qm_cluster_meet();
  constexpr int fours = L::columns / 4, rows_at_once = L::consumers / fours;
  const int32_t in_row = (int32_t)threadIdx.x % fours * 4;
  const int64_t column = (int64_t)blockIdx.x * L::columns + in_row;
  for (int32_t row = (int32_t)(blockIdx.y * rows_at_once + threadIdx.x / fours); row < p.rows;
       row += rows_at_once * (int32_t)gridDim.y) {
    const float *const from = own + row * L::columns + (in_row ^ row / 2 % 4 * 8);
    float4 sum = qm_cluster_read(from, 0);
    for (uint32_t split = 1; split < gridDim.y; split++) add(sum, qm_cluster_read(from, split));
    if (column < p.n) store_rounded<T>(p.out, row * p.n + column, sum);
  }
  qm_cluster_meet(); /* no block ends before the others have read it */
}

/* x as lay_out_x leaves it. Sums go to out, by way of a cluster where there is one, or a split's to
** p.partial. */
template <typename T, bool ASYM, int STEPS>
static __global__ __launch_bounds__(hopper::threads, 1) void multiply_hopper(task p, char *x) {
#ifdef QM_HAS_WGMMA_HERE
  using L = hopper;
  extern __shared__ char unaligned[];
  char *const stages = qm_align_tile(unaligned);
  __shared__ uint64_t barriers[2 * L::stages];
  qm_let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < L::stages; i++) {
      qm_barrier_open(&barriers[i], L::fetchers);
      qm_barrier_open(&barriers[L::stages + i], L::consumers);
    }
    qm_barriers_ready();
  }
  __syncthreads();
  const hopper_turn turn(stages, barriers);
  const int32_t first = (int32_t)blockIdx.y * p.spans; /* steps */
  const int32_t steps = min((int32_t)(p.k / L::step) - first, p.spans);
  const int32_t units = (steps + STEPS - 1) / STEPS;
  const int32_t group_units = (int32_t)((uint32_t)p.group_size / (L::step * STEPS));
  const int32_t group = first / STEPS / group_units;
  const int32_t left = (group + 1) * group_units - first / STEPS; /* units of the first group */
  const bool in_cluster = gridDim.y > 1 && p.partial == NULL;
  if (threadIdx.x >= L::consumers) {
    qm_registers_release<L::registers_left>();
    const int32_t warp = ((int32_t)threadIdx.x - L::consumers) / 32;
    /* By a loop, for the compiler to see that all lanes of a warp agree on `me`. */
#pragma unroll 1
    for (int32_t me = 0; me < L::fetchers; me++)
      if (warp == me) hopper_fetch<STEPS>(p, x, me, first, steps).run(turn);
    if (in_cluster) { /* as add_cluster does */
      qm_cluster_meet();
      qm_cluster_meet();
    }
    return;
  }
  qm_registers_take<L::registers>();
  hopper_product<T, ASYM, STEPS> product(p, group);
  qm_await_previous();
  product.run(units, left, group_units, turn);
  if (in_cluster) return add_cluster<T>(p, product, (float *)stages);
  const int64_t column = (int64_t)blockIdx.x * L::columns + product.in_block;
  if (column >= p.n) return;
  product.each_row([&](int32_t row, float2 two) {
    if (row >= p.rows) return;
    if (p.partial != NULL)
      __stcg((float2 *)(p.partial + (blockIdx.y * p.rows + row) * p.n + column), two);
    else
      *(uint32_t *)((T *)p.out + row * p.n + column) = qm_pair<T>(two.x, two.y);
  });
#endif
}

} /* namespace mpq_linear */

#endif
