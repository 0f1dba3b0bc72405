/* rope.c - rotary position embedding, several heads of a row at once. Reference:
** kernels/reference/rope.c. Memory bound: each element read and written once.
*/
#include "vector.h"

/* f32 of as many heads as fit: 8 KiB. Larger heads than this take the reference's path. */
enum { ROPE_BLOCK = 2048 };

static inline void rotate(float *restrict x, const float *restrict cosines,
                          const float *restrict sines, float sign, int64_t half) {
  float *restrict y = x + half;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = y[i], sine = sign * sines[i];
    x[i] = a * cosines[i] - b * sine;
    y[i] = b * cosines[i] + a * sine;
  }
}

/* Turn the heads of one row, `half` up to ROPE_BLOCK / 2; sign -1 turns back. */
static void turn(const qm_array *x, int64_t from, const qm_array *out, int64_t to, int64_t heads,
                 int64_t half, const float *cosines, const float *sines, float sign) {
  float block[ROPE_BLOCK];
  const int64_t size = 2 * half, step = ROPE_BLOCK / size;
  for (int64_t h = 0; h < heads; h += step) {
    const int64_t n = QM_MIN(step, heads - h);
    qm_expand(block, x->data, x->dtype, from + h * size, n * size);
    for (int64_t i = 0; i < n; i++) rotate(block + i * size, cosines, sines, sign, half);
    qm_narrow(block, out->data, out->dtype, to + h * size, n * size);
  }
}

int32_t QM_CPU(rope)(void *context, const qm_rope_args *args) {
  const int64_t size = args->head_size, half = size / 2, row = args->heads * size;
  if (size > ROPE_BLOCK || size == 0) return qm_reference_rope(context, args);
  const int32_t status =
      qm_reference_check_rows("positions", &args->positions, args->position_count);
  if (status != QM_OK) return status;
  const int32_t *positions = args->positions.data;
  const float *cosines = args->cos.data, *sines = args->sin.data;
  const float sign = args->inverse ? -1.0f : 1.0f;
#pragma omp parallel for schedule(static) if (args->x.count > QM_PARALLEL_MIN)
  for (int64_t r = 0; r < args->rows; r++)
    turn(&args->x, r * row, &args->out, r * row, args->heads, half, cosines + positions[r] * half,
         sines + positions[r] * half, sign);
  return QM_OK;
}

int32_t QM_CPU(rope_append)(void *context, const qm_rope_append_args *args) {
  const int64_t size = args->head_size, half = size / 2;
  if (size > ROPE_BLOCK || size == 0) return qm_reference_rope_append(context, args);
  int32_t status = qm_reference_check_rows("positions", &args->positions, args->position_count);
  if (status == QM_OK) status = qm_reference_check_rows("places", &args->places, args->place_count);
  if (status != QM_OK) return status;
  const int32_t *positions = args->positions.data, *places = args->places.data;
  const int64_t row_q = args->heads * size, row_k = args->kv_heads * size;
  const size_t row_bytes = (size_t)(row_k * qm_element_size(args->v.dtype));
#pragma omp parallel for schedule(static) if (args->q.count > QM_PARALLEL_MIN)
  for (int64_t r = 0; r < args->rows; r++) {
    const float *cosines = (const float *)args->cos.data + positions[r] * half;
    const float *sines = (const float *)args->sin.data + positions[r] * half;
    turn(&args->q, r * row_q, &args->out, r * row_q, args->heads, half, cosines, sines, 1.0f);
    turn(&args->k, r * row_k, &args->keys, places[r] * row_k, args->kv_heads, half, cosines, sines,
         1.0f);
    memcpy((char *)args->values.data + (size_t)places[r] * row_bytes,
           (const char *)args->v.data + (size_t)r * row_bytes, row_bytes);
  }
  return QM_OK;
}
