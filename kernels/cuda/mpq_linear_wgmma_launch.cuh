/* mpq_linear_wgmma_launch.cuh - how the sums of mpq_linear_wgmma.cuh are split over blocks. */
#ifndef QM_MPQ_LINEAR_WGMMA_LAUNCH_CUH
#define QM_MPQ_LINEAR_WGMMA_LAUNCH_CUH

#include "mpq_linear_wgmma.cuh"

namespace mpq_linear {

/* The sums of all splits, four by four. */
template <typename T>
static __global__ __launch_bounds__(256) void add_splits(task p, int32_t splits) {
  qm_take_turn();
  const int64_t fours = p.rows * p.n / 4, at = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (at >= fours) return;
  const float4 *const part = (const float4 *)p.partial + at;
  float4 sum = __ldcg(part);
#pragma unroll 4
  for (int32_t i = 1; i < splits; i++) add(sum, __ldcg(part + i * fours));
  store_rounded<T>(p.out, 4 * at, sum);
}

/* The largest cluster of which the device holds so many at once. */
template <typename Kernel>
static int64_t largest_cluster(const qm_cuda *cuda, Kernel kernel, int64_t clusters, int64_t most) {
  static int32_t held[64][hopper::cluster_max + 1]; /* by device and size; 0: not asked yet */
  int64_t size = most < hopper::cluster_max ? most : hopper::cluster_max;
  for (; size > 1; size--) {
    int32_t &count = held[cuda->index % 64][size];
    if (count == 0) {
      cudaLaunchAttribute cluster = {};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {1, (unsigned)size, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(1, (unsigned)size);
      config.blockDim = dim3(hopper::threads);
      config.dynamicSmemBytes = hopper::bytes;
      config.attrs = &cluster;
      config.numAttrs = 1;
      if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
        count = -1;
        cudaGetLastError(); /* no launch's */
      }
    }
    if (count >= clusters) break;
  }
  return size;
}

/* How a sum of `steps` is split: over a cluster, or over more blocks, whose sums want a kernel
** behind them. That is worth its time (3 us on an H200) where each block then has 12 steps less. */
struct hopper_cut {
  int64_t splits, spans;
  bool in_cluster;
};
template <typename Kernel>
static hopper_cut cut_sum(const qm_cuda *cuda, Kernel kernel, int64_t tiles, int64_t steps) {
  const int64_t room = cuda->multiprocessors / tiles, most = qm_ceil_div(steps, 8);
  const int64_t blocks = room < 1 ? 1 : room < most ? room : most;
  const int64_t cluster = largest_cluster(cuda, kernel, tiles, blocks);
  const int64_t tiles_of_x = qm_ceil_div(steps, 2); /* a split takes whole ones */
  const int64_t by_cluster = 2 * qm_ceil_div(tiles_of_x, cluster);
  const int64_t by_blocks = 2 * qm_ceil_div(tiles_of_x, blocks);
  const bool in_cluster = by_cluster - by_blocks < 12;
  const int64_t spans = in_cluster ? by_cluster : by_blocks;
  return {qm_ceil_div(steps, spans), spans, in_cluster};
}

template <typename T, bool ASYM, int STEPS>
static int32_t launch_hopper(qm_cuda *cuda, task p) {
  using L = hopper;
  static bool prepared[64]; /* by device */
  const auto kernel = multiply_hopper<T, ASYM, STEPS>;
  int32_t status = prepare(cuda, kernel, L::bytes, prepared);
  if (status != QM_OK) return status;
  const int64_t tiles = qm_ceil_div(p.n, L::columns), steps = p.k / L::step;
  const int64_t x_tiles = qm_ceil_div(p.k, L::tile), x_bytes = x_tiles * L::tile_bytes;
  const int64_t outputs = p.rows * p.n;
  const hopper_cut cut = cut_sum(cuda, kernel, tiles, steps);
  const int64_t partials = cut.in_cluster ? 0 : cut.splits * outputs;
  char *x;
  status = qm_cuda_scratch(cuda, x_bytes + partials * (int64_t)sizeof(float), (void **)&x);
  if (status != QM_OK) return status;
  p.spans = (int32_t)cut.spans;
  if (!cut.in_cluster) p.partial = (float *)(x + x_bytes);
  qm_launch_early(cuda, lay_out_x, dim3((unsigned)x_tiles), dim3(2 * L::rows), 0, p, x);
  qm_launch_clusters(cuda, kernel, cut.in_cluster ? (unsigned)cut.splits : 1u,
                     dim3((unsigned)tiles, (unsigned)cut.splits), dim3(L::threads), L::bytes, p, x);
  if (!cut.in_cluster)
    qm_launch_early(cuda, add_splits<T>, dim3((unsigned)qm_ceil_div(outputs, 4 * 256)), dim3(256),
                    0, p, (int32_t)cut.splits);
  return qm_cuda_launched(cuda, "mpq_linear");
}
template <typename T>
static int32_t launch_hopper(qm_cuda *cuda, const task &p) {
  const bool wide = p.group_size % 64 == 0;
  if (p.asym) return wide ? launch_hopper<T, true, 2>(cuda, p) : launch_hopper<T, true, 1>(cuda, p);
  return wide ? launch_hopper<T, false, 2>(cuda, p) : launch_hopper<T, false, 1>(cuda, p);
}

} /* namespace mpq_linear */

#endif
