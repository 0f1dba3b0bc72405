/* adam.c - AdamW on a dense parameter, and Adam's direction alone.
** Source: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101. */
#include "adam.h"

#include "reference.h"

/* Store a state: bf16 goes up or down with the probability that keeps its expected value, for
** rounded to nearest, v with beta2 = 0.999 would stop moving. */
static void store(const qm_array *out, int64_t i, float x, uint32_t random) {
  if (out->dtype == QM_BF16)
    ((uint16_t *)out->data)[i] = qm_to_bf16_stochastic(x, random);
  else
    ((float *)out->data)[i] = x;
}

static uint32_t random_bits(const qm_adam_numbers *c, int64_t i) {
  const qm_noise noise = qm_adam_noise(c, QM_STREAM_EXP_AVG);
  return qm_bits(&noise, (uint64_t)i);
}

/* Advance both moments of element i; returns the direction u, which is g where there are none. */
static float advance(const qm_array *grad, const qm_array *exp_avg, const qm_array *exp_avg_sq,
                     int64_t i, const qm_adam_numbers *c) {
  const float g = qm_load(grad->data, grad->dtype, i);
  if (exp_avg->data == NULL) return c->grad_scale * g;
  float m = qm_load(exp_avg->data, exp_avg->dtype, i);
  float v = qm_load(exp_avg_sq->data, exp_avg_sq->dtype, i);
  const float u = qm_adam_advance(c, g, &m, &v);
  const uint32_t random = random_bits(c, i);
  store(exp_avg, i, m, qm_exp_avg_bits(random));
  store(exp_avg_sq, i, v, qm_exp_avg_sq_bits(random));
  return u;
}

static void take_step(const qm_adamw_item *step) {
  const int32_t is_direction = step->exp_avg.data == NULL;
  const qm_adam_source source =
      qm_adam_source_of(&step->adam, step->live.data, step->scale.data, is_direction);
  const qm_adam_numbers c = qm_adam_in_force(&source);
  if (c.skip) return;
  for (int64_t i = 0; i < step->param.count; i++) {
    const float u = advance(&step->grad, &step->exp_avg, &step->exp_avg_sq, i, &c);
    const float w = qm_load(step->param.data, step->param.dtype, i);
    store(&step->param, i, qm_adam_move(&c, w, u), qm_weight_bits(random_bits(&c, i)));
  }
}

int32_t qm_reference_adamw(void *context, const qm_adamw_args *args) {
  (void)context;
  for (int64_t i = 0; i < args->count; i++) take_step(&args->step[i]);
  return QM_OK;
}

int32_t qm_reference_adam_direction(void *context, const qm_adam_direction_args *args) {
  (void)context;
  const qm_adam_source source =
      qm_adam_source_of(&args->adam, args->live.data, args->scale.data, 0);
  const qm_adam_numbers c = qm_adam_in_force(&source);
  for (int64_t i = 0; i < args->update.count; i++)
    ((float *)args->update.data)[i] =
        c.skip ? 0.0f : advance(&args->grad, &args->exp_avg, &args->exp_avg_sq, i, &c);
  return QM_OK;
}
