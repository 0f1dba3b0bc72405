/* mpq_update.cu - one Adam step of a quantized parameter on its fixed grid: the plain kernel.
**
** Reference: kernels/reference/mpq_update.c, equal bit for bit.
** Launch:    a thread owns 32 packed rows of one column: every width, type, shape and address, rows
**            scattered by g_idx and q_perm. The usual cases go to mpq_update_fused.cu.
*/
#include "mpq_step.cuh"
#include "mpq_update.cuh"

enum { THREADS = 128 };

/* A weight's place, code << bits | residual field. */
static __device__ uint32_t read_place(const qm_mpq_view &q, const qm_mpq_span &span, int64_t p,
                                      int64_t n) {
  const uint32_t code = qm_mpq_code(&q, p, n);
  if (span.bits == 0) return code;
  return code << span.bits | qm_mpq_field(q.residual.data, span.bits, q.n, p, n);
}

static __device__ void store_moment(const qm_array &moment, int64_t i, float x, uint32_t random) {
  if (moment.dtype == QM_BF16)
    ((uint16_t *)moment.data)[i] = qm_to_bf16_stochastic(x, random);
  else
    ((float *)moment.data)[i] = x;
}

template <bool MOMENTS>
static __device__ uint32_t update_element(const qm_mpq_update_args &args,
                                          const qm_adam_numbers &step, const qm_mpq_span &span,
                                          const qm_mpq_place &place, int64_t p, int64_t n,
                                          qm_mpq_counts *counts) {
  const qm_mpq_view &q = args.q;
  const int64_t at = place.feature * q.n + n;
  const qm_noise noise = qm_adam_noise(&step, QM_STREAM_CODES);
  qm_mpq_element x;
  x.place = read_place(q, span, p, n);
  x.random = qm_bits(&noise, (uint64_t)(p * q.n + n));
  x.scale = qm_mpq_scale(&q, place.group, n);
  x.rate = qm_mpq_step_rate(step.rate, x.scale);
  x.zero = qm_mpq_step_zero(q.asym, x.scale, qm_mpq_zero(&q, place.group, n));
  x.grad = qm_load(args.grad.data, args.grad.dtype, at);
  if (MOMENTS) {
    x.m = qm_load(args.exp_avg.data, args.exp_avg.dtype, at);
    x.v = qm_load(args.exp_avg_sq.data, args.exp_avg_sq.dtype, at);
  }
  const uint32_t before = x.place >> span.bits;
  const uint32_t after =
      qm_mpq_step_carefully<MOMENTS>(step, span, args.options.rounding == QM_ROUND_STOCHASTIC,
                                     args.options.feedback == QM_FEEDBACK_MOMENTUM, &x, counts);
  if (MOMENTS && !x.refused) {
    store_moment(args.exp_avg, at, x.m, qm_exp_avg_bits(x.random));
    store_moment(args.exp_avg_sq, at, x.v, qm_exp_avg_sq_bits(x.random));
  }
  counts->moved += after >> span.bits != before;
  return after;
}

template <bool MOMENTS>
static __global__ __launch_bounds__(THREADS) void mpq_update(
    const __grid_constant__ qm_mpq_update_args args, const __grid_constant__ qm_adam_source source,
    qm_cuda_late *late, int64_t strips) {
  const qm_adam_numbers step = qm_adam_in_force(&source);
  if (step.skip) return;
  const qm_mpq_view &q = args.q;
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  qm_mpq_counts counts = {0, 0, 0};
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < strips; i += stride) {
    const int64_t n = i % q.n, first = i / q.n * QM_MPQ_ROWS;
    qm_mpq_word codes = qm_mpq_codes_of(q, first, n);
    const qm_mpq_span span = qm_mpq_span_for(&q, codes.bits);
    qm_mpq_word residual = qm_mpq_residuals_of(q, span.bits, first, n);
    for (int64_t p = first; p < first + QM_MPQ_ROWS; p++) {
      qm_mpq_place place;
      uint32_t after = 0;
      if (qm_mpq_locate(q, late, QM_CUDA_OP_mpq_update, p, &place))
        after = update_element<MOMENTS>(args, step, span, place, p, n, &counts);
      codes.put(after >> span.bits);
      if (span.bits > 0) residual.put(after);
    }
  }
  qm_mpq_add_health((int64_t *)args.health.data, counts, q.k * q.n);
}

int32_t qm_cuda_mpq_update(void *context, const qm_mpq_update_args *args) {
  QM_CUDA_ENTER(context);
  const bool has_moments = args->exp_avg.data != NULL;
  const qm_adam_source source =
      qm_adam_source_of(&args->options.adam, args->live.data, args->scale.data, !has_moments);
  if (!qm_cuda_mpq_update_fused(cuda, args, source)) {
    const int64_t strips = qm_mpq_strips(args->q);
    auto *kernel = has_moments ? mpq_update<true> : mpq_update<false>;
    kernel<<<qm_blocks(cuda, strips, THREADS), THREADS, 0, cuda->compute>>>(
        *args, source, cuda->late_device, strips);
  }
  return qm_cuda_launched(cuda, "mpq_update");
}
