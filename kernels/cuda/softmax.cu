/* softmax.cu - softmax of each row, a block to a row. Reference: kernels/reference/reduce.c. */
#include "row.cuh"

enum { THREADS = 512 };

template <typename T>
static __global__ void __launch_bounds__(THREADS) softmax(const T *x, T *out, int64_t columns) {
  constexpr int N = qm_width<T>;
  __shared__ qm_row_sum partial[32];
  x += blockIdx.x * columns;
  out += blockIdx.x * columns;
  const qm_row_parts<T> parts(x, columns);
  const bool together = ((uintptr_t)x - (uintptr_t)out) % 16 == 0;
  const T *body = x + parts.head;
  qm_row_sum row = qm_row_nothing();
  for (int i = (int)threadIdx.x; i < parts.packs; i += THREADS) {
    float v[N];
    qm_read<N>(body + (int64_t)i * N, true, N, v);
    qm_row_add(row, v);
  }
  if ((int)threadIdx.x < parts.edges) {
    const float v[1] = {qm_float(x[parts.edge((int)threadIdx.x)])};
    qm_row_add(row, v);
  }
  row = qm_row_block_join(row, partial);
  const float inverse = 1.0f / row.sum;
  for (int i = (int)threadIdx.x; i < parts.packs; i += THREADS) {
    float v[N];
    qm_read<N>(body + (int64_t)i * N, true, N, v);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = row.term(v[j]) * inverse;
    qm_write<N>(out + parts.head + (int64_t)i * N, together, N, v);
  }
  if ((int)threadIdx.x < parts.edges) {
    const int64_t i = parts.edge((int)threadIdx.x);
    out[i] = qm_as<T>(row.term(qm_float(x[i])) * inverse);
  }
}

int32_t qm_cuda_softmax(void *context, const qm_softmax_args *args) {
  QM_CUDA_ENTER(context);
  if (args->rows == 0 || args->columns == 0) return QM_OK;
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    softmax<T><<<(unsigned)args->rows, THREADS, 0, cuda->compute>>>(
        (const T *)args->x.data, (T *)args->out.data, args->columns);
    return qm_cuda_launched(cuda, "softmax");
  });
}
