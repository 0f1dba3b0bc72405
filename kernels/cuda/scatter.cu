/* scatter.cu - rows to their places: out[index[r]] = x[r]. Reference: kernels/reference/index.c. A
** row whose number is out of range is dropped, and the next call that waits says so.
**
** Launch: one thread a word of the widest kind that divides a row. Memory bound.
*/
#include "dtype.h"
#include "pack.cuh"

enum { THREADS = 256 };

template <typename Word>
static __global__ void __launch_bounds__(THREADS)
    place(const Word *x, const int32_t *index, Word *out, int64_t v, int64_t words, int64_t count,
          qm_cuda_late *late) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const int64_t r = i / words;
  const int32_t row = index[r];
  if (qm_index_fits(late, QM_CUDA_OP_scatter, row, v)) out[row * words + (i - r * words)] = x[i];
}

template <typename Word>
static int32_t launch(qm_cuda *cuda, const qm_scatter_args *args, int64_t row_bytes) {
  const int64_t words = row_bytes / (int64_t)sizeof(Word), count = args->r * words;
  place<Word><<<(unsigned)qm_ceil_div(count, THREADS), THREADS, 0, cuda->compute>>>(
      (const Word *)args->x.data, (const int32_t *)args->index.data, (Word *)args->out.data,
      args->v, words, count, cuda->late_device);
  return qm_cuda_launched(cuda, "scatter");
}

int32_t qm_cuda_scatter(void *context, const qm_scatter_args *args) {
  QM_CUDA_ENTER(context);
  if (args->x.count == 0) return QM_OK;
  const int64_t row_bytes = args->c * qm_element_size(args->x.dtype);
  const auto fits = [&](int64_t bytes) {
    return row_bytes % bytes == 0 && qm_aligned(args->x.data, bytes) &&
           qm_aligned(args->out.data, bytes);
  };
  if (fits(16)) return launch<uint4>(cuda, args, row_bytes);
  if (fits(8)) return launch<uint2>(cuda, args, row_bytes);
  if (fits(4)) return launch<uint32_t>(cuda, args, row_bytes);
  if (fits(2)) return launch<uint16_t>(cuda, args, row_bytes);
  return launch<uint8_t>(cuda, args, row_bytes);
}
