/* adam.c - AdamW and Adam's direction, in blocks, one pass over memory.
**
** Reference: kernels/reference/adam.c, equal bit for bit (IEEE sqrt and divide, no contraction).
** Cost:      f32 moments and parameter: reads 16 and writes 12 bytes an element, memory bound; bf16
**            states move less but draw a Philox word.
*/
#include "adam.h"

#include "noise.h"
#include "vector.h"

/* Below this many elements a team of threads costs more than it brings. */
enum { SERIAL_MAX = 1 << 15 };

/* Store a block: bf16 rounds stochastically with what `bits` takes from the words. */
static inline void store(const float *restrict x, const qm_array *out, int64_t i, int64_t n,
                         const uint32_t *restrict words, uint32_t (*bits)(uint32_t)) {
  if (out->dtype == QM_F32) {
    memcpy((float *)out->data + i, x, (size_t)n * sizeof *x);
    return;
  }
  uint16_t *restrict half = (uint16_t *)out->data + i;
  for (int64_t j = 0; j < n; j++) half[j] = qm_to_bf16_stochastic(x[j], bits(words[j]));
}

/* Advance n moments from element i on, whose random words are there; u receives the direction, g
** where there are no moments. */
static void advance(float *restrict u, const qm_array *grad, const qm_array *exp_avg,
                    const qm_array *exp_avg_sq, int64_t i, int64_t n, const qm_adam_numbers *c,
                    const uint32_t *words) {
  float g[QM_BLOCK], m[QM_BLOCK], v[QM_BLOCK];
  qm_expand(g, grad->data, grad->dtype, i, n);
  if (exp_avg->data == NULL) {
    for (int64_t j = 0; j < n; j++) u[j] = c->grad_scale * g[j];
    return;
  }
  qm_expand(m, exp_avg->data, exp_avg->dtype, i, n);
  qm_expand(v, exp_avg_sq->data, exp_avg_sq->dtype, i, n);
  for (int64_t j = 0; j < n; j++) u[j] = qm_adam_advance(c, g[j], &m[j], &v[j]);
  store(m, exp_avg, i, n, words, qm_exp_avg_bits);
  store(v, exp_avg_sq, i, n, words, qm_exp_avg_sq_bits);
}

/* True where something is stored in bf16 and takes random words. */
static int draws(const qm_array *exp_avg, const qm_array *exp_avg_sq, int32_t param_dtype) {
  return param_dtype == QM_BF16 ||
         (exp_avg->data != NULL && (exp_avg->dtype == QM_BF16 || exp_avg_sq->dtype == QM_BF16));
}
/* The words of n elements from i on, in `buffer`; NULL where nothing takes any. */
static const uint32_t *draw(uint32_t buffer[QM_BLOCK], int random, const qm_noise *noise, int64_t i,
                            int64_t n) {
  if (!random) return NULL;
  qm_noise_words(buffer, noise, (uint64_t)i, n);
  return buffer;
}

static void take_step(const qm_adamw_item *step) {
  const int32_t is_direction = step->exp_avg.data == NULL;
  const qm_adam_source source =
      qm_adam_source_of(&step->adam, step->live.data, step->scale.data, is_direction);
  const qm_adam_numbers c = qm_adam_in_force(&source);
  const qm_noise noise = qm_adam_noise(&c, QM_STREAM_EXP_AVG);
  const int random = draws(&step->exp_avg, &step->exp_avg_sq, step->param.dtype);
  const int64_t count = step->param.count;
  if (c.skip) return;
#pragma omp parallel for schedule(static) if (count > SERIAL_MAX)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float u[QM_BLOCK], w[QM_BLOCK];
    uint32_t buffer[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    const uint32_t *words = draw(buffer, random, &noise, i, n);
    advance(u, &step->grad, &step->exp_avg, &step->exp_avg_sq, i, n, &c, words);
    qm_expand(w, step->param.data, step->param.dtype, i, n);
    for (int64_t j = 0; j < n; j++) w[j] = qm_adam_move(&c, w[j], u[j]);
    store(w, &step->param, i, n, words, qm_weight_bits);
  }
}

int32_t QM_CPU(adamw)(void *context, const qm_adamw_args *args) {
  (void)context;
  for (int64_t i = 0; i < args->count; i++) take_step(&args->step[i]);
  return QM_OK;
}

int32_t QM_CPU(adam_direction)(void *context, const qm_adam_direction_args *args) {
  (void)context;
  const qm_adam_source source =
      qm_adam_source_of(&args->adam, args->live.data, args->scale.data, 0);
  const qm_adam_numbers c = qm_adam_in_force(&source);
  const qm_noise noise = qm_adam_noise(&c, QM_STREAM_EXP_AVG);
  const int random = draws(&args->exp_avg, &args->exp_avg_sq, QM_F32);
  const int64_t count = args->update.count;
  if (c.skip) memset(args->update.data, 0, (size_t)count * sizeof(float));
  if (c.skip) return QM_OK;
#pragma omp parallel for schedule(static) if (count > SERIAL_MAX)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    uint32_t buffer[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    const uint32_t *words = draw(buffer, random, &noise, i, n);
    advance((float *)args->update.data + i, &args->grad, &args->exp_avg, &args->exp_avg_sq, i, n,
            &c, words);
  }
  return QM_OK;
}
