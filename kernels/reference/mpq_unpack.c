/* mpq_unpack.c - packed codes to one byte each, rows in packed order. Layout: mpq.h. */
#include "mpq.h"
#include "reference.h"

int32_t qm_reference_mpq_unpack(void *context, const qm_mpq_unpack_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  uint8_t *codes = args->codes.data;
  for (int64_t p = 0; p < q->k; p++)
    for (int64_t n = 0; n < q->n; n++) codes[p * q->n + n] = (uint8_t)qm_mpq_code(q, p, n);
  return QM_OK;
}
