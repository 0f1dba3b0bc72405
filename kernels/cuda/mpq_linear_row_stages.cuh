/* mpq_linear_row_stages.cuh - what passes through shared memory in mpq_linear_row.cuh, and who asks
** for it. */
#ifndef QM_MPQ_LINEAR_ROW_STAGES_CUH
#define QM_MPQ_LINEAR_ROW_STAGES_CUH

#include "attention_wgmma.cuh"
#include "mpq_linear.cuh"

namespace mpq_linear {

/* Products of the same x, whose grids are of one kind, side by side in one range of tiles. */
struct row_part {
  CUtensorMap words, scales, zeros;
  void *out;
  int32_t first_tile;
};
struct row_group {
  row_part part[QM_MPQ_GROUP_MAX];
  const void *x;
  int32_t count, tiles, units, stages; /* units of 128 features, and stages, of a tile */
  int32_t group_shift;                 /* 2^so many of a unit's groups share a scale */
  int32_t grid_rows;                   /* scales of a column in a stage */
  int32_t slots;                       /* for stages, in shared memory */
  int32_t bf16_scales, zero_offset;
};

/* Of a group's x in fixed point: the sum of the upper two digits or of the last one, and what makes
** 16 times such a sum a number. */
struct row_sum {
  int32_t sum;
  float unit;
};

/* GROUPS: of a unit, each with a scale. */
template <bool ASYM, int GROUPS>
struct row_layout {
  static constexpr int warps = 16, threads = 32 * (warps + 1), columns = 32, features = 128;
  static constexpr int tiles_max = 8; /* of a block */
  static constexpr int under_way = 2; /* stages that have been asked for and are not there */
  static constexpr int words_bytes = warps * 16 * 128, scales_bytes = warps * GROUPS * 64;
  static constexpr int zero_bytes = ASYM ? 16 : 64, zeros_bytes = warps * GROUPS * zero_bytes;
  static constexpr int slot_bytes = words_bytes + scales_bytes + zeros_bytes + 2 * 8;
  static constexpr int sums_bytes = warps * columns * 4; /* of a tile */
  static constexpr int digits = 3, x_bytes = features * digits;
  static constexpr int unit_bytes = x_bytes + GROUPS * 2 * (int)sizeof(row_sum);

  /* x is laid out by two stages. */
  static constexpr __host__ __device__ int32_t x_stages(int32_t stages) {
    return (stages + 1) / 2 * 2;
  }
  /* Behind what aligns them: words, scales, zeros, barriers, x, its sums, the warps' sums. */
  static constexpr int bytes(int32_t slots, int32_t stages, int32_t tiles) {
    return 1024 + slots * slot_bytes + x_stages(stages) * warps * unit_bytes + tiles * sums_bytes;
  }
};

/* Addresses of shared memory. */
template <typename L>
struct row_memory {
  uint32_t words, scales, zeros, full, empty;
  char *x;
  __device__ __forceinline__ row_memory(char *memory, int32_t slots) {
    words = qm_shared(memory);
    scales = words + slots * L::words_bytes;
    zeros = scales + slots * L::scales_bytes;
    full = zeros + slots * L::zeros_bytes;
    empty = full + slots * 8;
    x = memory + slots * L::slot_bytes;
  }
};

#ifdef QM_HAS_WGMMA_HERE
static __device__ __forceinline__ int32_t part_at(const row_group &p, int32_t tile, int32_t from) {
  while (from + 1 < p.count && tile >= p.part[from + 1].first_tile) from++;
  return from;
}

/* One thread asks for all the block's stages, as slots become free. */
template <typename L>
static __device__ __forceinline__ void ask_for_stages(const row_group &p, const row_memory<L> &at) {
  int32_t slot = 0, round = 0, part = 0;
  int32_t awaited = -L::under_way, awaited_round = 0; /* the slot of the stage asked for then */
  const uint32_t grid_row_bytes = 64 + (uint32_t)L::zero_bytes;
  const uint32_t bytes = L::words_bytes + (uint32_t)p.grid_rows * grid_row_bytes;
  for (int32_t tile = (int32_t)blockIdx.x; tile < p.tiles; tile += (int32_t)gridDim.x) {
    part = part_at(p, tile, part);
    const row_part &of = p.part[part];
    for (int32_t stage = 0; stage < p.stages; stage++) {
      const uint32_t barrier = at.full + slot * 8;
      if (round > 0) qm_barrier_wait(at.empty + slot * 8, (uint32_t)(round - 1) & 1u);
      if (awaited >= 0) qm_barrier_wait(at.full + awaited * 8, (uint32_t)awaited_round & 1u);
      if (++awaited == p.slots) {
        awaited = 0;
        awaited_round++;
      }
      qm_barrier_expect(barrier, bytes);
      const int32_t column = tile - of.first_tile;
      const int32_t grid_row = stage * (L::scales_bytes / 64) >> p.group_shift;
      qm_copy_tile_once(at.words + slot * L::words_bytes, &of.words, 0, column,
                        stage * (L::words_bytes / 128), barrier);
      qm_copy_tile_once(at.scales + slot * L::scales_bytes, &of.scales, 0, column, grid_row,
                        barrier);
      qm_copy_tile_once(at.zeros + slot * L::zeros_bytes, &of.zeros, 0, column, grid_row, barrier);
      if (++slot < p.slots) continue;
      slot = 0;
      round++;
    }
  }
}
#endif

} /* namespace mpq_linear */

#endif
