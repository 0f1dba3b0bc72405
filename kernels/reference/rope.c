/* rope.c - rotary position embedding, halves rotated as Llama does.
** Source: Su et al., arXiv 2104.09864. */
#include "reference.h"

int32_t qm_reference_check_rows(const char *argument, const qm_array *numbers, int64_t count) {
  const int32_t *number = numbers->data;
  for (int64_t r = 0; r < numbers->count; r++)
    if (number[r] < 0 || number[r] >= count)
      return qm_reference_host->fail(
          QM_E_ARGUMENT, "argument '%s': expected %s from 0 to %lld, got %d in row %lld", argument,
          argument, (long long)count - 1, number[r], (long long)r);
  return QM_OK;
}

/* Turn the heads of one row; sign -1 turns back. */
static void turn(const qm_array *x, int64_t from, const qm_array *out, int64_t to, int64_t heads,
                 int64_t half, const float *cosines, const float *sines, float sign) {
  for (int64_t h = 0; h < heads; h++, from += 2 * half, to += 2 * half)
    for (int64_t i = 0; i < half; i++) {
      const float a = qm_load(x->data, x->dtype, from + i);
      const float b = qm_load(x->data, x->dtype, from + half + i);
      qm_store(out->data, x->dtype, to + i, a * cosines[i] - b * (sign * sines[i]));
      qm_store(out->data, x->dtype, to + half + i, b * cosines[i] + a * (sign * sines[i]));
    }
}

int32_t qm_reference_rope(void *context, const qm_rope_args *args) {
  (void)context;
  const int32_t *positions = args->positions.data;
  const int64_t half = args->head_size / 2, row = args->heads * args->head_size;
  const int32_t status =
      qm_reference_check_rows("positions", &args->positions, args->position_count);
  if (status != QM_OK) return status;
  for (int64_t r = 0; r < args->rows; r++)
    turn(&args->x, r * row, &args->out, r * row, args->heads, half,
         (const float *)args->cos.data + positions[r] * half,
         (const float *)args->sin.data + positions[r] * half, args->inverse ? -1.0f : 1.0f);
  return QM_OK;
}

int32_t qm_reference_rope_append(void *context, const qm_rope_append_args *args) {
  (void)context;
  const int32_t *positions = args->positions.data, *places = args->places.data;
  const int64_t half = args->head_size / 2, size = qm_element_size(args->q.dtype);
  const int64_t row_q = args->heads * args->head_size, row_k = args->kv_heads * args->head_size;
  int32_t status = qm_reference_check_rows("positions", &args->positions, args->position_count);
  if (status == QM_OK) status = qm_reference_check_rows("places", &args->places, args->place_count);
  if (status != QM_OK) return status;
  for (int64_t r = 0; r < args->rows; r++) {
    const float *cosines = (const float *)args->cos.data + positions[r] * half;
    const float *sines = (const float *)args->sin.data + positions[r] * half;
    turn(&args->q, r * row_q, &args->out, r * row_q, args->heads, half, cosines, sines, 1.0f);
    turn(&args->k, r * row_k, &args->keys, places[r] * row_k, args->kv_heads, half, cosines, sines,
         1.0f);
    memcpy((char *)args->values.data + places[r] * row_k * size,
           (const char *)args->v.data + r * row_k * size, (size_t)(row_k * size));
  }
  return QM_OK;
}
