/* mpq_pack.c - weights to packed codes (and residuals) on their grid, row by row over columns.
**
** Reference: kernels/reference/mpq_pack.c, equal bit for bit (IEEE divide, the same random bits).
** Cost:      reads the weight and writes w_bit / 8 bytes an element; one division each.
*/
#include "mpq_block.h"
#include "noise.h"

typedef struct pack_block {
  qm_mpq_block grid;
  uint32_t words[QM_MPQ_COLUMNS], residual[QM_MPQ_COLUMNS]; /* being filled */
  uint32_t codes[QM_MPQ_COLUMNS], random[QM_MPQ_COLUMNS];   /* of one row */
  float w[QM_MPQ_COLUMNS];
} pack_block;

/* Where each weight lies on the grid, in steps of span->unit to a code, within the grid's ends. */
static void encode_row(pack_block *block, const qm_mpq_span *span, int32_t asym) {
  float *restrict w = block->w;
  const float *restrict scale = block->grid.scale, *restrict zero = block->grid.zero;
  const float unit = span->unit, low = span->low, high = span->high;
  for (int64_t j = 0; j < block->grid.count; j++) {
    const float y = (asym ? w[j] / scale[j] + zero[j] : (w[j] + zero[j]) / scale[j]) * unit;
    const float raised = y < low ? low : y;
    const float within = raised > high ? high : raised;
    w[j] = y != y ? 0.0f : within;
  }
}

static void round_row(pack_block *block, int stochastic) {
  float *restrict w = block->w;
  const uint32_t *restrict random = block->random;
  const int64_t n = block->grid.count;
  if (stochastic) {
    for (int64_t j = 0; j < n; j++) {
      const float low = qm_mpq_floor(w[j]);
      w[j] = low + (qm_uniform_of(random[j]) < w[j] - low ? 1.0f : 0.0f);
    }
  } else {
    for (int64_t j = 0; j < n; j++) w[j] = qm_mpq_rint(w[j]);
  }
}

static void pack_row(const qm_mpq_pack_args *args, pack_block *block, int64_t p) {
  const qm_mpq_view *q = &args->q;
  const qm_mpq_place place = qm_mpq_place_of(q, p);
  const qm_mpq_span span = qm_mpq_span_for(q, place.w_bit);
  const int64_t n = block->grid.count, first = block->grid.first;
  qm_expand(block->w, args->w.data, args->w.dtype, qm_mpq_feature(q, p) * q->n + first, n);
  qm_mpq_enter_group(&block->grid, q, qm_mpq_group(q, p));
  if (args->stochastic)
    qm_noise_words(block->random, &args->noise, (uint64_t)(p * q->n + first), n);
  encode_row(block, &span, q->asym);
  round_row(block, args->stochastic);
  const int32_t shift = place.shift, half = span.half, bits = span.bits;
  const float *restrict steps = block->w;
  uint32_t *restrict words = block->words, *restrict codes = block->codes;
  uint32_t *restrict residual = block->residual;
  for (int64_t j = 0; j < n; j++)
    words[j] |= (uint32_t)(((int32_t)steps[j] + half) >> bits) << shift;
  if (place.beyond)
    for (int64_t j = 0; j < n; j++) codes[j] = (uint32_t)(((int32_t)steps[j] + half) >> bits);
  qm_mpq_flush_codes(&place, words, codes, &block->grid);
  if (bits == 0) return;
  const int32_t rest_shift = bits * (int32_t)(p % (32 / bits));
  for (int64_t j = 0; j < n; j++) {
    const int32_t step = (int32_t)steps[j], code = (step + half) >> bits;
    residual[j] |= (uint32_t)(step - code * (1 << bits) + half) << rest_shift;
  }
  qm_mpq_flush(q->residual.data, residual, bits, q, &block->grid, p);
}

int32_t QM_CPU(mpq_pack)(void *context, const qm_mpq_pack_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
#pragma omp parallel for collapse(2) schedule(static) if (q->k * q->n > QM_MPQ_SERIAL_MAX)
  for (int64_t row = 0; row < q->k; row += QM_MPQ_ROWS) {
    for (int64_t n = 0; n < q->n; n += QM_MPQ_COLUMNS) {
      pack_block block;
      block.grid.first = n;
      block.grid.count = QM_MIN(QM_MPQ_COLUMNS, q->n - n);
      block.grid.group = -1;
      memset(block.words, 0, sizeof block.words);
      memset(block.residual, 0, sizeof block.residual);
      for (int64_t p = row; p < row + QM_MPQ_ROWS; p++) pack_row(args, &block, p);
    }
  }
  return QM_OK;
}
