/* mpq_fit.cu - scales and zeros that span the weights, group by group.
**
** Reference: kernels/reference/mpq_fit.c, equal bit for bit: errors are summed in the same order.
** Launch:    a thread owns one column of one group; a warp, 32 neighbours (whole zero words).
** Cost:      "mse" reads a group's weights 42 times, from caches. With g_idx every thread looks
**            through all rows for its own.
*/
#include "mpq.cuh"

enum { THREADS = 128 };

/* Call body(w) for the finite weights of group g, column n, in the order of packed rows. */
template <typename Body>
static __device__ void each_weight(const qm_mpq_fit_args &args, qm_cuda_late *late, int64_t g,
                                   int64_t n, Body body) {
  const qm_mpq_view &q = args.q;
  const bool scattered = q.g_idx.data != NULL || q.group_map.data != NULL;
  const int64_t first = scattered ? 0 : g * q.group_size;
  const int64_t end = scattered || first + q.group_size > q.k ? q.k : first + q.group_size;
  for (int64_t p = first; p < end; p++) {
    qm_mpq_place place;
    if (!qm_mpq_locate(q, late, QM_CUDA_OP_mpq_fit, p, &place) || place.group != g) continue;
    const float w = qm_load(args.w.data, args.w.dtype, place.feature * q.n + n);
    if (fabsf(w) <= FLT_MAX) body(w);
  }
}

/* A group's width is its rows'; a group without rows has the first. */
static __device__ int32_t width_of(const qm_mpq_view &q, int64_t g) {
  const int32_t *map = (const int32_t *)q.group_map.data;
  for (int64_t p = 0; map != NULL && p < q.k; p++)
    if (map[p] == g) return qm_mpq_section_of(&q, p)->w_bit;
  return q.sections[0].w_bit;
}

static __device__ qm_mpq_grid fit(const qm_mpq_fit_args &args, qm_cuda_late *late, int64_t g,
                                  int64_t n) {
  const qm_mpq_view &q = args.q;
  float lo = INFINITY, hi = -INFINITY;
  each_weight(args, late, g, n, [&](float w) {
    lo = w < lo ? w : lo;
    hi = w > hi ? w : hi;
  });
  if (lo > hi) lo = hi = 0.0f; /* a group without (finite) weights */
  if (q.asym) {
    lo = lo < 0.0f ? lo : 0.0f;
    hi = hi > 0.0f ? hi : 0.0f;
  }
  const qm_mpq_grid_kind kind = qm_mpq_grid_kind_of(&q, width_of(q, g));
  const int32_t tries = args.method == QM_FIT_MSE ? QM_MPQ_FIT_TRIES : 1;
  const float top = (float)qm_mpq_mask(kind.w_bit);
  qm_mpq_grid best = {0.0f, 0.0f};
  double least = HUGE_VAL;
  for (int32_t i = 0; i < tries; i++) {
    const qm_mpq_grid grid = qm_mpq_grid_scaled(lo, hi, qm_mpq_fit_factor(args.range, i), kind);
    double sum = 0.0;
    if (tries > 1)
      each_weight(args, late, g, n, [&](float w) {
        const double error = (double)qm_mpq_grid_error(w, grid, top, q.asym);
        sum += error * error;
      });
    if (sum < least || i == 0) {
      least = sum;
      best = grid;
    }
  }
  return best;
}

static __global__ void mpq_fit(const __grid_constant__ qm_mpq_fit_args args, qm_cuda_late *late) {
  const qm_mpq_view &q = args.q;
  const int64_t count = q.groups * q.n, stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) {
    const int64_t g = i / q.n, n = i % q.n;
    const qm_mpq_grid grid = fit(args, late, g, n);
    qm_store(q.scales.data, q.scales.dtype, i, grid.scale);
    if (q.asym) /* N is a multiple of 32 then: whole warps */
      qm_mpq_store_zero_fields(q, g, n, (int64_t)grid.zero);
    else
      qm_store(q.zeros.data, q.zeros.dtype, i, grid.zero);
  }
}

int32_t qm_cuda_mpq_fit(void *context, const qm_mpq_fit_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t count = args->q.groups * args->q.n;
  mpq_fit<<<qm_blocks(cuda, count, THREADS), THREADS, 0, cuda->compute>>>(*args, cuda->late_device);
  return qm_cuda_launched(cuda, "mpq_fit");
}
