/* reduce.cu - reductions along one dimension of [outer, length, inner]. Reference:
** kernels/reference/reduce.c.
**
** Launch: rows (inner = 1): a warp or a block reads along the row; columns: a thread reads down its
** columns, the block's warps share the length. Where that gives too few blocks the length is cut
** into chunks, whose states a second kernel joins in their order. Shapes alone decide.
*/
#include "dtype.h"
#include "reduce.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, UNROLL = 4 };

/* Where a finished state goes. */
struct target {
  void *out;
  int32_t dtype;
  double divisor;
};

template <int OP, typename State>
static __device__ __forceinline__ void finish(const target &to, int64_t i, const State &state) {
  if constexpr (OP == QM_ARGMAX) {
    ((int32_t *)to.out)[i] = (int32_t)state.at;
  } else {
    double value = state.value();
    if (OP == QM_MEAN) value /= to.divisor;
    qm_store(to.out, to.dtype, i, (float)value);
  }
}

/* x[first .. end - 1] into `state`, by `threads` neighbours: packs where x is aligned. */
template <typename T, typename State>
static __device__ __forceinline__ void read_row(const T *x, int64_t first, int64_t end, int thread,
                                                int threads, State &state) {
  constexpr int N = qm_width<T>;
  const int64_t misaligned = (int64_t)((uintptr_t)(x + first) % 16 / sizeof(T));
  int64_t body = first + (misaligned == 0 ? 0 : N - misaligned);
  if (body > end) body = end;
  const int64_t packs = (end - body) / N;
  if (first + thread < body) state.one(qm_float(x[first + thread]), first + thread);
  int64_t i = thread;
  for (; i + (UNROLL - 1) * threads < packs; i += UNROLL * threads) {
    float v[UNROLL][N];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) qm_read<N>(x + body + (i + u * threads) * N, true, N, v[u]);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) state.template pack<N>(v[u], body + (i + u * threads) * N);
  }
  for (; i < packs; i += threads) {
    float v[N];
    qm_read<N>(x + body + i * N, true, N, v);
    state.template pack<N>(v, body + i * N);
  }
  const int64_t tail = body + packs * N + thread;
  if (tail < end) state.one(qm_float(x[tail]), tail);
}

/* Thread 0 gets the block's whole. */
template <typename State>
static __device__ __forceinline__ void block_join(State &state, State *shared) {
  qm_warp_join(state);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = state;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < WARPS; warp++) state.join(shared[warp]);
}

/* `lanes` neighbours to a row, a power of two from 8 to 32. */
template <typename T, int OP>
static __global__ void __launch_bounds__(THREADS)
    short_rows(const T *x, target to, int64_t rows, int64_t length, int lanes) {
  const int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / lanes;
  const int lane = (int)threadIdx.x & (lanes - 1);
  auto state = qm_state_of<OP>::type::none();
  if (row < rows) read_row(x + row * length, 0, length, lane, lanes, state);
  qm_warp_join(state, lanes);
  if (lane == 0 && row < rows) finish<OP>(to, row, state);
}

/* A block to a chunk of a row; partial: [rows, chunks], or NULL where a row is one chunk. */
template <typename T, int OP>
static __global__ void __launch_bounds__(THREADS)
    long_rows(const T *x, target to, typename qm_state_of<OP>::type *partial, int64_t length,
              int64_t chunk, int32_t chunks) {
  using State = typename qm_state_of<OP>::type;
  __shared__ State shared[WARPS];
  const int64_t row = blockIdx.x / chunks, first = blockIdx.x % chunks * chunk;
  const int64_t end = first + chunk < length ? first + chunk : length;
  State state = State::none();
  read_row(x + row * length, first, end, (int)threadIdx.x, THREADS, state);
  block_join(state, shared);
  if (threadIdx.x != 0) return;
  if (partial == nullptr)
    finish<OP>(to, row, state);
  else
    partial[blockIdx.x] = state;
}

/* A block to 32 * N columns and a chunk of the length; partial: [outputs, chunks] or NULL. */
template <int N, typename T, int OP>
static __global__ void __launch_bounds__(THREADS)
    columns(const T *x, target to, typename qm_state_of<OP>::type *partial, int64_t length,
            int64_t inner, int64_t slabs, int64_t chunk, int32_t chunks) {
  using State = typename qm_state_of<OP>::type;
  __shared__ State shared[WARPS][32 * N];
  const int64_t slab = blockIdx.x / chunks % slabs, outer = blockIdx.x / chunks / slabs;
  const int32_t part = (int32_t)(blockIdx.x % chunks);
  const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  const int64_t column = (slab * 32 + lane) * N, first = part * chunk;
  const int64_t end = first + chunk < length ? first + chunk : length;
  State states[N];
#pragma unroll
  for (int c = 0; c < N; c++) states[c] = State::none();
  if (column < inner) {
    const T *at = x + outer * length * inner + column;
    int64_t j = first + warp;
    for (; j + (UNROLL - 1) * WARPS < end; j += UNROLL * WARPS) {
      float v[UNROLL][N];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) qm_read<N>(at + (j + u * WARPS) * inner, N > 1, 1, v[u]);
#pragma unroll
      for (int c = 0; c < N; c++) {
        float column_of[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) column_of[u] = v[u][c];
        states[c].template pack<UNROLL>(column_of, j, WARPS);
      }
    }
    for (; j < end; j += WARPS) {
      float v[N];
      qm_read<N>(at + j * inner, N > 1, 1, v);
#pragma unroll
      for (int c = 0; c < N; c++) states[c].one(v[c], j);
    }
  }
#pragma unroll
  for (int c = 0; c < N; c++) shared[warp][lane * N + c] = states[c];
  __syncthreads();
  for (int at = (int)threadIdx.x; at < 32 * N; at += THREADS) {
    const int64_t output = outer * inner + slab * 32 * N + at;
    if (slab * 32 * N + at >= inner) break;
    State state = shared[0][at];
    for (int other = 1; other < WARPS; other++) state.join(shared[other][at]);
    if (partial == nullptr)
      finish<OP>(to, output, state);
    else
      partial[output * chunks + part] = state;
  }
}

/* Join the chunks of each output, a block to an output. */
template <int OP>
static __global__ void __launch_bounds__(THREADS)
    join_chunks(const typename qm_state_of<OP>::type *partial, target to, int32_t chunks) {
  using State = typename qm_state_of<OP>::type;
  __shared__ State shared[WARPS];
  State state = State::none();
  for (int32_t i = (int32_t)threadIdx.x; i < chunks; i += THREADS)
    state.join(partial[(int64_t)blockIdx.x * chunks + i]);
  block_join(state, shared);
  if (threadIdx.x == 0) finish<OP>(to, blockIdx.x, state);
}

/* Cut `length` so that `units` times the chunks fill the device; chunks are multiples of `step`. */
static int32_t cut(const qm_cuda *cuda, int64_t units, int64_t length, int64_t step,
                   int64_t *chunk) {
  const int64_t wanted = qm_ceil_div((int64_t)cuda->multiprocessors * 8, units);
  *chunk = qm_ceil_div(qm_ceil_div(length, wanted), step) * step;
  if (*chunk < step) *chunk = step;
  const int64_t chunks = qm_ceil_div(length, *chunk);
  return (int32_t)(chunks < 1 ? 1 : chunks);
}

template <typename T, int OP>
static int32_t reduce(qm_cuda *cuda, const T *x, const target &to, int64_t outer, int64_t length,
                      int64_t inner) {
  using State = typename qm_state_of<OP>::type;
  const int64_t outputs = outer * inner;
  if (outputs == 0) return QM_OK;
  const cudaStream_t stream = cuda->compute;
  int64_t chunk = length, slabs = 0;
  int32_t chunks = 1;
  const bool packs = inner % qm_width<T> == 0 && qm_aligned(x, 16);
  if (inner == 1) {
    if (length <= 2048 && outer >= cuda->multiprocessors * WARPS / 2) {
      int lanes = 8; /* two packs to a lane, and a lane for every element at the edges */
      while (lanes < 32 && lanes * 2 * qm_width<T> < length) lanes *= 2;
      short_rows<T, OP><<<(unsigned)qm_ceil_div(outer * lanes, THREADS), THREADS, 0, stream>>>(
          x, to, outer, length, lanes);
      return qm_cuda_launched(cuda, "reduce");
    }
    chunks = cut(cuda, outer, length, 4096, &chunk);
  } else {
    slabs = qm_ceil_div(inner, 32 * (packs ? qm_width<T> : 1));
    chunks = cut(cuda, outer * slabs, length, UNROLL * WARPS, &chunk);
  }
  State *partial = nullptr;
  if (chunks > 1) {
    const int32_t status =
        qm_cuda_scratch(cuda, outputs * chunks * (int64_t)sizeof(State), (void **)&partial);
    if (status != QM_OK) return status;
  }
  if (inner == 1)
    long_rows<T, OP>
        <<<(unsigned)(outer * chunks), THREADS, 0, stream>>>(x, to, partial, length, chunk, chunks);
  else if (packs)
    columns<qm_width<T>, T, OP><<<(unsigned)(outer * slabs * chunks), THREADS, 0, stream>>>(
        x, to, partial, length, inner, slabs, chunk, chunks);
  else
    columns<1, T, OP><<<(unsigned)(outer * slabs * chunks), THREADS, 0, stream>>>(
        x, to, partial, length, inner, slabs, chunk, chunks);
  if (chunks > 1) join_chunks<OP><<<(unsigned)outputs, THREADS, 0, stream>>>(partial, to, chunks);
  return qm_cuda_launched(cuda, "reduce");
}

int32_t qm_cuda_reduce(void *context, const qm_reduce_args *args) {
  QM_CUDA_ENTER(context);
  const target to = {args->out.data, args->out.dtype, (double)args->length};
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto op) {
      return reduce<T, decltype(op)::value>(cuda, (const T *)args->x.data, to, args->outer,
                                            args->length, args->inner);
    };
    switch (args->op) {
      case QM_SUM: return run(std::integral_constant<int, QM_SUM>{});
      case QM_MEAN: return run(std::integral_constant<int, QM_MEAN>{});
      case QM_MAX: return run(std::integral_constant<int, QM_MAX>{});
      case QM_MIN: return run(std::integral_constant<int, QM_MIN>{});
      default: return run(std::integral_constant<int, QM_ARGMAX>{});
    }
  });
}
