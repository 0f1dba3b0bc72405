/* mpq_step.cuh - one update step in registers: the arithmetic of kernels/reference/mpq_update.c,
** equal bit for bit, twice: for any element, and quickly for COLUMNS neighbours of a packed row.
**
** The quick form takes what is usual for granted: correctly rounded roots and quotients come from
** sequences without branches that hold inside a range of operands. A row that was outside has to be
** done again, carefully. */
#ifndef QM_MPQ_STEP_CUH
#define QM_MPQ_STEP_CUH

#include "mpq.cuh"

struct qm_mpq_counts {
  uint32_t moved, clipped, skipped;
};

/* ---- any element ---- */

/* What an element's step begins with. */
struct qm_mpq_element {
  float grad, m, v;
  float scale, rate, zero; /* the group's; rate and zero in code units */
  uint32_t place;          /* code << span.bits | residual field */
  uint32_t random;
  bool refused; /* something was not finite */
};

/* Step an element; returns its new place. A refused one stays as it is. */
template <bool MOMENTS>
__device__ __forceinline__ uint32_t qm_mpq_step_carefully(const qm_adam_numbers &step,
                                                          const qm_mpq_span &span, bool stochastic,
                                                          bool momentum, qm_mpq_element *x,
                                                          qm_mpq_counts *counts) {
  const float code = (float)(x->place >> span.bits), g = x->grad * step.grad_scale;
  const float decay = step.decay * (code - x->zero);
  float m = 0.0f, v = 0.0f, denominator = 0.0f, down;
  if (MOMENTS) {
    m = step.beta1 * x->m + step.one_minus_beta1 * g;
    v = step.beta2 * x->v + step.one_minus_beta2 * g * g;
    denominator = __fsqrt_rn(v) + step.eps;
    down = __fdiv_rn(x->rate * m, denominator) + decay;
  } else {
    down = x->rate * g + decay;
  }
  x->refused = !(fabsf(down) <= FLT_MAX && v <= FLT_MAX);
  if (x->refused) {
    counts->skipped++;
    return x->place;
  }
  const float start = (float)((int32_t)x->place - span.half);
  const float move = fminf(fmaxf(-down * span.unit, -QM_MPQ_MOVE_MAX), QM_MPQ_MOVE_MAX);
  float wanted = rintf(start + move);
  if (stochastic) wanted = start + qm_mpq_stochastic(move, floorf(move), qm_uniform_of(x->random));
  const float got = fminf(fmaxf(wanted, span.low), span.high);
  counts->clipped += got != wanted;
  if (momentum) {
    /* Beyond the grid's ends nothing is owed: paying it back would only wind the momentum up. */
    const float target = start + move;
    const bool inside = target >= span.low && target <= span.high;
    const float lost = inside ? x->scale * (move - (got - start)) : 0.0f;
    m -= step.inject * denominator * lost;
  }
  x->m = m;
  x->v = v;
  return (uint32_t)((int32_t)got + span.half);
}

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
** infinite where the quotient overflows. From a reciprocal to an ulp, whose error e is known
** exactly, the reciprocal to half an ulp and a quotient to an ulp; its remainder does the rest
** (Markstein). As in CUDA's own division, of all mantissas only 1 by all ones depends on more: that
** the approximation of the latter's reciprocal is the nearest one. */
__device__ __forceinline__ float qm_divide_inside(float x, float y) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  const float e = fmaf(-y, inverse, 1.0f), near = x * inverse;
  const float quotient = fmaf(near, e, near);
  inverse = fmaf(inverse, e, inverse);
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

/* ---- neighbouring columns ---- */

/* What belongs to the columns of a group. */
template <int COLUMNS>
struct qm_mpq_units {
  float scale[COLUMNS], rate[COLUMNS], zero[COLUMNS]; /* rate and zero in code units */
};

/* Columns n .. of group g. BITS: the width where it is known, else 0. */
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

/* A place as f32 by its bits: QM_MPQ_PLACE + place. Around it f32 knows integers alone, from
** -2^22 to 2^22 away, so that adding a move to it rounds the move. */
#define QM_MPQ_PLACE 12582912.0f
#define QM_MPQ_PLACE_BITS 0x4B400000u

/* One row at work. */
template <int COLUMNS>
struct qm_mpq_row {
  float grad[COLUMNS], m[COLUMNS], v[COLUMNS]; /* before, then after */
  float code[COLUMNS], place[COLUMNS];         /* before; the place as f32 by its bits */
  float got[COLUMNS];                          /* the place after */
};

/* The least exp_avg_sq that the quick form takes: infinity where the numbers that a group's
** elements share do not let it be right. */
template <int COLUMNS>
__device__ __forceinline__ float qm_mpq_root_least(const qm_adam_numbers &step,
                                                   const qm_mpq_units<COLUMNS> &units) {
  bool usual = step.eps >= 0.0f && step.eps <= 0x1p60f && fabsf(step.inject) <= 0x1p60f;
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) usual = usual && fabsf(units.scale[j]) <= FLT_MAX;
  return usual ? QM_ROOT_LEAST : INFINITY;
}

/* Step a row, or have it done by `carefully`; `root_least` is the group's. A usual row does not
** branch: a place on the grid says that nothing on the way there was infinite or NaN. */
template <int COLUMNS, bool MOMENTS, int BITS, int RESIDUAL, bool STOCHASTIC, bool MOMENTUM,
          typename Carefully>
__device__ __forceinline__ void qm_mpq_step_quickly(const qm_adam_numbers &step,
                                                    const qm_mpq_units<COLUMNS> &units,
                                                    float root_least,
                                                    const uint32_t random[COLUMNS],
                                                    qm_mpq_row<COLUMNS> *row, qm_mpq_counts *counts,
                                                    Carefully carefully) {
  static_assert(!MOMENTUM || RESIDUAL == 0, "with momentum a code is a place");
  constexpr float unit = (float)(1 << RESIDUAL), half = RESIDUAL > 0 ? unit / 2 : 0.0f;
  constexpr uint32_t top = (1u << (BITS + RESIDUAL)) - 1u;
  bool usual = true;
  uint32_t off = 0; /* bits that no place has */
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const float g = row->grad[j] * step.grad_scale;
    const float decay = step.decay * (row->code[j] - units.zero[j]);
    float down, denominator = 0.0f;
    if (MOMENTS) {
      row->m[j] = step.beta1 * row->m[j] + step.one_minus_beta1 * g;
      row->v[j] = step.beta2 * row->v[j] + step.one_minus_beta2 * g * g;
      denominator = qm_sqrt_inside(row->v[j]) + step.eps;
      const float above = units.rate[j] * row->m[j];
      down = qm_divide_inside(above, denominator) + decay;
      usual = usual & (row->v[j] >= root_least) & (fabsf(above) >= QM_QUOTIENT_LEAST);
    } else {
      down = units.rate[j] * g + decay;
    }
    const float move = -down * unit;
    if (STOCHASTIC) /* place + ceil(move - u): rounding up passes no integer */
      row->got[j] = __fadd_ru(row->place[j], __fmaf_ru((float)(random[j] >> 8), -0x1p-24f, move));
    else
      row->got[j] = row->place[j] - (QM_MPQ_PLACE + half) + move + (QM_MPQ_PLACE + half);
    off |= __float_as_uint(row->got[j]) ^ QM_MPQ_PLACE_BITS;
    if (MOMENTUM) {
      /* As in the careful form, `inside` in one comparison. Where it holds, the place is on the
      ** grid, but for one above it where the target was rounded. */
      const float target = row->code[j] + move, got = fminf(row->got[j], QM_MPQ_PLACE + (float)top);
      const float lost = units.scale[j] * (move - (got - row->place[j]));
      const float owed = step.inject * denominator * lost;
      if (__float_as_uint(target) <= __float_as_uint((float)top)) row->m[j] -= owed;
    }
  }
  if (usual & ((off & ~top) == 0)) return;
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) usual = usual & (fabsf(row->got[j] - QM_MPQ_PLACE) < 0x1p21f);
  if (!usual) {
    carefully();
    return;
  }
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) { /* somebody left the grid */
    const float got = fminf(fmaxf(row->got[j], QM_MPQ_PLACE), QM_MPQ_PLACE + (float)top);
    counts->clipped += got != row->got[j];
    row->got[j] = got;
  }
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
  const uint32_t clipped = __reduce_add_sync(0xFFFFFFFFu, counts.clipped);
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
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0)
    atomicAdd(out, (unsigned long long)elements);
}

#endif
