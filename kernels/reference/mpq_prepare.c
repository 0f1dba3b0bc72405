/* mpq_prepare.c - GBA's double quantization undone: 4- or 8-bit codes to scales or zeros.
** Two roundings, not to be fused. Source: bitorch-engine's layer preparation. */
#include "reference.h"

int32_t qm_reference_mpq_prepare(void *context, const qm_mpq_prepare_args *args) {
  (void)context;
  const int32_t dtype = args->out.dtype;
  const uint8_t *codes = args->codes.data;
  const int64_t columns = args->blocks * args->block_size;
  const int shared = args->zeros.shape[0] == 1; /* one row of parameters for all groups */
  for (int64_t g = 0; g < args->groups; g++) {
    for (int64_t n = 0; n < columns; n++) {
      const int64_t at = (shared ? 0 : g) * args->blocks + n / args->block_size;
      const float code = (float)(codes[g * columns + n] >> args->shift & args->mask);
      const float shifted = qm_round_to(dtype, code - qm_load(args->zeros.data, dtype, at));
      qm_store(args->out.data, dtype, g * columns + n,
               shifted * qm_load(args->scales.data, dtype, at));
    }
  }
  return QM_OK;
}
