/* scatter_add.cu - out[index[i]] += x[i], the same bits whatever the timing.
**
** Reference: kernels/reference/index.c; sums of more than CHUNK rows associate otherwise.
** Method: positions are sorted by their index (stably, so that equal indices keep their order) and
** cut
** into chunks of CHUNK. A warp walks a chunk and a slab of columns. The rows of a run of equal
** indices
** are summed in order; a run inside the chunk goes to out at once. Of a run that crosses chunks
** each
** chunk leaves its part in `parts`, and the warp of the chunk where it begins joins them in order.
** Cost: reads x once, reads and writes the rows of out that are hit.
*/
#include <cub/device/device_radix_sort.cuh>

#include "pack.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, CHUNK = 32 };

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
  float *parts; /* [chunks, 2, c]: of the run that began before, of the run that goes on */
};

/* Sum runs chunk by chunk; a warp to a chunk and 32 * N columns. */
template <int N, typename T>
static __global__ void __launch_bounds__(THREADS)
    sum_chunks(const T *x, float *out, sorted by, int64_t slabs, bool whole) {
  const int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int64_t chunk = unit / slabs, first = chunk * CHUNK;
  const int64_t column = (unit % slabs * 32 + threadIdx.x % 32) * N, left = by.c - column;
  if (first >= by.r || left <= 0) return;
  const int64_t end = first + CHUNK < by.r ? first + CHUNK : by.r;
  const bool continued = first > 0 && by.keys[first - 1] == by.keys[first];
  bool from_before = continued;
  float sum[N] = {};
  uint32_t key = by.keys[first];
  if (!continued && key < by.v) qm_read<N>(out + key * by.c + column, whole, left, sum);
  for (int64_t i = first; i < end; i++) {
    float v[N];
    if (key >= by.v) return; /* only such keys follow */
    qm_read<N>(x + by.positions[i] * by.c + column, whole, left, v);
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] += v[j];
    const uint32_t next = i + 1 < by.r ? by.keys[i + 1] : (uint32_t)by.v;
    if (next == key && i + 1 < end) continue;
    float *to = out + key * by.c + column;
    if (from_before)
      to = by.parts + (2 * chunk) * by.c + column;
    else if (next == key)
      to = by.parts + (2 * chunk + 1) * by.c + column;
    qm_write<N>(to, whole, left, sum);
    from_before = false;
    key = next;
    if (key < by.v && i + 1 < end) {
      qm_read<N>(out + key * by.c + column, whole, left, sum);
    }
  }
}

/* Join the parts of the run that begins in this chunk and goes on behind it. */
template <int N>
static __global__ void __launch_bounds__(THREADS)
    join_parts(float *out, sorted by, int64_t slabs, bool whole) {
  const int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int64_t chunk = unit / slabs, last = chunk * CHUNK + CHUNK - 1;
  const int64_t column = (unit % slabs * 32 + threadIdx.x % 32) * N, left = by.c - column;
  if (last + 1 >= by.r || left <= 0) return;
  const uint32_t key = by.keys[last];
  if (key >= by.v || by.keys[last + 1] != key) return;
  const int64_t first = chunk * CHUNK;
  if (first > 0 && by.keys[first] == key && by.keys[first - 1] == key) return; /* began before */
  float sum[N];
  qm_read<N>(by.parts + (2 * chunk + 1) * by.c + column, whole, left, sum);
  for (int64_t i = last + 1; i < by.r && by.keys[i] == key; i += CHUNK) {
    float v[N];
    qm_read<N>(by.parts + 2 * (i / CHUNK) * by.c + column, whole, left, v);
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] += v[j];
  }
  qm_write<N>(out + key * by.c + column, whole, left, sum);
}

/* Where the intermediate results lie in the workspace. */
struct places {
  uint32_t *keys[2];
  int32_t *positions[2];
  float *parts;
  void *sort;
  size_t sort_bytes;
};

static int32_t take_workspace(qm_cuda *cuda, const qm_scatter_add_args *args, int64_t chunks,
                              int end_bit, places *at) {
  const int32_t r = (int32_t)args->r;
  const cudaError_t error = cub::DeviceRadixSort::SortPairs(
      NULL, at->sort_bytes, at->keys[0], at->keys[1], at->positions[0], at->positions[1], r, 0,
      end_bit, cuda->compute);
  int32_t status = qm_cuda_check(error, "scatter_add");
  const int64_t list_bytes = qm_ceil_div(args->r * 4, 256) * 256;
  const int64_t parts_bytes = qm_ceil_div(2 * chunks * args->c * 4, 256) * 256;
  char *memory = NULL;
  if (status == QM_OK)
    status = qm_cuda_scratch(cuda, 4 * list_bytes + parts_bytes + (int64_t)at->sort_bytes,
                             (void **)&memory);
  if (status != QM_OK) return status;
  for (int i = 0; i < 2; i++) {
    at->keys[i] = (uint32_t *)(memory + i * list_bytes);
    at->positions[i] = (int32_t *)(memory + (2 + i) * list_bytes);
  }
  at->parts = (float *)(memory + 4 * list_bytes);
  at->sort = memory + 4 * list_bytes + parts_bytes;
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
  const int64_t chunks = qm_ceil_div(r, CHUNK);
  places at = {};
  int32_t status = take_workspace(cuda, args, chunks, end_bit, &at);
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
  const sorted by = {at.keys[1], at.positions[1], r, args->v, c, at.parts};
  float *out = (float *)args->out.data;
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = 4;
    const T *x = (const T *)args->x.data;
    const bool whole = c % N == 0 && qm_packs<N>(x) && qm_packs<N>(out);
    const int64_t slabs = qm_ceil_div(c, 32 * N);
    const unsigned blocks = (unsigned)qm_ceil_div(chunks * slabs, WARPS);
    sum_chunks<N><<<blocks, THREADS, 0, stream>>>(x, out, by, slabs, whole);
    join_parts<N><<<blocks, THREADS, 0, stream>>>(out, by, slabs, whole);
    return qm_cuda_launched(cuda, "scatter_add");
  });
}
