/* scatter_add.cu - out[index[i]] += x[i], in the order of i: the same bits as the reference.
**
** Reference: kernels/reference/index.c.
** Method: positions are sorted by their index (stably, so that equal indices keep their order). A
** warp sums a run of equal indices for a slab of columns, row after row. Runs of more than LIMIT
** rows are a kernel of their own, which has many more rows on their way.
** Cost: reads x once, reads and writes the rows of out that are hit.
*/
#include <cub/device/device_radix_sort.cuh>

#include "pack.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, LIMIT = 32 };

/* Numbers out of range become v: last in the order, and left out. */
static __global__ void __launch_bounds__(THREADS)
    number(const int32_t *index, uint32_t *keys, int32_t *positions, int64_t r, int64_t v,
           qm_cuda_late *late) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= r) return;
  const int32_t key = index[i];
  keys[i] = qm_index_fits(late, QM_CUDA_OP_scatter_add, key, v) ? (uint32_t)key : (uint32_t)v;
  positions[i] = (int32_t)i;
}

struct sorted {
  const uint32_t *keys;
  const int32_t *positions;
  int64_t r, v, c;
};

/* N elements of x as they are. */
template <int N, typename T>
static __device__ __forceinline__ qm_words<N *(int)sizeof(T) / 4> read_words(const T *x, bool whole,
                                                                             int64_t left) {
  qm_words<N *(int)sizeof(T) / 4> words;
  if (whole) return *(const qm_words<N *(int)sizeof(T) / 4> *)x;
  T at[N];
#pragma unroll
  for (int i = 0; i < N; i++) at[i] = i < left ? x[i] : qm_as<T>(0.0f);
  memcpy(&words, at, sizeof words);
  return words;
}

/* Which of the BATCH positions from i on belong to the run of `key`, and where their rows are. */
template <int BATCH>
struct batch {
  static constexpr int WORDS = (BATCH + 31) / 32;
  int32_t positions[WORDS]; /* each lane's own */
  int count;
  __device__ __forceinline__ batch(const sorted &by, uint32_t key, int64_t i, int lane) {
    count = 0;
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
      const int64_t at = i + word * 32 + lane;
      const bool mine = word * 32 + lane < BATCH && at < by.r && by.keys[at] == key;
      positions[word] = mine ? by.positions[at] : 0;
      count += __popc(__ballot_sync(0xFFFFFFFFu, mine));
    }
  }
};

/* Add the run that begins at i, N columns to a lane, BATCH rows on their way at once. */
template <int N, int BATCH, typename T>
static __device__ __forceinline__ void add_run(const T *x, float *out, const sorted &by,
                                               uint32_t key, int64_t i, int64_t column, bool whole,
                                               int lane) {
  constexpr int WORDS = N * (int)sizeof(T) / 4;
  const int64_t left = by.c - column; /* lanes past the end read and write nothing */
  float sum[N];
  batch<BATCH> now(by, key, i, lane);
  qm_read<N>(out + key * by.c + column, whole && left > 0, left, sum);
  for (;;) {
    qm_words<WORDS> rows[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int64_t row = __shfl_sync(0xFFFFFFFFu, now.positions[j / 32], j % 32);
      if (j < now.count) rows[j] = read_words<N>(x + row * by.c + column, whole && left > 0, left);
    }
    const int count = now.count;
    i += BATCH;
    if (count == BATCH) now = batch<BATCH>(by, key, i, lane);
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      if (j >= count) break;
      float v[N];
      qm_unpack<T>(rows[j], v);
#pragma unroll
      for (int k = 0; k < N; k++) sum[k] += v[k];
    }
    if (count < BATCH || now.count == 0) break;
  }
  qm_write<N>(out + key * by.c + column, whole && left > 0, left, sum);
}

/* A warp to 32 * N columns and the runs that begin among `STARTS` positions, if they are `LONG` or
** not. */
template <int N, int BATCH, int STARTS, bool LONG, typename T>
static __global__ void __launch_bounds__(THREADS)
    add_runs(const T *x, float *out, sorted by, int64_t slabs, bool whole) {
  const int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = (int)threadIdx.x % 32;
  const int64_t column = (unit % slabs * 32 + lane) * N, first = unit / slabs * STARTS;
  const int64_t at = first + lane;
  bool begins = lane < STARTS && at < by.r;
  if (begins) {
    const uint32_t key = by.keys[at];
    begins = key < by.v && (at == 0 || by.keys[at - 1] != key) &&
             (at + LIMIT < by.r && by.keys[at + LIMIT] == key) == LONG;
  }
  for (uint32_t starts = __ballot_sync(0xFFFFFFFFu, begins); starts != 0; starts &= starts - 1) {
    const int64_t i = first + __ffs((int)starts) - 1;
    add_run<N, BATCH>(x, out, by, by.keys[i], i, column, whole, lane);
  }
}

template <int N, int BATCH, int STARTS, bool LONG, typename T>
static void launch(qm_cuda *cuda, const qm_scatter_add_args *args, const sorted &by) {
  const T *x = (const T *)args->x.data;
  float *out = (float *)args->out.data;
  const bool whole = by.c % N == 0 && qm_packs<N>(x) && qm_packs<N>(out);
  const int64_t slabs = qm_ceil_div(by.c, 32 * N), chunks = qm_ceil_div(by.r, STARTS);
  add_runs<N, BATCH, STARTS, LONG>
      <<<(unsigned)qm_ceil_div(chunks * slabs, WARPS), THREADS, 0, cuda->compute>>>(x, out, by,
                                                                                    slabs, whole);
}

/* Where the intermediate results lie in the workspace. */
struct places {
  uint32_t *keys[2];
  int32_t *positions[2];
  void *sort;
  size_t sort_bytes;
};

static int32_t take_workspace(qm_cuda *cuda, const qm_scatter_add_args *args, int end_bit,
                              places *at) {
  const cudaError_t error = cub::DeviceRadixSort::SortPairs(
      NULL, at->sort_bytes, at->keys[0], at->keys[1], at->positions[0], at->positions[1],
      (int32_t)args->r, 0, end_bit, cuda->compute);
  int32_t status = qm_cuda_check(error, "scatter_add");
  const int64_t list_bytes = qm_ceil_div(args->r * 4, 256) * 256;
  char *memory = NULL;
  if (status == QM_OK)
    status = qm_cuda_scratch(cuda, 4 * list_bytes + (int64_t)at->sort_bytes, (void **)&memory);
  if (status != QM_OK) return status;
  for (int i = 0; i < 2; i++) {
    at->keys[i] = (uint32_t *)(memory + i * list_bytes);
    at->positions[i] = (int32_t *)(memory + (2 + i) * list_bytes);
  }
  at->sort = memory + 4 * list_bytes;
  return QM_OK;
}

int32_t qm_cuda_scatter_add(void *context, const qm_scatter_add_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t r = args->r, c = args->c;
  if (r == 0 || c == 0) return QM_OK;
  if (r > INT32_MAX || args->v > INT32_MAX)
    return qm_cuda_host->fail(QM_E_UNSUPPORTED, "cuda: scatter_add of 2^31 rows or more");
  int end_bit = 1; /* of numbers up to v */
  while (args->v >> end_bit != 0) end_bit++;
  places at = {};
  int32_t status = take_workspace(cuda, args, end_bit, &at);
  if (status != QM_OK) return status;
  const cudaStream_t stream = cuda->compute;
  number<<<(unsigned)qm_ceil_div(r, THREADS), THREADS, 0, stream>>>(
      (const int32_t *)args->index.data, at.keys[0], at.positions[0], r, args->v,
      cuda->late_device);
  status = qm_cuda_check(cub::DeviceRadixSort::SortPairs(
                             at.sort, at.sort_bytes, at.keys[0], at.keys[1], at.positions[0],
                             at.positions[1], (int32_t)r, 0, end_bit, stream),
                         "scatter_add");
  if (status != QM_OK) return status;
  const sorted by = {at.keys[1], at.positions[1], r, args->v, c};
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    launch<2, sizeof(T) == 2 ? 64 : 32, 32, true, T>(cuda, args, by);
    launch<4, 8, 4, false, T>(cuda, args, by);
    return qm_cuda_launched(cuda, "scatter_add");
  });
}
