/* adam.c - AdamW and Adam's direction, in blocks, one pass over memory.
**
** Reference: kernels/reference/adam.c, equal bit for bit (IEEE sqrt and divide, no contraction).
** Cost:      f32 moments and parameter: reads 16 and writes 12 bytes an element, memory bound; bf16
**            states move less but draw Philox words, one for both moments, one for a parameter.
*/
#include "adam.h"

#include "noise.h"
#include "vector.h"

/* Below this many elements a team of threads costs more than it brings. */
enum { SERIAL_MAX = 1 << 15 };

static void draw(uint32_t *restrict words, const qm_noise *base, uint32_t stream, int64_t i,
                 int64_t n) {
  qm_noise noise = *base;
  noise.stream = stream;
  qm_noise_words(words, &noise, (uint64_t)i, n);
}

/* Store a block: bf16 rounds stochastically with the low halves of `words`. */
static void store(const float *restrict x, const qm_array *out, int64_t i, int64_t n,
                  const uint32_t *restrict words) {
  if (out->dtype == QM_F32) {
    memcpy((float *)out->data + i, x, (size_t)n * sizeof *x);
    return;
  }
  uint16_t *restrict half = (uint16_t *)out->data + i;
  for (int64_t j = 0; j < n; j++) half[j] = qm_to_bf16_stochastic(x[j], words[j]);
}

/* Advance n moments from element i on; u receives the direction. */
static void advance(float *restrict u, const qm_array *grad, const qm_array *exp_avg,
                    const qm_array *exp_avg_sq, int64_t i, int64_t n, const qm_adam_numbers *c,
                    const qm_noise *noise) {
  float g[QM_BLOCK], m[QM_BLOCK], v[QM_BLOCK];
  uint32_t words[QM_BLOCK], words_sq[QM_BLOCK];
  qm_expand(g, grad->data, grad->dtype, i, n);
  qm_expand(m, exp_avg->data, exp_avg->dtype, i, n);
  qm_expand(v, exp_avg_sq->data, exp_avg_sq->dtype, i, n);
  for (int64_t j = 0; j < n; j++) {
    const float scaled = c->grad_scale * g[j];
    m[j] = c->beta1 * m[j] + c->rest1 * scaled;
    v[j] = c->beta2 * v[j] + c->rest2 * scaled * scaled;
    u[j] = m[j] / (sqrtf(v[j]) + c->eps);
  }
  if (exp_avg->dtype == QM_BF16 || exp_avg_sq->dtype == QM_BF16) {
    draw(words, noise, QM_STREAM_EXP_AVG, i, n);
    for (int64_t j = 0; j < n; j++) {
      words_sq[j] = qm_exp_avg_sq_bits(words[j]);
      words[j] = qm_exp_avg_bits(words[j]);
    }
  }
  store(m, exp_avg, i, n, words);
  store(v, exp_avg_sq, i, n, words_sq);
}

int32_t QM_CPU(adamw)(void *context, const qm_adamw_args *args) {
  (void)context;
  const qm_adam_numbers c = qm_adam_prepare(&args->adam);
  const int64_t count = args->param.count;
#pragma omp parallel for schedule(static) if (count > SERIAL_MAX)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float u[QM_BLOCK], w[QM_BLOCK];
    uint32_t words[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    advance(u, &args->grad, &args->exp_avg, &args->exp_avg_sq, i, n, &c, &args->adam.noise);
    qm_expand(w, args->param.data, args->param.dtype, i, n);
    for (int64_t j = 0; j < n; j++) w[j] = w[j] - c.rate * u[j] - c.decay * w[j];
    if (args->param.dtype == QM_BF16) draw(words, &args->adam.noise, QM_STREAM_WEIGHT, i, n);
    store(w, &args->param, i, n, words);
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
