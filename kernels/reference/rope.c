/* rope.c - rotary position embedding, halves rotated as Llama does.
** Source: Su et al., arXiv 2104.09864. */
#include "reference.h"

int32_t qm_reference_check_positions(const qm_rope_args *args) {
  const int32_t *positions = args->positions.data;
  for (int64_t r = 0; r < args->rows; r++)
    if (positions[r] < 0 || positions[r] >= args->position_count)
      return qm_reference_host->fail(
          QM_E_ARGUMENT,
          "argument 'positions': expected positions from 0 to %lld, got %d in row %lld",
          (long long)args->position_count - 1, positions[r], (long long)r);
  return QM_OK;
}

int32_t qm_reference_rope(void *context, const qm_rope_args *args) {
  (void)context;
  const int32_t dtype = args->x.dtype, *positions = args->positions.data;
  const int64_t half = args->head_size / 2;
  const int32_t status = qm_reference_check_positions(args);
  if (status != QM_OK) return status;
  for (int64_t r = 0; r < args->rows; r++) {
    const float *cosines = (const float *)args->cos.data + positions[r] * half;
    const float *sines = (const float *)args->sin.data + positions[r] * half;
    for (int64_t h = 0; h < args->heads; h++) {
      const int64_t first = (r * args->heads + h) * args->head_size;
      for (int64_t i = 0; i < half; i++) {
        const float a = qm_load(args->x.data, dtype, first + i);
        const float b = qm_load(args->x.data, dtype, first + half + i);
        const float cosine = cosines[i], sine = args->inverse ? -sines[i] : sines[i];
        qm_store(args->out.data, dtype, first + i, a * cosine - b * sine);
        qm_store(args->out.data, dtype, first + half + i, b * cosine + a * sine);
      }
    }
  }
  return QM_OK;
}
