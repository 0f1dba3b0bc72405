/* mpq_pack.cu - weights in feature order to packed codes and residuals on their grid.
**
** Reference: kernels/reference/mpq_pack.c, equal bit for bit (IEEE divide, no contraction, the same
**            random bits).
** Launch:    a thread owns 32 packed rows of one column: neighbours read and write neighbours.
*/
#include "mpq.cuh"

enum { THREADS = 256 };

/* The code and the residual of one weight, as code << bits | residual field. */
static __device__ uint32_t place_weight(const qm_mpq_pack_args &args, const qm_mpq_span &span,
                                        float w, float scale, float zero, int64_t element) {
  const float y = qm_mpq_encode(args.q.asym, w, scale, zero) * span.unit;
  const float within = y != y ? 0.0f : y < span.low ? span.low : y > span.high ? span.high : y;
  float rounded = rintf(within);
  if (args.stochastic) {
    const float low = floorf(within);
    rounded = low + (qm_uniform(&args.noise, (uint64_t)element) < within - low ? 1.0f : 0.0f);
  }
  return (uint32_t)((int32_t)rounded + span.half);
}

static __global__ void mpq_pack(const __grid_constant__ qm_mpq_pack_args args, qm_cuda_late *late,
                                int64_t strips) {
  const qm_mpq_view &q = args.q;
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < strips; i += stride) {
    const int64_t n = i % q.n, first = i / q.n * QM_MPQ_ROWS;
    qm_mpq_word codes = qm_mpq_codes_of(q, first, n);
    const qm_mpq_span span = qm_mpq_span_for(&q, codes.bits);
    qm_mpq_word residual = qm_mpq_residuals_of(q, span.bits, first, n);
    for (int64_t p = first; p < first + QM_MPQ_ROWS; p++) {
      qm_mpq_place place;
      uint32_t stand = 0;
      if (qm_mpq_locate(q, late, QM_CUDA_OP_mpq_pack, p, &place)) {
        const float w = qm_load(args.w.data, args.w.dtype, place.feature * q.n + n);
        stand = place_weight(args, span, w, qm_mpq_scale(&q, place.group, n),
                             qm_mpq_zero(&q, place.group, n), p * q.n + n);
      }
      codes.put(stand >> span.bits);
      if (span.bits > 0) residual.put(stand);
    }
  }
}

int32_t qm_cuda_mpq_pack(void *context, const qm_mpq_pack_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t strips = qm_mpq_strips(args->q);
  mpq_pack<<<qm_blocks(cuda, strips, THREADS), THREADS, 0, cuda->compute>>>(
      *args, cuda->late_device, strips);
  return qm_cuda_launched(cuda, "mpq_pack");
}
