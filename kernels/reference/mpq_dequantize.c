/* mpq_dequantize.c - packed codes to weights in feature order.
**
** Computed in f32 and rounded once to w's type; QM_DECODE_BIE rounds as bitorch-engine's unpacking
** does, each operation to the type of the scales.
*/
#include "mpq.h"
#include "reference.h"

/* asym: one rounding, for code - zero is exact; sym: two. */
static float decode_bie(const qm_mpq_view *q, float code, float scale, float zero) {
  const int32_t dtype = q->scales.dtype;
  if (q->asym) return qm_round_to(dtype, scale * (code - zero));
  return qm_round_to(dtype, qm_round_to(dtype, code * scale) - zero);
}

int32_t qm_reference_mpq_dequantize(void *context, const qm_mpq_dequantize_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  const qm_mpq_span span = qm_mpq_span_of(q);
  const int add_residual = args->form == QM_DECODE_RESIDUAL && span.bits > 0;
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t feature = qm_mpq_feature(q, p), g = qm_mpq_group(q, p);
    for (int64_t n = 0; n < q->n; n++) {
      const float scale = qm_mpq_scale(q, g, n), zero = qm_mpq_zero(q, g, n);
      float code = (float)qm_mpq_code(q, p, n);
      if (add_residual) {
        const uint32_t field = qm_mpq_field(q->residual.data, span.bits, q->n, p, n);
        code += (float)((int32_t)field - span.half) / span.unit; /* exact: at most 16 bits */
      }
      qm_store(args->w.data, args->w.dtype, feature * q->n + n,
               args->form == QM_DECODE_BIE ? decode_bie(q, code, scale, zero)
                                           : qm_mpq_decode(q->asym, code, scale, zero));
    }
  }
  return QM_OK;
}
