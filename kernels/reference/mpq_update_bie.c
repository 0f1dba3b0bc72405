/* mpq_update_bie.c - bitorch-engine's update step, to the bit, quirks included.
**
** Nearest rounding drops every step below half a code; weight decay is ignored; zeros move at every
** fifth step: asym by the truncated group mean of zero + a u, without the factor 1 / scale,
** wrapping
** modulo 2^w_bit and after the codes were packed with the old ones; sym by a mean(u), before
** packing.
** Where the original cannot run (symmetric with g_idx, no q_perm, no g_idx, uneven groups) this is
** the same mathematics. f32 arithmetic; each operation rounds to T, the moments' type (the
** direction's, where no moments are given). Group means are summed in double.
*/
#include <stdlib.h>

#include "mpq.h"
#include "reference.h"

typedef struct bie_step {
  const qm_mpq_update_bie_args *args;
  int32_t dtype;      /* T */
  int32_t pack_dtype; /* promote(T, the scales' type) */
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, rate;
} bie_step;

static bie_step step_of(const qm_mpq_update_bie_args *args) {
  const qm_adam *adam = &args->adam;
  const double t = (double)adam->step;
  const double correction =
      adam->correct_bias ? sqrt(1.0 - pow(adam->beta2, t)) / (1.0 - pow(adam->beta1, t)) : 1.0;
  const int32_t dtype = args->exp_avg.data != NULL ? args->exp_avg.dtype : args->grad.dtype;
  return (bie_step){
      .args = args,
      .dtype = dtype,
      .pack_dtype = dtype == args->q.scales.dtype ? dtype : QM_F32,
      .beta1 = (float)adam->beta1,
      .one_minus_beta1 = (float)(1.0 - adam->beta1),
      .beta2 = (float)adam->beta2,
      .one_minus_beta2 = (float)(1.0 - adam->beta2),
      .eps = (float)adam->eps,
      .rate = (float)(adam->lr * correction),
  };
}

/* Move the moments of one element; the direction u. */
static float direction(const bie_step *step, int64_t at) {
  const qm_mpq_update_bie_args *args = step->args;
  const int32_t type = step->dtype;
  const float grad = qm_load(args->grad.data, args->grad.dtype, at);
  if (args->exp_avg.data == NULL) return grad;
  const float g = args->adam.grad_scale == 1.0 ? grad : grad * (float)args->adam.grad_scale;
  float m = qm_round_to(type, step->beta1 * qm_load(args->exp_avg.data, type, at));
  m = qm_round_to(type, m + step->one_minus_beta1 * g);
  float v = qm_round_to(type, step->beta2 * qm_load(args->exp_avg_sq.data, type, at));
  v = qm_round_to(type, v + step->one_minus_beta2 * g * g);
  qm_store(args->exp_avg.data, type, at, m);
  qm_store(args->exp_avg_sq.data, type, at, v);
  const float d = qm_round_to(type, qm_round_to(type, sqrtf(v)) + step->eps);
  return qm_round_to(type, m / d);
}

/* The weight as the original unpacks it: a number of the scales' type, then of T. */
static float decode(const bie_step *step, float code, float scale, float zero) {
  const qm_mpq_view *q = &step->args->q;
  const int32_t dtype = q->scales.dtype;
  const float w = q->asym ? scale * (code - zero) : qm_round_to(dtype, code * scale) - zero;
  return qm_round_to(step->dtype, qm_round_to(dtype, w));
}

static uint32_t encode(const bie_step *step, float w, float scale, float zero) {
  const qm_mpq_view *q = &step->args->q;
  const int32_t type = step->pack_dtype;
  const float y = q->asym ? qm_round_to(type, qm_round_to(type, w / scale) + zero)
                          : qm_round_to(type, qm_round_to(type, w + zero) / scale);
  const float top = (float)qm_mpq_mask(q->w_bit), code = rintf(y);
  return !(code > 0.0f) ? 0u : code > top ? (uint32_t)top : (uint32_t)code;
}

/* Group means over column n of u (sym) or of zero + a u (asym), in T. */
static void group_means(const bie_step *step, int64_t n, const float *u, float *means,
                        int64_t *counts) {
  const qm_mpq_view *q = &step->args->q;
  for (int64_t g = 0; g < q->groups; g++) {
    double sum = 0.0;
    counts[g] = 0;
    for (int64_t p = 0; p < q->k; p++) {
      if (qm_mpq_group(q, p) != g) continue;
      const float zero = q->asym ? qm_mpq_zero(q, g, n) : 0.0f;
      const float term = q->asym ? qm_round_to(step->dtype, zero + step->rate * u[p]) : u[p];
      sum += (double)term;
      counts[g]++;
    }
    means[g] = counts[g] == 0 ? 0.0f : qm_round_to(step->dtype, (float)(sum / (double)counts[g]));
  }
}

static void move_zeros_sym(const bie_step *step, int64_t n, const float *means) {
  const qm_mpq_view *q = &step->args->q;
  for (int64_t g = 0; g < q->groups; g++) {
    const float moved = qm_mpq_zero(q, g, n) + qm_round_to(step->dtype, step->rate * means[g]);
    qm_store(q->zeros.data, q->zeros.dtype, g * q->n + n, moved);
  }
}

static void move_zeros_asym(const bie_step *step, int64_t n, const float *means,
                            const int64_t *counts) {
  const qm_mpq_view *q = &step->args->q;
  for (int64_t g = 0; g < q->groups; g++)
    if (counts[g] > 0 && fabsf(means[g]) < 0x1p62f)
      qm_mpq_set_zero_point(q, g, n, (int64_t)truncf(means[g]));
}

/* One column: every group's rows lie in it. */
static void update_column(const bie_step *step, int64_t n, float *w, float *u, float *means,
                          int64_t *counts) {
  const qm_mpq_view *q = &step->args->q;
  const int move_zeros = step->args->adam.step % 5 == 0;
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t g = qm_mpq_group(q, p);
    const float code = (float)qm_mpq_field(q->data.data, q->w_bit, q->n, p, n);
    u[p] = direction(step, qm_mpq_feature(q, p) * q->n + n);
    w[p] = decode(step, code, qm_mpq_scale(q, g, n), qm_mpq_zero(q, g, n));
    w[p] = qm_round_to(step->dtype, w[p] + -step->rate * u[p]);
  }
  if (move_zeros) group_means(step, n, u, means, counts);
  if (move_zeros && !q->asym) move_zeros_sym(step, n, means);
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t g = qm_mpq_group(q, p);
    const uint32_t code = encode(step, w[p], qm_mpq_scale(q, g, n), qm_mpq_zero(q, g, n));
    qm_mpq_set_field(q->data.data, q->w_bit, q->n, p, n, code);
  }
  if (move_zeros && q->asym) move_zeros_asym(step, n, means, counts);
}

int32_t qm_reference_mpq_update_bie(void *context, const qm_mpq_update_bie_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  const bie_step step = step_of(args);
  const size_t k = (size_t)q->k, groups = (size_t)q->groups;
  float *columns = malloc((2 * k + groups) * sizeof *columns + 1);
  int64_t *counts = malloc(groups * sizeof *counts + 1);
  int32_t status = QM_OK;
  if (columns == NULL || counts == NULL)
    status = qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  for (int64_t n = 0; n < q->n && status == QM_OK; n++)
    update_column(&step, n, columns, columns + k, columns + 2 * k, counts);
  free(columns);
  free(counts);
  return status;
}
