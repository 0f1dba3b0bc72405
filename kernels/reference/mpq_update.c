/* mpq_update.c - one Adam step of a quantized parameter on its fixed grid.
**
** In code units: y = q + r / 2^rb is where the weight stands, d the step, q' the new code.
**   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g;  D = sqrt(v) + eps
**   d = -(a m / (D scale) + lr weight_decay (q - zero)): decoupled decay is inside, before rounding
**   nearest:    q' = round(q + d), halves to even
**   stochastic: q' = q + floor(d) + (random < d - floor(d)), never floor(d + random), which rounds
**   residual:   the same on q 2^rb + r and 2^rb d; q' is the nearest code, r' the rest
**   momentum:   e = scale (q + d - q') after clamping;
**               m -= (1 - beta1) / beta1 (1 - beta1^(t+1)) / lr_(t+1) D / sqrt(1 - beta2^t) e
** Source: Adam with decoupled decay, arXiv 1711.05101; momentum feedback (ECO), arXiv 2601.22101.
** Random bits: the word of element p * N + n (packed row p) of stream CODES, for the code and bf16
**              moments (see qm_exp_avg_bits).
** No operation here is fused, so that every device gives the same integers and moments.
*/
#include "mpq.h"
#include "reference.h"

typedef struct moments {
  float m, v, denominator;
} moments;

static moments advance(const qm_adam_numbers *step, float m, float v, float g) {
  moments next;
  next.m = step->beta1 * m + step->one_minus_beta1 * g;
  next.v = step->beta2 * v + step->one_minus_beta2 * g * g;
  next.denominator = sqrtf(next.v) + step->eps;
  return next;
}

/* The step in units of one code (times span->unit), kept where all sums are exact. */
static float limit(float x) {
  return x < -QM_MPQ_MOVE_MAX ? -QM_MPQ_MOVE_MAX : x > QM_MPQ_MOVE_MAX ? QM_MPQ_MOVE_MAX : x;
}

static void store_moment(const qm_array *moment, int64_t i, float x, uint32_t random) {
  if (moment->dtype == QM_BF16)
    ((uint16_t *)moment->data)[i] = qm_to_bf16_stochastic(x, random);
  else
    ((float *)moment->data)[i] = x;
}

static void update_element(const qm_mpq_update_args *args, const qm_adam_numbers *step,
                           const qm_mpq_span *span, int64_t p, int64_t n, int64_t health[4]) {
  const qm_mpq_view *q = &args->q;
  const int64_t at = qm_mpq_feature(q, p) * q->n + n, g = qm_mpq_group(q, p);
  const uint64_t element = (uint64_t)(p * q->n + n);
  const float scale = qm_mpq_scale(q, g, n);
  const float rate = qm_mpq_step_rate(step->rate, scale);
  const float zero = qm_mpq_step_zero(q->asym, scale, qm_mpq_zero(q, g, n));
  const float grad = qm_load(args->grad.data, args->grad.dtype, at) * step->grad_scale;
  const int32_t code = (int32_t)qm_mpq_code(q, p, n);
  const float decay = step->decay * ((float)code - zero);

  const int has_moments = args->exp_avg.data != NULL;
  moments next = {0};
  float d;
  if (has_moments) {
    next = advance(step, qm_load(args->exp_avg.data, args->exp_avg.dtype, at),
                   qm_load(args->exp_avg_sq.data, args->exp_avg_sq.dtype, at), grad);
    d = -(rate * next.m / next.denominator + decay);
  } else {
    d = -(rate * grad + decay);
  }
  health[0]++;
  if (!(fabsf(d) <= FLT_MAX && next.v <= FLT_MAX)) {
    health[3]++;
    return;
  }

  int32_t start = code << span->bits; /* in units of 1 / span->unit codes */
  if (span->bits > 0)
    start += (int32_t)qm_mpq_field(q->residual.data, span->bits, q->n, p, n) - span->half;
  const float move = limit(d * span->unit);
  const qm_noise noise = qm_adam_noise(step, QM_STREAM_CODES);
  const uint32_t random = qm_bits(&noise, element);
  float wanted = rintf((float)start + move);
  if (args->options.rounding == QM_ROUND_STOCHASTIC)
    wanted = (float)start + qm_mpq_stochastic(move, floorf(move), qm_uniform_of(random));
  const float got = wanted < span->low ? span->low : wanted > span->high ? span->high : wanted;
  const int32_t steps = (int32_t)got, new_code = (steps + span->half) >> span->bits;
  health[1] += new_code != code;
  health[2] += got != wanted;
  qm_mpq_set_code(q, p, n, (uint32_t)new_code);
  if (span->bits > 0)
    qm_mpq_set_field(q->residual.data, span->bits, q->n, p, n,
                     (uint32_t)(steps - (new_code << span->bits) + span->half));
  if (!has_moments) return;
  if (args->options.feedback == QM_FEEDBACK_MOMENTUM) {
    /* Beyond the grid's ends nothing is owed: paying it back would only wind the momentum up. */
    const float target = (float)start + move;
    const int inside = target >= span->low && target <= span->high;
    const float lost = inside ? scale * (move - (got - (float)start)) : 0.0f;
    next.m -= step->inject * next.denominator * lost;
  }
  store_moment(&args->exp_avg, at, next.m, qm_exp_avg_bits(random));
  store_moment(&args->exp_avg_sq, at, next.v, qm_exp_avg_sq_bits(random));
}

int32_t qm_reference_mpq_update(void *context, const qm_mpq_update_args *args) {
  (void)context;
  const qm_adam_source source = qm_adam_source_of(&args->options.adam, args->live.data,
                                                  args->scale.data, args->exp_avg.data == NULL);
  const qm_adam_numbers step = qm_adam_in_force(&source);
  int64_t health[4] = {0};
  if (step.skip) return QM_OK;
  for (int64_t p = 0; p < args->q.k; p++) {
    const qm_mpq_span span = qm_mpq_span_for(&args->q, qm_mpq_section_of(&args->q, p)->w_bit);
    for (int64_t n = 0; n < args->q.n; n++) update_element(args, &step, &span, p, n, health);
  }
  if (args->health.data != NULL)
    for (int i = 0; i < 4; i++) ((int64_t *)args->health.data)[i] += health[i];
  return QM_OK;
}
