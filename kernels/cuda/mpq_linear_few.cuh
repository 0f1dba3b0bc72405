/* mpq_linear_few.cuh - x W for up to 16 rows, W of 4-bit codes: as fast as the codes arrive.
**
** Little is done with each code, so that all hangs on how many bytes are on their way: a lane
** streams the words that it decodes itself through a ring of its own in shared memory, DEPTH
** vectors of 16 bytes ahead, and waits for nobody until the block's warps, which split the sum,
** meet at the end. x, which other blocks read as well, comes through L1, AHEAD steps before it is
** needed; of rows that it lacks there are zeros.
**
** Tensor cores sum code + bias times x and x itself; at the end of a group both become W's: scale
** (sum - (bias + zero) sum of x), in f32. A step is 32 features: lane (g = lane / 4, t = lane % 4)
** holds word row t of its four, of columns 4 g .. 4 g + 3 of each 32, and 8 features of x's row g.
*/
#ifndef QM_MPQ_LINEAR_FEW_CUH
#define QM_MPQ_LINEAR_FEW_CUH

#include "mpq_linear_grid.cuh"

namespace mpq_linear {

/* A warp has CHUNKS pieces of 32 columns, for 8 TILES rows of x. */
template <typename T_, int TILES, int CHUNKS, int WARPS, int DEPTH, int AHEAD, int BLOCKS>
struct few_shape {
  using T = T_;
  static constexpr int tiles = TILES, rows = 8 * TILES, chunks = CHUNKS, blocks = BLOCKS;
  static constexpr int warps = WARPS, deep = WARPS, threads = 32 * WARPS;
  static constexpr int depth = DEPTH, ahead = AHEAD;
  static_assert(TILES <= 2 && DEPTH % AHEAD == 0);
};

/* In shared memory each warp has its ring, and in its place at the end its sums. */
template <typename S>
struct few_layout {
  static constexpr int columns = 32 * S::chunks, span = 32;
  static constexpr int slot_bytes = S::chunks * 32 * 16, ring_bytes = S::depth * slot_bytes;
  static constexpr int sums_stride = ring_bytes / 4;
  static constexpr int bytes = S::warps * ring_bytes;
  static_assert(S::rows * columns <= sums_stride);
};

template <typename S_>
struct few {
  using S = S_;
  using T = typename S::T;
  using L = few_layout<S>;
  static constexpr bool takes_groups = true;
  static constexpr int chunks = S::chunks, tiles = S::tiles, ahead = S::ahead;

  const task &p;
  char *memory;
  const int32_t k = (int32_t)p.k, n = (int32_t)p.n;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t *words; /* of the step to ask for next */
  const uint16_t *x_rows[tiles];
  uint32_t grid_at;           /* the next group's element of the grid, in the lane's first column */
  int32_t last_piece;         /* from the lane's columns to its last piece's, or to W's end */
  int32_t left;               /* steps to take, when `ahead` of them began */
  int32_t steps, group_steps; /* behind the group's, and those of it */
  int32_t slots;              /* the lane's, by address of shared memory */
  uint4 x[ahead][tiles];
  uint2 scales[chunks], zeros[chunks];
  float sums[chunks][2][tiles][4] = {}, part[chunks][2][tiles][4], x_sums[4]; /* of a group */

  /* Lanes that stand beyond W's columns read its last, and what they make of them goes nowhere. */
  __device__ __forceinline__ few(const task &task_, char *memory_) : p(task_), memory(memory_) {
    const int32_t column = min(((int32_t)blockIdx.x - p.first_tile) * L::columns + 4 * g, n - 4);
    const int32_t first = (int32_t)(blockIdx.y * S::warps + warp) * p.spans;
    left = steps = max(min(k / 32 - first, p.spans), 0);
    last_piece = min(n - 4 - column, 32 * (chunks - 1));
    words = p.words + column + (int64_t)(first * 4 + t) * n;
    slots =
        (int32_t)__cvta_generic_to_shared(memory) + warp * L::ring_bytes + threadIdx.x % 32 * 16;
#pragma unroll
    for (int i = 0; i < S::depth; i++) load_words(i, slots + i * L::slot_bytes);
    const uint32_t per_group = (uint32_t)p.group_size / 32, group = (uint32_t)first / per_group;
    group_steps = (int32_t)(per_group - ((uint32_t)first - group * per_group));
    grid_at = group * (uint32_t)n + (uint32_t)column;
#pragma unroll
    for (int b = 0; b < tiles; b++) {
      x_rows[b] = (const uint16_t *)p.x + first * 32 + 8 * t + (int64_t)(g + 8 * b) * k;
      for (int u = 0; u < ahead; u++) x[u][b] = make_uint4(0, 0, 0, 0);
    }
    if (left > 0) begin_group();
  }

  /* From the lane's columns to those of its piece c. */
  __device__ __forceinline__ int32_t piece(int c) const {
    return c == 0 ? 0 : c == chunks - 1 ? last_piece : min(32 * c, last_piece);
  }

  /* Of the step that is the `i`th from now. */
  __device__ __forceinline__ void load_words(int i, int32_t to) {
#pragma unroll
    for (int c = 0; c < chunks; c++)
      if (left > i) copy_async(to + c * 512, words + piece(c), true);
    qm_copy_commit();
    words += (int64_t)n * 4;
  }
  __device__ __forceinline__ void load_x(int i) {
#pragma unroll
    for (int b = 0; b < tiles; b++)
      if (g + 8 * b < p.rows && left > i) x[i % ahead][b] = *(const uint4 *)(x_rows[b] + 32 * i);
  }

  __device__ __forceinline__ void begin_group() {
    group_steps = min(group_steps, steps);
    steps -= group_steps;
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      const uint32_t at = grid_at + (uint32_t)piece(c);
      load_grid(p, at, scales[c], zeros[c]);
#pragma unroll
      for (int i = 0; i < 8 * tiles; i++) part[c][i / 4 / tiles][i / 4 % tiles][i % 4] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) x_sums[i] = 0.0f;
    grid_at += (uint32_t)n;
  }
  __device__ __forceinline__ void end_group() {
    float x_sum[tiles][2]; /* of rows 2 t and 2 t + 1 */
#pragma unroll
    for (int b = 0; b < tiles; b++) {
      const float sum = tiles == 1 ? x_sums[0] + x_sums[2] : x_sums[b] + x_sums[b + 2];
#pragma unroll
      for (int i = 0; i < 2; i++) x_sum[b][i] = __shfl_sync(0xFFFFFFFFu, sum, 8 * t + 4 * i);
    }
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      float scale[4], less[4] /* than code + bias */, zero[4];
      widen(scale, scales[c], p.bf16_scales);
      if (p.asym) {
        constexpr uint32_t magic = 0x4B000000u + (uint32_t)pair_of<T>::bias; /* 2^23 + bias */
        const uint32_t points = zeros[c].x >> (g % 2 * 16);
#pragma unroll
        for (int i = 0; i < 4; i++)
          less[i] = p.zero_top - __uint_as_float(masked(points >> (4 * i), 15u, magic));
      } else {
        widen(zero, zeros[c], p.bf16_scales);
        for (int i = 0; i < 4; i++) less[i] = -pair_of<T>::bias;
#pragma unroll
        for (int i = 0; i < 8 * tiles; i++) {
          float &sum = sums[c][i / 4 / tiles][i / 4 % tiles][i % 4];
          sum = fmaf(-zero[i / 4 / tiles * 2 + i % 4 / 2], x_sum[i / 4 % tiles][i % 2], sum);
        }
      }
#pragma unroll
      for (int i = 0; i < 8 * tiles; i++) {
        const int j = i / 4 / tiles, b = i / 4 % tiles, column = 2 * j + i % 4 / 2;
        const float code_sum = fmaf(less[column], x_sum[b][i % 2], part[c][j][b][i % 4]);
        sums[c][j][b][i % 4] = fmaf(scale[column], code_sum, sums[c][j][b][i % 4]);
      }
    }
  }

  /* A step, of codes in the slot, and of the x loaded `ahead` steps before. */
  __device__ __forceinline__ void multiply(int u, int32_t from) {
    uint32_t b[2][2 * tiles]; /* by halves of the step: of each tile, the operand's two words */
#pragma unroll
    for (int i = 0; i < tiles; i++) {
      const uint4 r = x[u][i];
      b[0][2 * i] = __byte_perm(r.x, r.z, 0x5410);
      b[0][2 * i + 1] = __byte_perm(r.x, r.z, 0x7632);
      b[1][2 * i] = __byte_perm(r.y, r.w, 0x5410);
      b[1][2 * i + 1] = __byte_perm(r.y, r.w, 0x7632);
    }
    load_x(u + ahead);
    sum_x(b);
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      const uint4 four = read_16(from + c * 512);
      const uint32_t w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 2; j++) /* columns 2 j and 2 j + 1 of the lane's four */
#pragma unroll
        for (int s = 0; s < 2; s++) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; i++) a[i] = biased<T>(w[2 * j + i % 2] >> (8 * s + i / 2 * 4));
#pragma unroll
          for (int i = 0; i < tiles; i++) qm_mma<T>(part[c][j][i], a, b[s][2 * i], b[s][2 * i + 1]);
        }
    }
  }

  /* x_sums += x times ones. As operand A the words of x stand for 16 rows: of one tile, its halves
  ** of the step. Of two tiles, the words of one are the even columns' lower features and of the
  ** other the odd columns' upper ones, which choose by where their ones are. */
  __device__ __forceinline__ void sum_x(const uint32_t (&b)[2][2 * tiles]) {
    const uint32_t one = as_bits(typename pair_of<T>::type{qm_as<T>(1.0f), qm_as<T>(1.0f)});
    if constexpr (tiles == 1) {
      const uint32_t a[4] = {b[0][0], b[0][1], b[1][0], b[1][1]};
      qm_mma<T>(x_sums, a, one, one);
    } else {
      qm_mma<T>(x_sums, b[0], g % 2 == 0 ? one : 0u, g % 2 == 1 ? one : 0u);
      qm_mma<T>(x_sums, b[1], g % 2 == 0 ? one : 0u, g % 2 == 1 ? one : 0u);
    }
  }

  __device__ __forceinline__ void stream() {
    for (int32_t at = slots;;) {
#pragma unroll
      for (int u = 0; u < ahead; u++) {
        const int32_t here = at + u * L::slot_bytes;
        qm_copy_wait<S::depth - 1>();
        multiply(u, here);
        load_words(u + S::depth, here);
        if (--group_steps > 0) continue;
        end_group();
        if (steps == 0) return;
        group_steps = (int32_t)((uint32_t)p.group_size / 32);
        begin_group();
      }
      at += ahead * L::slot_bytes;
      if (at == slots + L::ring_bytes) at = slots;
      left -= ahead;
#pragma unroll
      for (int b = 0; b < tiles; b++) x_rows[b] += 32 * ahead;
    }
  }

  __device__ __forceinline__ void run() {
    if (left > 0) {
#pragma unroll
      for (int u = 0; u < ahead; u++) load_x(u);
      stream();
    }
    __syncwarp(); /* all its lanes have read the ring */
    float *out = (float *)(memory + warp * L::ring_bytes) + 4 * g;
    put_sums<L>(out, t, sums);
    __syncthreads();
    finish<S, L>((const float *)memory, p, p.n);
  }
};

} /* namespace mpq_linear */

#endif
