/* mpq_dequantize.c - packed codes to weights in feature order, row by row over blocks of columns.
**
** Reference: kernels/reference/mpq_dequantize.c, equal bit for bit.
** Cost:      reads w_bit / 8 bytes and writes the weight's 2 or 4 an element: memory bound.
*/
#include "mpq_block.h"

int32_t QM_CPU(mpq_dequantize)(void *context, const qm_mpq_dequantize_args *args) {
  if (args->form == QM_DECODE_BIE) return qm_reference_mpq_dequantize(context, args);
  const qm_mpq_view *q = &args->q;
  const int with_residual = args->form == QM_DECODE_RESIDUAL && q->residual.data != NULL;
#pragma omp parallel for collapse(2) schedule(static) if (q->k * q->n > QM_MPQ_SERIAL_MAX)
  for (int64_t row = 0; row < q->k; row += QM_MPQ_ROWS) {
    for (int64_t n = 0; n < q->n; n += QM_MPQ_COLUMNS) {
      qm_mpq_block block = {.first = n, .count = QM_MIN(QM_MPQ_COLUMNS, q->n - n), .group = -1};
      float buffer[QM_MPQ_COLUMNS];
      for (int64_t p = row; p < row + QM_MPQ_ROWS; p++) {
        const int64_t at = qm_mpq_feature(q, p) * q->n + n;
        float *out = args->w.dtype == QM_F32 ? (float *)args->w.data + at : buffer;
        qm_mpq_enter_group(&block, q, qm_mpq_group(q, p));
        qm_mpq_decode_row(out, q, &block, p, with_residual);
        if (out == buffer) qm_narrow(buffer, args->w.data, args->w.dtype, at, block.count);
      }
    }
  }
  return QM_OK;
}

int32_t QM_CPU(mpq_unpack)(void *context, const qm_mpq_unpack_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  const int64_t n = q->n;
#pragma omp parallel for schedule(static) if (q->k * n > QM_MPQ_SERIAL_MAX)
  for (int64_t p = 0; p < q->k; p++) {
    const qm_mpq_place place = qm_mpq_place_of(q, p);
    const uint32_t *restrict words = place.words, *restrict next = words + n;
    uint8_t *restrict codes = (uint8_t *)args->codes.data + p * n;
    const int32_t shift = place.shift;
    const uint32_t mask = qm_mpq_mask(place.w_bit);
    if (place.beyond == 0)
      for (int64_t j = 0; j < n; j++) codes[j] = (uint8_t)(words[j] >> shift & mask);
    else
      for (int64_t j = 0; j < n; j++)
        codes[j] = (uint8_t)((words[j] >> shift | next[j] << (32 - shift)) & mask);
  }
  return QM_OK;
}
