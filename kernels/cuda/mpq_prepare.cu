/* mpq_prepare.cu - GBA's double quantization undone. Reference: kernels/reference/mpq_prepare.c,
** equal bit for bit: two roundings, not fused. */
#include "device.cuh"
#include "dtype.h"

enum { THREADS = 256 };

static __global__ void mpq_prepare(const __grid_constant__ qm_mpq_prepare_args args) {
  const int32_t dtype = args.out.dtype;
  const int64_t columns = args.blocks * args.block_size, stride = (int64_t)gridDim.x * THREADS;
  const bool shared_row = args.zeros.shape[0] == 1;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < args.out.count; i += stride) {
    const int64_t g = i / columns, n = i % columns;
    const int64_t at = (shared_row ? 0 : g) * args.blocks + n / args.block_size;
    const float code = (float)(((const uint8_t *)args.codes.data)[i] >> args.shift & args.mask);
    const float shifted = qm_round_to(dtype, code - qm_load(args.zeros.data, dtype, at));
    qm_store(args.out.data, dtype, i, shifted * qm_load(args.scales.data, dtype, at));
  }
}

int32_t qm_cuda_mpq_prepare(void *context, const qm_mpq_prepare_args *args) {
  QM_CUDA_ENTER(context);
  mpq_prepare<<<qm_blocks(cuda, args->out.count, THREADS), THREADS, 0, cuda->compute>>>(*args);
  return qm_cuda_launched(cuda, "mpq_prepare");
}
