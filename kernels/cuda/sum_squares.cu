/* sum_squares.cu - the sum of the squares of many tensors.
**
** Reference: kernels/reference/reduce.c; here f64 over f32 sums of UNROLL packs. In one order,
**            whatever the launches, the device and where tensors lie: each chunk's sum has a place
**            among all the call's chunks, and a second kernel adds them up.
** Launch:    a block to a chunk, UNROLL packs of each thread under way.
** Cost:      reads every element once: memory bound.
*/
#include "list.cuh"
#include "pack.cuh"

enum {
  THREADS = 256,
  UNROLL = 4,
  CHUNK_BYTES = 1 << 16, /* 16 packs to a thread; eight blocks to a multiprocessor */
  JOIN_THREADS = 1024,
  JOIN_UNROLL = 8,
};

struct tensor {
  const void *x;
  int64_t count : 56, dtype : 8;
};
using tensors = qm_list<tensor>;

/* Thread 0 gets the block's sum. */
template <int BLOCK>
static __device__ __forceinline__ double block_sum(double sum) {
  __shared__ double shared[BLOCK / 32];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return 0.0;
  for (int warp = 1; warp < BLOCK / 32; warp++) sum += shared[warp];
  return sum;
}

/* The squares of UNROLL packs, THREADS packs apart, of which the first `left` elements count. */
template <bool WHOLE, typename T>
static __device__ __forceinline__ double square_packs(const T *x, bool aligned, int64_t left) {
  constexpr int N = qm_width<T>, STEP = THREADS * N;
  float v[UNROLL][N], part[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++)
    qm_read<N>(x + u * STEP, WHOLE || (aligned && left - u * STEP >= N), left - u * STEP, v[u]);
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    part[u] = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++) part[u] = fmaf(v[u][j], v[u][j], part[u]);
  }
#pragma unroll
  for (int u = 1; u < UNROLL; u++) part[0] += part[u];
  return (double)part[0];
}

/* This thread's part of the chunk at x, where `left` elements are left. */
template <typename T>
static __device__ __forceinline__ double square_chunk(const T *x, int64_t left) {
  constexpr int N = qm_width<T>, ROUND = UNROLL * THREADS * N;
  constexpr int CHUNK = CHUNK_BYTES / (int)sizeof(T);
  static_assert(CHUNK % ROUND == 0, "a chunk is whole rounds");
  const bool aligned = (uintptr_t)x % 16 == 0;
  const int first = (int)threadIdx.x * N;
  double sum = 0.0;
  if (aligned && left >= CHUNK)
    for (int i = first; i < CHUNK; i += ROUND) sum += square_packs<true>(x + i, true, 0);
  else
    for (int i = first; i < CHUNK && i < left; i += ROUND)
      sum += square_packs<false>(x + i, aligned, left - i);
  return sum;
}

static __global__ void __launch_bounds__(THREADS)
    sum_squares(const __grid_constant__ tensors list, double *partial) {
  qm_take_turn();
  int32_t chunk;
  const tensor &t = list.item[list.find(&chunk)];
  const char *x = (const char *)t.x + chunk * (int64_t)CHUNK_BYTES;
  const int64_t bytes = chunk * (int64_t)CHUNK_BYTES;
  double sum;
  if (t.dtype == QM_F32)
    sum = square_chunk((const float *)x, t.count - bytes / 4);
  else if (t.dtype == QM_F16)
    sum = square_chunk((const __half *)x, t.count - bytes / 2);
  else
    sum = square_chunk((const __nv_bfloat16 *)x, t.count - bytes / 2);
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(JOIN_THREADS)
    join(const double *partial, int64_t count, float *out, int32_t accumulate) {
  qm_take_turn();
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += JOIN_UNROLL * JOIN_THREADS) {
    double v[JOIN_UNROLL];
#pragma unroll
    for (int u = 0; u < JOIN_UNROLL; u++)
      v[u] = i + u * JOIN_THREADS < count ? partial[i + u * JOIN_THREADS] : 0.0;
#pragma unroll
    for (int u = 0; u < JOIN_UNROLL; u++) sum += v[u];
  }
  sum = block_sum<JOIN_THREADS>(sum);
  if (threadIdx.x == 0) *out = (float)(accumulate ? sum + (double)*out : sum);
}

static int64_t chunks_of(const qm_array &x) {
  return qm_ceil_div(x.count * (x.dtype == QM_F32 ? 4 : 2), CHUNK_BYTES);
}

int32_t qm_cuda_sum_squares(void *context, const qm_sum_squares_args *args) {
  QM_CUDA_ENTER(context);
  int64_t chunks = 0, done = 0;
  for (int64_t i = 0; i < args->count; i++) chunks += chunks_of(args->x[i]);
  if (chunks == 0 && args->accumulate) return QM_OK;
  double *partial = nullptr;
  const int32_t status =
      qm_cuda_scratch(cuda, (chunks + 1) * (int64_t)sizeof *partial, (void **)&partial);
  if (status != QM_OK) return status;
  tensors list = {};
  const auto launch = [&] {
    if (list.count == 0) return;
    qm_launch_early(cuda, sum_squares, (unsigned)list.chunks(), THREADS, 0, list, partial + done);
    done += list.chunks();
    list.count = 0;
  };
  for (int64_t i = 0; i < args->count; i++) {
    const qm_array &x = args->x[i];
    const tensor item = {x.data, x.count, x.dtype};
    if (list.add(item, chunks_of(x))) continue;
    launch();
    list.add(item, chunks_of(x));
  }
  launch();
  qm_launch_early(cuda, join, 1, JOIN_THREADS, 0, partial, chunks, (float *)args->out.data,
                  args->accumulate);
  return qm_cuda_launched(cuda, "sum_squares");
}
