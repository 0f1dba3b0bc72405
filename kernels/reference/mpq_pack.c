/* mpq_pack.c - weights in feature order to packed codes (and residuals) on their grid.
**
** Source: bitorch-engine's packing. It converts to integer and then clamps; we clamp first, so that
** NaN and huge values have one meaning (NaN packs as 0). Stochastic: compare the random number with
** the fraction; floor(y + u) would round, and whole values would move.
*/
#include "mpq.h"
#include "reference.h"

int32_t qm_reference_mpq_pack(void *context, const qm_mpq_pack_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t feature = qm_mpq_feature(q, p), g = qm_mpq_group(q, p);
    const qm_mpq_span span = qm_mpq_span_for(q, qm_mpq_section_of(q, p)->w_bit);
    for (int64_t n = 0; n < q->n; n++) {
      const float w = qm_load(args->w.data, args->w.dtype, feature * q->n + n);
      const float y =
          qm_mpq_encode(q->asym, w, qm_mpq_scale(q, g, n), qm_mpq_zero(q, g, n)) * span.unit;
      const float within = y != y ? 0.0f : y < span.low ? span.low : y > span.high ? span.high : y;
      float rounded = rintf(within);
      if (args->stochastic) {
        const float low = floorf(within);
        const float random = qm_uniform(&args->noise, (uint64_t)(p * q->n + n));
        rounded = low + (random < within - low ? 1.0f : 0.0f);
      }
      const int32_t steps = (int32_t)rounded, code = (steps + span.half) >> span.bits;
      qm_mpq_set_code(q, p, n, (uint32_t)code);
      if (span.bits > 0)
        qm_mpq_set_field(q->residual.data, span.bits, q->n, p, n,
                         (uint32_t)(steps - (code << span.bits) + span.half));
    }
  }
  return QM_OK;
}
