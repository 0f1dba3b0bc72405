/* adam.c - AdamW and Adam's direction, in blocks, one pass over memory.
**
** Reference: kernels/reference/adam.c, equal bit for bit (IEEE sqrt and divide, no contraction).
** Cost:      f32 moments and parameter: reads 16 and writes 12 bytes an element, memory bound; bf16
**            states move less but draw Philox words, ten rounds for four elements of each state.
*/
#include "adam.h"

#include "noise.h"
#include "vector.h"

/* Below this many elements a team of threads costs more than it brings. */
enum { SERIAL_MAX = 1 << 15 };

/* Store a block: bf16 rounds stochastically with the random bits of elements i .. i + n - 1. */
static void store(const float *restrict x, const qm_array *out, int64_t i, int64_t n,
                  const qm_noise *base, uint32_t stream) {
  if (out->dtype == QM_F32) {
    memcpy((float *)out->data + i, x, (size_t)n * sizeof *x);
    return;
  }
  qm_noise noise = *base;
  noise.stream = stream;
  uint32_t bits[QM_BLOCK];
  qm_noise_words(bits, &noise, (uint64_t)i, n);
  uint16_t *restrict half = (uint16_t *)out->data + i;
  for (int64_t j = 0; j < n; j++) half[j] = qm_to_bf16_stochastic(x[j], bits[j]);
}

/* Advance n moments from element i on; u receives the direction. */
static void advance(float *restrict u, const qm_array *grad, const qm_array *exp_avg,
                    const qm_array *exp_avg_sq, int64_t i, int64_t n, const qm_adam_numbers *c,
                    const qm_noise *noise) {
  float g[QM_BLOCK], m[QM_BLOCK], v[QM_BLOCK];
  qm_expand(g, grad->data, grad->dtype, i, n);
  qm_expand(m, exp_avg->data, exp_avg->dtype, i, n);
  qm_expand(v, exp_avg_sq->data, exp_avg_sq->dtype, i, n);
  for (int64_t j = 0; j < n; j++) {
    const float scaled = c->grad_scale * g[j];
    m[j] = c->beta1 * m[j] + c->rest1 * scaled;
    v[j] = c->beta2 * v[j] + c->rest2 * scaled * scaled;
    u[j] = m[j] / (sqrtf(v[j]) + c->eps);
  }
  store(m, exp_avg, i, n, noise, QM_STREAM_EXP_AVG);
  store(v, exp_avg_sq, i, n, noise, QM_STREAM_EXP_AVG_SQ);
}

int32_t QM_CPU(adamw)(void *context, const qm_adamw_args *args) {
  (void)context;
  const qm_adam_numbers c = qm_adam_prepare(&args->adam);
  const int64_t count = args->param.count;
#pragma omp parallel for schedule(static) if (count > SERIAL_MAX)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float u[QM_BLOCK], w[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    advance(u, &args->grad, &args->exp_avg, &args->exp_avg_sq, i, n, &c, &args->adam.noise);
    qm_expand(w, args->param.data, args->param.dtype, i, n);
    for (int64_t j = 0; j < n; j++) w[j] = w[j] - c.rate * u[j] - c.decay * w[j];
    store(w, &args->param, i, n, &args->adam.noise, QM_STREAM_WEIGHT);
  }
  return QM_OK;
}

int32_t QM_CPU(adam_direction)(void *context, const qm_adam_direction_args *args) {
  (void)context;
  const qm_adam_numbers c = qm_adam_prepare(&args->adam);
  const int64_t count = args->update.count;
#pragma omp parallel for schedule(static) if (count > SERIAL_MAX)
  for (int64_t i = 0; i < count; i += QM_BLOCK)
    advance((float *)args->update.data + i, &args->grad, &args->exp_avg, &args->exp_avg_sq, i,
            QM_MIN(QM_BLOCK, count - i), &c, &args->adam.noise);
  return QM_OK;
}
