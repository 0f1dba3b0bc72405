/* mpq_bie.h - bitorch-engine's update step, element by element: what its kernels, which walk
** columns, blocks of columns and groups, must round alike. T is the moments' type (the
** direction's, where
** no moments are given); every operation is f32's, rounded to T. */
#ifndef QM_MPQ_BIE_H
#define QM_MPQ_BIE_H

#include "mpq.h"

typedef struct qm_bie_step {
  const qm_mpq_update_bie_args *args;
  int32_t dtype;      /* T */
  int32_t pack_dtype; /* promote(T, the scales' type) */
  qm_adam_numbers numbers;
} qm_bie_step;

/* The step with the numbers that qm_adam_in_force gave. */
QM_INLINE qm_bie_step qm_bie_step_of(const qm_mpq_update_bie_args *args,
                                     const qm_adam_numbers *numbers) {
  const int32_t dtype = args->exp_avg.data != NULL ? args->exp_avg.dtype : args->grad.dtype;
  const int32_t pack_dtype = dtype == args->q.scales.dtype ? dtype : QM_F32;
  const qm_bie_step step = {args, dtype, pack_dtype, *numbers};
  return step;
}

QM_INLINE float qm_bie_ratio(const qm_bie_step *step, float m, float v) {
  const int32_t type = step->dtype;
  const float d = qm_round_to(type, qm_round_to(type, sqrtf(v)) + step->numbers.eps);
  return qm_round_to(type, m / d);
}
/* The direction u of one element, from its moments as they are. */
QM_INLINE float qm_bie_standing(const qm_bie_step *step, int64_t at) {
  const qm_mpq_update_bie_args *args = step->args;
  if (args->exp_avg.data == NULL) return qm_load(args->grad.data, args->grad.dtype, at);
  return qm_bie_ratio(step, qm_load(args->exp_avg.data, step->dtype, at),
                      qm_load(args->exp_avg_sq.data, step->dtype, at));
}
/* Move the moments of one element; the direction u. */
QM_INLINE float qm_bie_direction(const qm_bie_step *step, int64_t at) {
  const qm_mpq_update_bie_args *args = step->args;
  const qm_adam_numbers *c = &step->numbers;
  const int32_t type = step->dtype;
  const float grad = qm_load(args->grad.data, args->grad.dtype, at);
  if (args->exp_avg.data == NULL) return grad;
  const float g = grad * c->grad_scale;
  float m = qm_round_to(type, c->beta1 * qm_load(args->exp_avg.data, type, at));
  m = qm_round_to(type, m + c->one_minus_beta1 * g);
  float v = qm_round_to(type, c->beta2 * qm_load(args->exp_avg_sq.data, type, at));
  v = qm_round_to(type, v + c->one_minus_beta2 * g * g);
  qm_store(args->exp_avg.data, type, at, m);
  qm_store(args->exp_avg_sq.data, type, at, v);
  return qm_bie_ratio(step, m, v);
}

/* The weight as the original unpacks it: a number of the scales' type, then of T. */
QM_INLINE float qm_bie_decode(const qm_bie_step *step, float code, float scale, float zero) {
  const qm_mpq_view *q = &step->args->q;
  const int32_t dtype = q->scales.dtype;
  const float w = q->asym ? scale * (code - zero) : qm_round_to(dtype, code * scale) - zero;
  return qm_round_to(step->dtype, qm_round_to(dtype, w));
}

QM_INLINE uint32_t qm_bie_encode(const qm_bie_step *step, int32_t w_bit, float w, float scale,
                                 float zero) {
  const qm_mpq_view *q = &step->args->q;
  const int32_t type = step->pack_dtype;
  const float y = q->asym ? qm_round_to(type, qm_round_to(type, w / scale) + zero)
                          : qm_round_to(type, qm_round_to(type, w + zero) / scale);
  const float top = (float)qm_mpq_mask(w_bit), code = rintf(y);
  return !(code > 0.0f) ? 0u : code > top ? (uint32_t)top : (uint32_t)code;
}

/* What a row adds to its group's mean: u (sym) or zero + a u (asym). */
QM_INLINE float qm_bie_mean_term(const qm_bie_step *step, float u, float zero) {
  return step->args->q.asym ? qm_round_to(step->dtype, zero + step->numbers.rate * u) : u;
}

/* A group's zero moved by the mean of its terms. asym: toward zero, and may leave the grid. */
QM_INLINE float qm_bie_moved_zero(const qm_bie_step *step, float zero, double sum, int64_t count) {
  if (count == 0) return zero;
  const float mean = qm_round_to(step->dtype, (float)(sum / (double)count));
  if (!step->args->q.asym) return zero + qm_round_to(step->dtype, step->numbers.rate * mean);
  return fabsf(mean) < 0x1p62f ? truncf(mean) : zero;
}
/* Move group g's zero of column n; a zero point wraps modulo 2^w_bit. */
QM_INLINE void qm_bie_move_zero(const qm_bie_step *step, int64_t g, int64_t n, double sum,
                                int64_t count) {
  const qm_mpq_view *q = &step->args->q;
  const float zero = qm_bie_moved_zero(step, qm_mpq_zero(q, g, n), sum, count);
  if (q->asym)
    qm_mpq_set_zero_point(q, g, n, (int64_t)zero);
  else
    qm_store(q->zeros.data, q->zeros.dtype, g * q->n + n, zero);
}

#endif
