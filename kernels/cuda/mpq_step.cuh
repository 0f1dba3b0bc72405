/* mpq_step.cuh - one update step in registers: the arithmetic of kernels/reference/mpq_update.c for
** COLUMNS neighbouring elements of one packed row, equal bit for bit.
**
** Correctly rounded roots and quotients without branches: the sequences below give the IEEE result
** inside a range of operands, `watch` finds every row that leaves it, and such a row is computed
** again. The reference bounds the move before rounding; here the rounded value's clamping does. */
#ifndef QM_MPQ_STEP_CUH
#define QM_MPQ_STEP_CUH

#include "mpq.cuh"

/* What belongs to a column of a group. */
template <int COLUMNS>
struct qm_mpq_units {
  float scale[COLUMNS], rate[COLUMNS], zero[COLUMNS]; /* rate and zero in code units */
};

/* One row at work. */
template <int COLUMNS>
struct qm_mpq_row {
  float grad[COLUMNS];
  float m[COLUMNS], v[COLUMNS];              /* before, then after */
  float code[COLUMNS];                       /* before */
  float down[COLUMNS], denominator[COLUMNS]; /* the step in codes, negated; sqrt(v) + eps */
  uint32_t refused;                          /* bit j: column j is not finite and rests */
};

struct qm_mpq_counts {
  uint32_t moved, skipped;
  float clipped;
};

/* ---- roots and quotients ---- */

#define QM_ROOT_LEAST 0x1p-101f
#define QM_QUOTIENT_LEAST 0x1p-60f

/* sqrt(x), rounded once, for QM_ROOT_LEAST <= x <= FLT_MAX; NaN or infinite for x = 0 and infinity.
** An approximation to an ulp, then Newton's correction of it in one fma. */
__device__ __forceinline__ float qm_sqrt_inside(float x) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = x * inverse, half = 0.5f * inverse;
  return fmaf(fmaf(-root, root, x), half, root);
}
/* x / y, rounded once, where y is in [2^-60, 2^65] and |x| at least QM_QUOTIENT_LEAST; NaN or
** infinite where the quotient overflows. A reciprocal to half an ulp, a quotient, and its remainder
** taken twice (Markstein). */
__device__ __forceinline__ float qm_divide_inside(float x, float y) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  inverse = fmaf(inverse, fmaf(-y, inverse, 1.0f), inverse);
  float quotient = x * inverse;
  quotient = fmaf(fmaf(-y, quotient, x), inverse, quotient);
  return fmaf(fmaf(-y, quotient, x), inverse, quotient);
}

/* x[j] / y[j], rounded once, and 0 where y[j] is 0: see qm_mpq_step_rate. */
template <int COLUMNS>
__device__ __forceinline__ void qm_divide_all(const float x[COLUMNS], const float y[COLUMNS],
                                              float out[COLUMNS]) {
  float quotient[COLUMNS];
  bool inside = true;
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    quotient[j] = qm_divide_inside(x[j], y[j]);
    inside = inside & (y[j] >= 0x1p-60f) & (y[j] <= 0x1p60f) & (fabsf(x[j]) >= QM_QUOTIENT_LEAST) &
             (fabsf(x[j]) <= 0x1p60f);
  }
  if (!inside) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) quotient[j] = y[j] == 0.0f ? 0.0f : __fdiv_rn(x[j], y[j]);
  }
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) out[j] = quotient[j];
}

/* Column n's units in group g. BITS: the width where it is known, else 0. */
template <int COLUMNS, int BITS>
__device__ __forceinline__ void qm_mpq_units_of(const qm_mpq_view &q, float rate, int64_t g,
                                                int64_t n, qm_mpq_units<COLUMNS> *units) {
  qm_mpq_load_grid<COLUMNS, BITS>(q, g, n, units->scale, units->zero);
  float rates[COLUMNS];
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) rates[j] = rate;
  qm_divide_all<COLUMNS>(rates, units->scale, units->rate);
  if (!q.asym) qm_divide_all<COLUMNS>(units->zero, units->scale, units->zero);
}

/* ---- the step ---- */

/* Advance the moments and find the step, with IEEE roots and quotients, column by column; a column
** that is not finite keeps its moments and does not move. */
template <int COLUMNS, bool MOMENTS>
__device__ __forceinline__ void qm_mpq_direct_careful(const qm_adam_numbers &step,
                                                      const qm_mpq_units<COLUMNS> &units,
                                                      qm_mpq_row<COLUMNS> *row,
                                                      qm_mpq_counts *counts) {
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const float g = row->grad[j] * step.grad_scale;
    const float decay = step.decay * (row->code[j] - units.zero[j]);
    float m = 0.0f, v = 0.0f;
    if (MOMENTS) {
      m = step.beta1 * row->m[j] + step.one_minus_beta1 * g;
      v = step.beta2 * row->v[j] + step.one_minus_beta2 * g * g;
      row->denominator[j] = __fsqrt_rn(v) + step.eps;
      row->down[j] = __fdiv_rn(units.rate[j] * m, row->denominator[j]) + decay;
    } else {
      row->down[j] = units.rate[j] * g + decay;
    }
    if (fabsf(row->down[j]) <= FLT_MAX && v <= FLT_MAX) {
      row->m[j] = m;
      row->v[j] = v;
    } else {
      row->down[j] = 0.0f;
      row->refused |= 1u << j;
      counts->skipped++;
    }
  }
}

/* What `watch` starts from: finite where the range of quotients holds for this eps. */
__device__ __forceinline__ float qm_mpq_watch(const qm_adam_numbers &step) {
  return step.eps >= 0.0f && step.eps <= 0x1p60f ? 0.0f : INFINITY;
}

template <int COLUMNS, bool MOMENTS>
__device__ __forceinline__ void qm_mpq_direct(const qm_adam_numbers &step, float watch,
                                              const qm_mpq_units<COLUMNS> &units,
                                              qm_mpq_row<COLUMNS> *row, qm_mpq_counts *counts) {
  float m[COLUMNS], v[COLUMNS];
  bool inside = true;
  row->refused = 0;
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const float g = row->grad[j] * step.grad_scale;
    const float decay = step.decay * (row->code[j] - units.zero[j]);
    if (MOMENTS) {
      m[j] = step.beta1 * row->m[j] + step.one_minus_beta1 * g;
      v[j] = step.beta2 * row->v[j] + step.one_minus_beta2 * g * g;
      row->denominator[j] = qm_sqrt_inside(v[j]) + step.eps;
      const float above = units.rate[j] * m[j];
      row->down[j] = qm_divide_inside(above, row->denominator[j]) + decay;
      inside = inside & (v[j] >= QM_ROOT_LEAST) & (fabsf(above) >= QM_QUOTIENT_LEAST);
    } else {
      row->down[j] = units.rate[j] * g + decay;
    }
    watch = fmaf(row->down[j], MOMENTS ? v[j] : 0.0f, watch); /* finite if all of them are */
  }
  if (!(inside & (fabsf(watch) <= FLT_MAX))) {
    qm_mpq_direct_careful<COLUMNS, MOMENTS>(step, units, row, counts);
    return;
  }
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    if (!MOMENTS) continue;
    row->m[j] = m[j];
    row->v[j] = v[j];
  }
}

/* A weight's place code << bits | residual field as f32 by its bits: 2^23 + place. All rounding
** below is done on it; `span`'s bounds and start are QM_MPQ_PLACE + span.half away. */
#define QM_MPQ_PLACE 8388608.0f
__device__ __forceinline__ float qm_mpq_place_of(uint32_t place) {
  uint32_t exponent = 0x4B000000u;
  asm("" : "+r"(exponent)); /* kept in a register, so that masking and this are one instruction */
  return __uint_as_float(place | exponent);
}

/* Round column j's step on its grid, `random` its random bits, and feed the error back. Returns the
** new place in the low 23 bits. */
template <int COLUMNS>
__device__ __forceinline__ uint32_t qm_mpq_round(const qm_adam_numbers &step,
                                                 const qm_mpq_span &span,
                                                 const qm_mpq_units<COLUMNS> &units,
                                                 bool stochastic, bool momentum, int j, float place,
                                                 uint32_t random, qm_mpq_row<COLUMNS> *row,
                                                 qm_mpq_counts *counts) {
  const float bias = QM_MPQ_PLACE + (float)span.half, move = -row->down[j] * span.unit;
  float wanted;
  if (stochastic) {
    const float low = floorf(move);
    wanted = place + low + (qm_uniform_of(random) < move - low ? 1.0f : 0.0f);
  } else {
    wanted = rintf(place - bias + move) + bias;
  }
  const float got = fminf(fmaxf(wanted, span.low + bias), span.high + bias);
  counts->clipped += got != wanted ? 1.0f : 0.0f;
  if (momentum) {
    /* Beyond the grid's ends nothing is owed: paying it back would only wind the momentum up. */
    const float target = place - bias + move;
    const bool inside = target >= span.low && target <= span.high;
    const float lost = inside ? units.scale[j] * (move - (got - place)) : 0.0f;
    const float m = row->m[j] - step.inject * row->denominator[j] * lost;
    if (!(row->refused >> j & 1u)) row->m[j] = m;
  }
  return __float_as_uint(got);
}

/* ---- health ---- */

/* How many of a word's fields differ. */
__device__ __forceinline__ uint32_t qm_mpq_changed(uint32_t before, uint32_t after, int32_t bits) {
  uint32_t changed = before ^ after;
  for (int32_t shift = 1; shift < bits; shift *= 2) changed |= changed >> shift;
  const uint32_t lowest = bits == 1   ? ~0u
                          : bits == 2 ? 0x55555555u
                          : bits == 4 ? 0x11111111u
                                      : 0x01010101u;
  return (uint32_t)__popc(changed & lowest);
}

/* Add the block's counts, integers, so that their order cannot matter. All threads of the block. */
__device__ __forceinline__ void qm_mpq_add_health(int64_t *health, const qm_mpq_counts &counts,
                                                  int64_t elements) {
  __shared__ uint32_t totals[3];
  if (health == NULL) return;
  if (threadIdx.x < 3) totals[threadIdx.x] = 0;
  __syncthreads();
  const uint32_t moved = __reduce_add_sync(0xFFFFFFFFu, counts.moved);
  const uint32_t clipped = __reduce_add_sync(0xFFFFFFFFu, (uint32_t)counts.clipped);
  const uint32_t skipped = __reduce_add_sync(0xFFFFFFFFu, counts.skipped);
  if (threadIdx.x % 32 == 0) {
    if (moved != 0) atomicAdd(&totals[0], moved);
    if (clipped != 0) atomicAdd(&totals[1], clipped);
    if (skipped != 0) atomicAdd(&totals[2], skipped);
  }
  __syncthreads();
  unsigned long long *out = (unsigned long long *)health;
  if (threadIdx.x < 3 && totals[threadIdx.x] != 0)
    atomicAdd(out + 1 + threadIdx.x, (unsigned long long)totals[threadIdx.x]);
  if (threadIdx.x == 0 && blockIdx.x == 0) atomicAdd(out, (unsigned long long)elements);
}

#endif
