/* mpq_update_bie.cu - bitorch-engine's update step, to the bit, quirks included.
**
** Reference: kernels/reference/mpq_update_bie.c, equal bit for bit: the same elements (mpq_bie.h),
**            group means summed in the same order.
** Launch:    moments, codes and zeros one after the other, for a zero needs all rows of its group.
**            Codes: a thread owns 32 packed rows of one column; zeros: one column of one group.
** Cost:      a mode for comparison. Directions are worked out again from the moments, so that it
**            needs no room but for sym's old zeros.
*/
#include "mpq.cuh"
#include "mpq_bie.h"

enum { THREADS = 256 };

/* What the kernels take; `zeros` are those that codes are decoded with. */
struct bie_call {
  qm_mpq_update_bie_args args;
  qm_adam_source source;
  const void *zeros;
  qm_cuda_late *late;
};

/* False where the step is to be skipped. */
static __device__ bool begin(const bie_call &call, qm_bie_step *step) {
  const qm_adam_numbers numbers = qm_adam_in_force(&call.source);
  *step = qm_bie_step_of(&call.args, &numbers);
  return numbers.skip == 0;
}

static __global__ void bie_moments(const __grid_constant__ bie_call call) {
  qm_bie_step step;
  if (!begin(call, &step)) return;
  const int64_t stride = (int64_t)gridDim.x * THREADS, count = call.args.grad.count;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride)
    qm_bie_direction(&step, i);
}

static __global__ void bie_codes(const __grid_constant__ bie_call call, int64_t strips) {
  qm_bie_step step;
  if (!begin(call, &step)) return;
  const qm_mpq_view &q = call.args.q;
  qm_mpq_view before = q;
  before.zeros.data = (void *)call.zeros;
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < strips; i += stride) {
    const int64_t n = i % q.n, first = i / q.n * QM_MPQ_ROWS;
    qm_mpq_word codes = qm_mpq_codes_of(q, first, n);
    for (int64_t p = first; p < first + QM_MPQ_ROWS; p++) {
      qm_mpq_place place;
      uint32_t code = 0;
      if (qm_mpq_locate(q, call.late, QM_CUDA_OP_mpq_update_bie, p, &place)) {
        const float scale = qm_mpq_scale(&q, place.group, n);
        const float old = (float)qm_mpq_code(&q, p, n);
        const float u = qm_bie_standing(&step, place.feature * q.n + n);
        float w = qm_bie_decode(&step, old, scale, qm_mpq_zero(&before, place.group, n));
        w = qm_round_to(step.dtype, w + -step.numbers.rate * u);
        code = qm_bie_encode(&step, codes.bits, w, scale, qm_mpq_zero(&q, place.group, n));
      }
      codes.put(code);
    }
  }
}

/* Every fifth step. */
static __global__ void bie_zeros(const __grid_constant__ bie_call call) {
  qm_bie_step step;
  if (!begin(call, &step) || step.numbers.noise.step % 5 != 0) return;
  const qm_mpq_view &q = call.args.q;
  const bool scattered = q.g_idx.data != NULL || q.group_map.data != NULL;
  const int64_t all = q.groups * q.n, stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < all; i += stride) {
    const int64_t g = i / q.n, n = i % q.n;
    const int64_t first = scattered ? 0 : g * q.group_size;
    const int64_t end = scattered || first + q.group_size > q.k ? q.k : first + q.group_size;
    const float zero = qm_mpq_zero(&q, g, n);
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t p = first; p < end; p++) {
      qm_mpq_place place;
      if (!qm_mpq_locate(q, call.late, QM_CUDA_OP_mpq_update_bie, p, &place)) continue;
      if (place.group != g) continue;
      const float u = qm_bie_standing(&step, place.feature * q.n + n);
      sum += (double)qm_bie_mean_term(&step, u, zero);
      count++;
    }
    const float moved = qm_bie_moved_zero(&step, zero, sum, count);
    if (q.asym) /* N is a multiple of 32 then: whole warps */
      qm_mpq_store_zero_fields(q, g, n, (int64_t)moved);
    else
      qm_store(q.zeros.data, q.zeros.dtype, i, moved);
  }
}

int32_t qm_cuda_mpq_update_bie(void *context, const qm_mpq_update_bie_args *args) {
  QM_CUDA_ENTER(context);
  const qm_mpq_view &q = args->q;
  const bool has_moments = args->exp_avg.data != NULL;
  bie_call call = {*args,
                   qm_adam_source_of(&args->adam, args->live.data, args->scale.data, !has_moments),
                   q.zeros.data, cuda->late_device};
  const int64_t strips = qm_mpq_strips(q), zeros = q.groups * q.n;
  const auto blocks = [&](int64_t items) { return qm_blocks(cuda, items, THREADS); };
  const auto move_zeros = [&]() {
    bie_zeros<<<blocks(zeros), THREADS, 0, cuda->compute>>>(call);
    return qm_cuda_launched(cuda, "mpq_update_bie");
  };
  int32_t status = QM_OK;
  if (!q.asym) { /* codes are decoded with the old zeros and encoded with the new ones */
    const int64_t size_bytes = zeros * qm_element_size(q.zeros.dtype);
    void *old_zeros = NULL;
    status = qm_cuda_scratch(cuda, size_bytes, &old_zeros);
    if (status != QM_OK) return status;
    call.zeros = old_zeros;
    status = qm_cuda_check(cudaMemcpyAsync(old_zeros, q.zeros.data, (size_t)size_bytes,
                                           cudaMemcpyDeviceToDevice, cuda->compute),
                           "mpq_update_bie");
    if (status != QM_OK) return status;
  }
  if (has_moments) bie_moments<<<blocks(args->grad.count), THREADS, 0, cuda->compute>>>(call);
  if (!q.asym) status = move_zeros();
  if (status != QM_OK) return status;
  bie_codes<<<blocks(strips), THREADS, 0, cuda->compute>>>(call, strips);
  return q.asym ? move_zeros() : qm_cuda_launched(cuda, "mpq_update_bie");
}
