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

static void draw(uint32_t *restrict words, const qm_adam_numbers *c, uint32_t stream, int64_t i,
                 int64_t n) {
  const qm_noise noise = qm_adam_noise(c, stream);
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

/* Advance n moments from element i on; u receives the direction, g where there are none. */
static void advance(float *restrict u, const qm_array *grad, const qm_array *exp_avg,
                    const qm_array *exp_avg_sq, int64_t i, int64_t n, const qm_adam_numbers *c) {
  float g[QM_BLOCK], m[QM_BLOCK], v[QM_BLOCK];
  uint32_t words[QM_BLOCK], words_sq[QM_BLOCK];
  qm_expand(g, grad->data, grad->dtype, i, n);
  if (exp_avg->data == NULL) {
    for (int64_t j = 0; j < n; j++) u[j] = c->grad_scale * g[j];
    return;
  }
  qm_expand(m, exp_avg->data, exp_avg->dtype, i, n);
  qm_expand(v, exp_avg_sq->data, exp_avg_sq->dtype, i, n);
  for (int64_t j = 0; j < n; j++) u[j] = qm_adam_advance(c, g[j], &m[j], &v[j]);
  if (exp_avg->dtype == QM_BF16 || exp_avg_sq->dtype == QM_BF16) {
    draw(words, c, QM_STREAM_EXP_AVG, i, n);
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
  const int32_t is_direction = args->exp_avg.data == NULL;
  const qm_adam_source source =
      qm_adam_source_of(&args->adam, args->live.data, args->scale.data, is_direction);
  const qm_adam_numbers c = qm_adam_in_force(&source);
  const int64_t count = args->param.count;
  if (c.skip) return QM_OK;
#pragma omp parallel for schedule(static) if (count > SERIAL_MAX)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float u[QM_BLOCK], w[QM_BLOCK];
    uint32_t words[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    advance(u, &args->grad, &args->exp_avg, &args->exp_avg_sq, i, n, &c);
    qm_expand(w, args->param.data, args->param.dtype, i, n);
    for (int64_t j = 0; j < n; j++) w[j] = qm_adam_move(&c, w[j], u[j]);
    if (args->param.dtype == QM_BF16) draw(words, &c, QM_STREAM_WEIGHT, i, n);
    store(w, &args->param, i, n, words);
  }
  return QM_OK;
}

int32_t QM_CPU(adam_direction)(void *context, const qm_adam_direction_args *args) {
  (void)context;
  const qm_adam_source source =
      qm_adam_source_of(&args->adam, args->live.data, args->scale.data, 0);
  const qm_adam_numbers c = qm_adam_in_force(&source);
  const int64_t count = args->update.count;
  if (c.skip) memset(args->update.data, 0, (size_t)count * sizeof(float));
  if (c.skip) return QM_OK;
#pragma omp parallel for schedule(static) if (count > SERIAL_MAX)
  for (int64_t i = 0; i < count; i += QM_BLOCK)
    advance((float *)args->update.data + i, &args->grad, &args->exp_avg, &args->exp_avg_sq, i,
            QM_MIN(QM_BLOCK, count - i), &c);
  return QM_OK;
}
