/* permute.cu - dimensions in another order. Rows that stay rows are copied in the widest words;
** else the
** last dimension and the one that x walks with stride 1 go through a tile in shared memory. */
#include "dtype.h"
#include "pack.cuh"

enum { THREADS = 256, TILE = 32 };

struct layout {
  int64_t shape[QM_DIMS_MAX], stride[QM_DIMS_MAX]; /* of out; of x, in words */
};

/* Offset in x of the element of out that has this flat index in dimensions 0 .. last. */
static __device__ __forceinline__ int64_t offset(const layout &at, int64_t rest, int last) {
  int64_t sum = 0;
  for (int dim = last; dim >= 0; dim--) {
    if (at.shape[dim] == 1) continue;
    const int64_t next = rest / at.shape[dim];
    sum += (rest - next * at.shape[dim]) * at.stride[dim];
    rest = next;
  }
  return sum;
}

template <typename Word>
static __global__ void __launch_bounds__(THREADS)
    rows(const Word *x, Word *out, layout at, int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < count) out[i] = x[offset(at, i, QM_DIMS_MAX - 1)];
}

/* out[batch, i, j] = x[batch, j, i]: dimension 2 of `at` has stride 1 in x, dimension 3 is out's
** last. */
template <typename Word>
static __global__ void __launch_bounds__(THREADS)
    tiles(const Word *x, Word *out, layout at, int64_t tiles_i, int64_t tiles_j, int64_t out_i,
          int64_t out_0, int64_t out_1) {
  __shared__ Word tile[TILE][TILE + 1];
  const int lane = (int)threadIdx.x % TILE, warp = (int)threadIdx.x / TILE;
  const int64_t first_j = blockIdx.x % tiles_j * TILE;
  const int64_t first_i = blockIdx.x / tiles_j % tiles_i * TILE;
  const int64_t batch = blockIdx.x / tiles_j / tiles_i;
  const int64_t b0 = batch / at.shape[1], b1 = batch % at.shape[1];
  x += b0 * at.stride[0] + b1 * at.stride[1];
  out += b0 * out_0 + b1 * out_1;
  for (int row = warp; row < TILE; row += THREADS / TILE) {
    const int64_t i = first_i + lane, j = first_j + row;
    if (i < at.shape[2] && j < at.shape[3]) tile[row][lane] = x[j * at.stride[3] + i];
  }
  __syncthreads();
  for (int row = warp; row < TILE; row += THREADS / TILE) {
    const int64_t i = first_i + row, j = first_j + lane;
    if (i < at.shape[2] && j < at.shape[3]) out[i * out_i + j] = tile[lane][row];
  }
}

/* Join dimensions that stay neighbours, moving them to the right; returns the first that is used.
** */
static int join(const qm_permute_args *args, layout *at) {
  *at = {{1, 1, 1, 1}, {0, 0, 0, 0}};
  int to = QM_DIMS_MAX;
  for (int dim = QM_DIMS_MAX - 1; dim >= 0; dim--) {
    if (args->shape[dim] == 1) continue;
    if (to < QM_DIMS_MAX && args->stride_x[dim] == at->stride[to] * at->shape[to]) {
      at->shape[to] *= args->shape[dim];
      continue;
    }
    to--;
    at->shape[to] = args->shape[dim];
    at->stride[to] = args->stride_x[dim];
  }
  if (to == QM_DIMS_MAX) at->stride[QM_DIMS_MAX - 1] = 1; /* one element */
  return to;
}

template <typename Word>
static int32_t launch_tiles(qm_cuda *cuda, const qm_permute_args *args, layout at, int first) {
  int64_t out_stride[QM_DIMS_MAX] = {0, 0, 0, 1};
  for (int dim = QM_DIMS_MAX - 2; dim >= 0; dim--)
    out_stride[dim] = out_stride[dim + 1] * at.shape[dim + 1];
  int unit = first; /* which dimension x walks with stride 1 */
  while (at.stride[unit] != 1) unit++;
  layout order = at; /* that one goes to place 2 */
  for (int dim = unit; dim < 2; dim++) {
    order.shape[dim] = at.shape[dim + 1];
    order.stride[dim] = at.stride[dim + 1];
  }
  int64_t steps[2] = {out_stride[unit == 0 ? 1 : 0], out_stride[unit <= 1 ? 2 : 1]};
  order.shape[2] = at.shape[unit];
  order.stride[2] = 1;
  const int64_t tiles_i = qm_ceil_div(order.shape[2], TILE);
  const int64_t tiles_j = qm_ceil_div(order.shape[3], TILE);
  const int64_t blocks = tiles_i * tiles_j * order.shape[0] * order.shape[1];
  tiles<Word><<<(unsigned)blocks, THREADS, 0, cuda->compute>>>(
      (const Word *)args->x.data, (Word *)args->out.data, order, tiles_i, tiles_j, out_stride[unit],
      steps[0], steps[1]);
  return qm_cuda_launched(cuda, "permute");
}

template <typename Word>
static int32_t launch_rows(qm_cuda *cuda, const qm_permute_args *args, layout at, int64_t scale) {
  at.shape[QM_DIMS_MAX - 1] /= scale;
  for (int dim = 0; dim < QM_DIMS_MAX - 1; dim++) at.stride[dim] /= scale;
  const int64_t count = args->out.count / scale;
  rows<Word><<<(unsigned)qm_ceil_div(count, THREADS), THREADS, 0, cuda->compute>>>(
      (const Word *)args->x.data, (Word *)args->out.data, at, count);
  return qm_cuda_launched(cuda, "permute");
}

int32_t qm_cuda_permute(void *context, const qm_permute_args *args) {
  QM_CUDA_ENTER(context);
  if (args->out.count == 0) return QM_OK;
  layout at;
  const int first = join(args, &at);
  const int64_t size = qm_element_size(args->x.dtype);
  if (at.stride[QM_DIMS_MAX - 1] == 1) {
    int64_t word = 16; /* the widest that divides rows, steps and addresses */
    const auto divides = [&](int64_t bytes) {
      bool all = qm_aligned(args->x.data, bytes) && qm_aligned(args->out.data, bytes) &&
                 at.shape[QM_DIMS_MAX - 1] * size % bytes == 0;
      for (int dim = 0; dim < QM_DIMS_MAX - 1; dim++)
        all = all && at.stride[dim] * size % bytes == 0;
      return all;
    };
    while (word > size && !divides(word)) word /= 2;
    switch (word) {
      case 16: return launch_rows<uint4>(cuda, args, at, 16 / size);
      case 8: return launch_rows<uint2>(cuda, args, at, 8 / size);
      case 4: return launch_rows<uint32_t>(cuda, args, at, 4 / size);
      case 2: return launch_rows<uint16_t>(cuda, args, at, 2 / size);
      default: return launch_rows<uint8_t>(cuda, args, at, 1);
    }
  }
  switch (size) {
    case 8: return launch_tiles<uint64_t>(cuda, args, at, first);
    case 4: return launch_tiles<uint32_t>(cuda, args, at, first);
    case 2: return launch_tiles<uint16_t>(cuda, args, at, first);
    default: return launch_tiles<uint8_t>(cuda, args, at, first);
  }
}
