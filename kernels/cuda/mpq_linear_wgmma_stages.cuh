/* mpq_linear_wgmma_stages.cuh - what passes through shared memory in mpq_linear_wgmma.cuh, and who
** brings it: tiles of x, as lay_out_x makes them, and rows of W's words.
*/
#ifndef QM_MPQ_LINEAR_WGMMA_STAGES_CUH
#define QM_MPQ_LINEAR_WGMMA_STAGES_CUH

#include "attention_wgmma.cuh"
#include "mpq_linear.cuh"

namespace mpq_linear {

struct hopper {
  static constexpr int groups = 4, consumers = 128 * groups, fetchers = 4, rows = 64;
  static constexpr int threads = consumers + 32 * fetchers;
  static constexpr int registers = 112, registers_left = 32;
  static constexpr int columns = 64 * groups, step = 32, tile = 64; /* features */
  /* A stage has a tile of x and 8 word rows, of which four must not share banks. */
  static constexpr int tile_bytes = rows * tile * 2, word_row = columns * 4 + 32;
  static constexpr int stage_bytes = (tile_bytes + tile / 8 * word_row + 1023) / 1024 * 1024;
  static constexpr int stages = 12, bytes = stages * stage_bytes + 1024;
  static constexpr int cluster_max = 8; /* on any device */
  static_assert(rows * columns * 4 <= bytes, "sums of a split lie in the stages' place");
};

/* Tile blockIdx.x of x, 64 rows of 64 features; what x lacks is zeros. A thread has half a row, 4
** octets of features. */
static __global__ __launch_bounds__(2 * hopper::rows) void lay_out_x(task p, char *out) {
  using L = hopper;
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

/* A stage by addresses of shared memory, of one that both sides take by turns. */
struct hopper_turn {
  uint32_t at, full; /* the stage, and the barrier of what has come */
  uint32_t phase = 0;
  int32_t left = hopper::stages;                           /* of this round */
  static constexpr uint32_t to_empty = 8 * hopper::stages; /* from `full` to that of its end */

  __device__ __forceinline__ hopper_turn(const char *stages, const uint64_t *barriers)
      : at(qm_shared(stages)), full(qm_shared(barriers)) {}
  __device__ __forceinline__ void next() {
    at += hopper::stage_bytes;
    full += 8;
    if (--left > 0) return;
    at -= hopper::stages * hopper::stage_bytes;
    full -= 8 * hopper::stages;
    left = hopper::stages;
    phase ^= 1;
  }
};

/* Each of four warps brings every fourth word row and a quarter of x's tile, as starting a copy
** takes its time: codes of the first stages before x is there. */
template <int STEPS>
struct hopper_fetch {
  using L = hopper;
  static constexpr uint32_t x_bytes = L::tile_bytes / L::fetchers;
  const task &p;
  const int32_t me; /* of the fetchers */
  const uint32_t *words;
  const char *x;
  uint32_t row_bytes; /* of the block's columns */
  int32_t steps;      /* to ask codes for */

  __device__ __forceinline__ hopper_fetch(const task &task_, const char *tiles, int32_t warp,
                                          int32_t first, int32_t steps_)
      : p(task_), me(warp), steps(steps_) {
    const int32_t column = (int32_t)blockIdx.x * L::columns;
    words = p.words + (int64_t)(first * 4 + me) * p.n + column;
    x = tiles + first / 2 * (int64_t)L::tile_bytes + me * x_bytes;
    row_bytes = (uint32_t)min(L::columns, (int32_t)p.n - column) * 4;
  }
  __device__ __forceinline__ void fetch_words(const hopper_turn &turn) {
    const uint32_t to = turn.at + L::tile_bytes + me * L::word_row;
    const bool two = STEPS == 2 && steps > 1;
    if (qm_elected()) {
      qm_barrier_expect(turn.full, x_bytes + (two ? 2 : 1) * row_bytes);
      qm_copy_bulk(to, words, row_bytes, turn.full);
      if (two) qm_copy_bulk(to + 4 * L::word_row, words + 4 * p.n, row_bytes, turn.full);
    }
    words += STEPS * 4 * p.n;
    steps -= STEPS;
  }
  __device__ __forceinline__ void fetch_x(const hopper_turn &turn, int32_t unit) {
    if (qm_elected()) qm_copy_bulk(turn.at + me * x_bytes, x, x_bytes, turn.full);
    if (STEPS == 2 || unit % 2 == 1) x += L::tile_bytes; /* splits are whole tiles */
  }
  __device__ __forceinline__ void run(const hopper_turn &first) {
    const int32_t units = (steps + STEPS - 1) / STEPS, ahead = min(units, L::stages);
    hopper_turn turn = first;
#pragma unroll 1
    for (int32_t unit = 0; unit < ahead; unit++, turn.next()) fetch_words(turn);
    qm_await_previous();
    turn = first;
#pragma unroll 1
    for (int32_t unit = 0; unit < ahead; unit++, turn.next()) fetch_x(turn, unit);
    turn.phase = 0;
#pragma unroll 1
    for (int32_t unit = ahead; unit < units; unit++, turn.next()) {
      qm_barrier_wait(turn.full + turn.to_empty, turn.phase);
      fetch_words(turn);
      fetch_x(turn, unit);
    }
  }
};

} /* namespace mpq_linear */

#endif
