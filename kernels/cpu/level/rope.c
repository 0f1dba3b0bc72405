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

int32_t QM_CPU(rope)(void *context, const qm_rope_args *args) {
  const int64_t size = args->head_size, half = size / 2, heads = args->heads;
  if (size > ROPE_BLOCK || size == 0) return qm_reference_rope(context, args);
  const int32_t status = qm_reference_check_positions(args);
  if (status != QM_OK) return status;
  const int32_t *positions = args->positions.data;
  const int64_t step = ROPE_BLOCK / size;
  const float sign = args->inverse ? -1.0f : 1.0f;
#pragma omp parallel for schedule(static) if (args->x.count > QM_PARALLEL_MIN)
  for (int64_t r = 0; r < args->rows; r++) {
    float x[ROPE_BLOCK];
    const float *cosines = (const float *)args->cos.data + positions[r] * half;
    const float *sines = (const float *)args->sin.data + positions[r] * half;
    for (int64_t h = 0; h < heads; h += step) {
      const int64_t n = QM_MIN(step, heads - h), first = (r * heads + h) * size;
      qm_expand(x, args->x.data, args->x.dtype, first, n * size);
      for (int64_t i = 0; i < n; i++) rotate(x + i * size, cosines, sines, sign, half);
      qm_narrow(x, args->out.data, args->out.dtype, first, n * size);
    }
  }
  return QM_OK;
}
