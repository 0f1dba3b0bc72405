/* permute.cu - dimensions in another order. Reference: kernels/reference/index.c.
**
** Rows that stay rows are copied in the widest words. Else the last dimension and the one that x
** walks with stride 1 are exchanged tile by tile through shared memory, two-byte elements in pairs.
*/
#include "dtype.h"
#include "pack.cuh"

enum { THREADS = 256, TILE = 32, PAIRS = 64 };

struct layout {
  int64_t shape[QM_DIMS_MAX], stride[QM_DIMS_MAX]; /* of out; of x, in words */
};

/* Offset in x of the element of out that has this flat index. */
template <typename Index>
static __device__ __forceinline__ int64_t offset(const layout &at, Index rest) {
  int64_t sum = 0;
  for (int dim = QM_DIMS_MAX - 1; dim >= 0; dim--) {
    if (at.shape[dim] == 1) continue;
    const Index next = rest / (Index)at.shape[dim];
    sum += (int64_t)(rest - next * (Index)at.shape[dim]) * at.stride[dim];
    rest = next;
  }
  return sum;
}

/* Index is 32 bits wide where that is enough: divisions cost less. */
template <typename Word, typename Index>
static __global__ void __launch_bounds__(THREADS)
    rows(const Word *x, Word *out, layout at, int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < count) out[i] = x[offset(at, (Index)i)];
}

/* What the kernels of tiles do: out[batch, i, j] = x[batch, j, i], batch two dimensions. Counts and
** strides in elements. */
struct exchange {
  int64_t i, j, batch_1, tiles_i, tiles_j;
  int64_t x_0, x_1, x_j, out_0, out_1, out_i;
};

/* Where this block's batch and tile begin. */
struct place {
  int64_t i, j, x, out;
  __device__ __forceinline__ place(const exchange &at, int side) {
    j = blockIdx.x % at.tiles_j * side;
    i = blockIdx.x / at.tiles_j % at.tiles_i * side;
    const int64_t batch = blockIdx.x / at.tiles_j / at.tiles_i;
    const int64_t b0 = batch / at.batch_1, b1 = batch % at.batch_1;
    x = b0 * at.x_0 + b1 * at.x_1;
    out = b0 * at.out_0 + b1 * at.out_1;
  }
};

template <typename Word>
static __global__ void __launch_bounds__(THREADS) tiles(const Word *x, Word *out, exchange at) {
  __shared__ Word tile[TILE][TILE + 1];
  const place here(at, TILE);
  const int lane = (int)threadIdx.x % TILE, warp = (int)threadIdx.x / TILE;
#pragma unroll
  for (int row = warp; row < TILE; row += THREADS / TILE) {
    const int64_t i = here.i + lane, j = here.j + row;
    if (i < at.i && j < at.j) tile[row][lane] = x[here.x + j * at.x_j + i];
  }
  __syncthreads();
#pragma unroll
  for (int row = warp; row < TILE; row += THREADS / TILE) {
    const int64_t i = here.i + row, j = here.j + lane;
    if (i < at.i && j < at.j) out[here.out + i * at.out_i + j] = tile[lane][row];
  }
}

/* Elements of two bytes, pairs of them to an access; every count and stride is even. */
static __global__ void __launch_bounds__(THREADS)
    tiles_of_pairs(const uint32_t *x, uint32_t *out, exchange at) {
  /* Row r begins at 32 r + r / 2: then neither rows nor every second row meet in a bank. */
  __shared__ uint32_t tile[PAIRS * TILE + TILE];
  const place here(at, PAIRS);
  const int lane = (int)threadIdx.x % TILE, warp = (int)threadIdx.x / TILE;
#pragma unroll
  for (int row = warp; row < PAIRS; row += THREADS / TILE) {
    const int64_t i = here.i + 2 * lane, j = here.j + row;
    if (i < at.i && j < at.j) tile[row * TILE + row / 2 + lane] = x[(here.x + j * at.x_j + i) / 2];
  }
  __syncthreads();
#pragma unroll
  for (int row = warp; row < TILE; row += THREADS / TILE) {
    const int64_t i = here.i + 2 * row, j = here.j + 2 * lane;
    const uint32_t first = tile[2 * lane * TILE + lane + row];
    const uint32_t second = tile[(2 * lane + 1) * TILE + lane + row];
    if (i >= at.i || j >= at.j) continue;
    const int64_t to = here.out + i * at.out_i + j;
    out[to / 2] = __byte_perm(first, second, 0x5410);
    out[(to + at.out_i) / 2] = __byte_perm(first, second, 0x7632);
  }
}

/* Join dimensions that stay neighbours, moving them to the right; returns the first that is
** used. */
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

/* at, whose last dimension does not have stride 1 in x, as an exchange. */
static exchange make_exchange(const layout &at, int first) {
  int64_t out_stride[QM_DIMS_MAX] = {0, 0, 0, 1};
  for (int dim = QM_DIMS_MAX - 2; dim >= 0; dim--)
    out_stride[dim] = out_stride[dim + 1] * at.shape[dim + 1];
  int unit = first; /* the dimension that x walks with stride 1 */
  while (at.stride[unit] != 1) unit++;
  const int batch_0 = unit == 0 ? 1 : 0, batch_1 = unit <= 1 ? 2 : 1;
  exchange to = {};
  to.i = at.shape[unit];
  to.j = at.shape[3];
  to.batch_1 = at.shape[batch_1];
  to.x_0 = at.stride[batch_0];
  to.x_1 = at.stride[batch_1];
  to.x_j = at.stride[3];
  to.out_0 = out_stride[batch_0];
  to.out_1 = out_stride[batch_1];
  to.out_i = out_stride[unit];
  return to;
}

static unsigned cut_tiles(exchange *at, int side, int64_t count) {
  at->tiles_i = qm_ceil_div(at->i, side);
  at->tiles_j = qm_ceil_div(at->j, side);
  return (unsigned)(at->tiles_i * at->tiles_j * (count / (at->i * at->j)));
}

template <typename Word>
static int32_t launch_tiles(qm_cuda *cuda, const qm_permute_args *args, exchange at) {
  const void *x = args->x.data;
  void *out = args->out.data;
  const bool pairs =
      sizeof(Word) == 2 && at.i >= 8 && at.j >= 8 && qm_aligned(x, 4) && qm_aligned(out, 4) &&
      (at.i | at.j | at.x_0 | at.x_1 | at.x_j | at.out_0 | at.out_1 | at.out_i) % 2 == 0;
  const unsigned blocks = cut_tiles(&at, pairs ? PAIRS : TILE, args->out.count);
  if (pairs)
    tiles_of_pairs<<<blocks, THREADS, 0, cuda->compute>>>((const uint32_t *)x, (uint32_t *)out, at);
  else
    tiles<Word><<<blocks, THREADS, 0, cuda->compute>>>((const Word *)x, (Word *)out, at);
  return qm_cuda_launched(cuda, "permute");
}

template <typename Word>
static int32_t launch_rows(qm_cuda *cuda, const qm_permute_args *args, layout at, int64_t scale) {
  at.shape[QM_DIMS_MAX - 1] /= scale;
  for (int dim = 0; dim < QM_DIMS_MAX - 1; dim++) at.stride[dim] /= scale;
  const int64_t count = args->out.count / scale;
  const auto kernel = count < INT32_MAX ? rows<Word, uint32_t> : rows<Word, int64_t>;
  kernel<<<(unsigned)qm_ceil_div(count, THREADS), THREADS, 0, cuda->compute>>>(
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
  const exchange tiled = make_exchange(at, first);
  switch (size) {
    case 8: return launch_tiles<uint64_t>(cuda, args, tiled);
    case 4: return launch_tiles<uint32_t>(cuda, args, tiled);
    case 2: return launch_tiles<uint16_t>(cuda, args, tiled);
    default: return launch_tiles<uint8_t>(cuda, args, tiled);
  }
}
