/* mpq_linear_row_launch.cuh - which products mpq_linear_row.cuh takes, and how it cuts them. */
#ifndef QM_MPQ_LINEAR_ROW_LAUNCH_CUH
#define QM_MPQ_LINEAR_ROW_LAUNCH_CUH

#include "mpq_linear_row.cuh"

namespace mpq_linear {

/* Describe `rows` rows of n columns for copies of 32 columns and box_rows rows; tile_halves: 16-bit
** pieces that 32 columns take, by which the copy engine counts whatever they are. */
static inline int32_t map_tiles(CUtensorMap *map, const void *data, int64_t rows, int64_t n,
                                int64_t tile_halves, int32_t box_rows) {
  qm_array x = {};
  x.data = (void *)data;
  x.dtype = QM_F16;
  return qm_map_rows(map, &x, rows, n / 32, tile_halves, n / 32 * tile_halves, (uint32_t)box_rows);
}

template <typename T, bool ASYM, int GROUPS>
static int32_t launch_row(qm_cuda *cuda, const task_group &tasks) {
  using L = row_layout<ASYM, GROUPS>;
  constexpr int SHARED_BYTES = 227 * 1024; /* of a block on sm_90 */
  const task &first = tasks.part[0];
  row_group group = {};
  group.count = tasks.count;
  for (int32_t i = 0; i < tasks.count; i++) {
    group.part[i].out = tasks.part[i].out;
    group.part[i].first_tile = group.tiles;
    group.tiles += (int32_t)tasks.part[i].n / L::columns;
  }
  /* Fewer tiles leave multiprocessors idle, where others split the sum. */
  if (group.tiles < cuda->multiprocessors * 3 / 4) return QM_E_UNSUPPORTED;
  group.x = first.x;
  group.units = (int32_t)(first.k / L::features);
  group.stages = (int32_t)qm_ceil_div(group.units, L::warps);
  group.grid_rows = L::scales_bytes / 64;
  for (int32_t size = L::features / GROUPS; size < first.group_size; size *= 2) {
    group.group_shift++;
    group.grid_rows = group.grid_rows > 1 ? group.grid_rows / 2 : 1;
  }
  group.bf16_scales = first.bf16_scales;
  group.zero_offset = first.zero_offset;

  const int64_t each = qm_ceil_div(group.tiles, cuda->multiprocessors);
  const int32_t tiles = (int32_t)(each < L::tiles_max ? each : L::tiles_max);
  const int32_t room = (SHARED_BYTES - L::bytes(0, group.stages, tiles)) / L::slot_bytes;
  const int32_t all = tiles * group.stages;
  group.slots = room < all ? room : all;
  /* Where x takes the room; who asks for stages counts on slots for all that are under way. */
  if (group.slots < L::under_way && group.slots < all) return QM_E_UNSUPPORTED;
  static bool prepared[64]; /* by device */
  const auto kernel = multiply_row<T, ASYM, GROUPS>;
  int32_t status = prepare(cuda, kernel, SHARED_BYTES, prepared);
  for (int32_t i = 0; i < tasks.count && status == QM_OK; i++) {
    const task &one = tasks.part[i];
    row_part *to = group.part + i;
    const int64_t groups = qm_ceil_div(one.k, one.group_size);
    status = map_tiles(&to->words, one.words, one.k / 8, one.n, 64, L::words_bytes / 128);
    if (status == QM_OK)
      status = map_tiles(&to->scales, one.scales, groups, one.n, 32, group.grid_rows);
    if (status == QM_OK)
      status = map_tiles(&to->zeros, one.zeros, groups, one.n, ASYM ? 8 : 32, group.grid_rows);
  }
  if (status != QM_OK) return status;
  qm_launch_early(cuda, kernel, dim3((unsigned)qm_ceil_div(group.tiles, tiles)), dim3(L::threads),
                  L::bytes(group.slots, group.stages, tiles), group);
  return qm_cuda_launched(cuda, "mpq_linear");
}

template <typename T, bool ASYM>
static int32_t launch_row(qm_cuda *cuda, const task_group &tasks) {
  switch (tasks.part[0].group_size) {
    case 32: return launch_row<T, ASYM, 4>(cuda, tasks);
    case 64: return launch_row<T, ASYM, 2>(cuda, tasks);
    default: return launch_row<T, ASYM, 1>(cuda, tasks);
  }
}

/* QM_E_UNSUPPORTED where the products are not of one kind, or not cut in whole units. */
template <typename T>
static int32_t launch_row(qm_cuda *cuda, const task_group &tasks) {
  const task &first = tasks.part[0];
  const int32_t size = first.group_size;
  if (first.k % 128 != 0 || size < 32 || (size & (size - 1)) != 0) return QM_E_UNSUPPORTED;
  for (int32_t i = 0; i < tasks.count; i++) {
    const task &one = tasks.part[i];
    if (one.n % 32 != 0 || one.group_size != size || one.asym != first.asym ||
        one.zero_offset != first.zero_offset || one.bf16_scales != first.bf16_scales ||
        !qm_aligned(one.scales, 16) || !qm_aligned(one.zeros, 16))
      return QM_E_UNSUPPORTED;
  }
  return first.asym ? launch_row<T, true>(cuda, tasks) : launch_row<T, false>(cuda, tasks);
}

} /* namespace mpq_linear */

#endif
