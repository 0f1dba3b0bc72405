/* mpq_unpack.cu - packed codes to one byte each. Reference: kernels/reference/mpq_unpack.c. */
#include "mpq.cuh"

enum { THREADS = 256 };

static __global__ void mpq_unpack(const __grid_constant__ qm_mpq_view q, uint8_t *codes,
                                  int64_t strips) {
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < strips; i += stride) {
    const int64_t n = i % q.n, first = i / q.n * QM_MPQ_ROWS;
    for (int64_t p = first; p < first + QM_MPQ_ROWS; p++)
      codes[p * q.n + n] = (uint8_t)qm_mpq_code(&q, p, n);
  }
}

int32_t qm_cuda_mpq_unpack(void *context, const qm_mpq_unpack_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t strips = qm_mpq_strips(args->q);
  mpq_unpack<<<qm_blocks(cuda, strips, THREADS), THREADS, 0, cuda->compute>>>(
      args->q, (uint8_t *)args->codes.data, strips);
  return qm_cuda_launched(cuda, "mpq_unpack");
}
