/* gather.cu - rows by number: out[r] = x[index[r]]. Reference: kernels/reference/index.c. A row
** whose number is out of range becomes 0, and the next call that waits says so. */
#include "dtype.h"
#include "pack.cuh"

enum { THREADS = 256 };

static __device__ __forceinline__ int64_t row_of(const int32_t *index, int64_t r, int64_t v,
                                                 qm_cuda_late *late) {
  const int32_t row = index[r];
  return qm_index_fits(late, QM_CUDA_OP_gather, row, v) ? row : -1;
}

/* Rows as words, whatever they hold. */
template <typename Word>
static __global__ void __launch_bounds__(THREADS)
    same(const Word *x, const int32_t *index, Word *out, int64_t v, int64_t words, int64_t count,
         qm_cuda_late *late) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const int64_t r = i / words, row = row_of(index, r, v, late);
  out[i] = row < 0 ? Word{} : x[row * words + (i - r * words)];
}

template <int N, typename From, typename To>
static __global__ void __launch_bounds__(THREADS)
    converting(const From *x, const int32_t *index, To *out, int64_t v, int64_t columns,
               int64_t packs, int64_t count, bool whole, qm_cuda_late *late) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const int64_t r = i / packs, column = (i - r * packs) * N, left = columns - column;
  const int64_t row = row_of(index, r, v, late);
  float value[N] = {};
  if (row >= 0) qm_read<N>(x + row * columns + column, whole, left, value);
  qm_write<N>(out + r * columns + column, whole, left, value);
}

template <typename Word>
static int32_t launch_same(qm_cuda *cuda, const qm_gather_args *args, int64_t row_bytes) {
  const int64_t words = row_bytes / (int64_t)sizeof(Word), count = args->r * words;
  same<Word><<<(unsigned)qm_ceil_div(count, THREADS), THREADS, 0, cuda->compute>>>(
      (const Word *)args->x.data, (const int32_t *)args->index.data, (Word *)args->out.data,
      args->v, words, count, cuda->late_device);
  return qm_cuda_launched(cuda, "gather");
}

template <typename From, typename To>
static int32_t launch_converting(qm_cuda *cuda, const qm_gather_args *args) {
  constexpr int N = sizeof(From) > sizeof(To) ? qm_width<From> : qm_width<To>;
  const From *x = (const From *)args->x.data;
  To *out = (To *)args->out.data;
  const int64_t packs = qm_ceil_div(args->c, N), count = args->r * packs;
  const bool whole = args->c % N == 0 && qm_packs<N>(x) && qm_packs<N>(out);
  converting<N><<<(unsigned)qm_ceil_div(count, THREADS), THREADS, 0, cuda->compute>>>(
      x, (const int32_t *)args->index.data, out, args->v, args->c, packs, count, whole,
      cuda->late_device);
  return qm_cuda_launched(cuda, "gather");
}

int32_t qm_cuda_gather(void *context, const qm_gather_args *args) {
  QM_CUDA_ENTER(context);
  if (args->out.count == 0) return QM_OK;
  const int32_t from = args->x.dtype, to = args->out.dtype;
  if (from != to)
    return qm_with_float(from, [&](auto x) {
      return qm_with_float(
          to, [&](auto out) { return launch_converting<decltype(x), decltype(out)>(cuda, args); });
    });
  const int64_t row_bytes = args->c * qm_element_size(from);
  const auto fits = [&](int64_t bytes) {
    return row_bytes % bytes == 0 && qm_aligned(args->x.data, bytes) &&
           qm_aligned(args->out.data, bytes);
  };
  if (fits(16)) return launch_same<uint4>(cuda, args, row_bytes);
  if (fits(8)) return launch_same<uint2>(cuda, args, row_bytes);
  if (fits(4)) return launch_same<uint32_t>(cuda, args, row_bytes);
  if (fits(2)) return launch_same<uint16_t>(cuda, args, row_bytes);
  return launch_same<uint8_t>(cuda, args, row_bytes);
}
