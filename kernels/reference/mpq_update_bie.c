/* mpq_update_bie.c - bitorch-engine's update step, to the bit, quirks included.
**
** Nearest rounding drops every step below half a code; weight decay is ignored; zeros move at every
** fifth step: asym by the truncated group mean of zero + a u, without the factor 1 / scale,
** wrapping modulo 2^w_bit and after the codes were packed with the old ones; sym by a mean(u),
** before packing.
**
** Where the original cannot run (symmetric with g_idx, no q_perm, no g_idx, uneven groups) this is
** the same mathematics. f32 arithmetic; each operation rounds to T, the moments' type (the
** direction's, where no moments are given). Group means are summed in double.
*/
#include <stdlib.h>

#include "mpq_bie.h"
#include "reference.h"

/* Move column n's zeros by its groups' means. */
static void move_zeros(const qm_bie_step *step, int64_t n, const float *u) {
  const qm_mpq_view *q = &step->args->q;
  for (int64_t g = 0; g < q->groups; g++) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t p = 0; p < q->k; p++) {
      if (qm_mpq_group(q, p) != g) continue;
      sum += (double)qm_bie_mean_term(step, u[p], qm_mpq_zero(q, g, n));
      count++;
    }
    qm_bie_move_zero(step, g, n, sum, count);
  }
}

/* One column: every group's rows lie in it. */
static void update_column(const qm_bie_step *step, int64_t n, float *w, float *u) {
  const qm_mpq_view *q = &step->args->q;
  const int moves_zeros = step->numbers.noise.step % 5 == 0;
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t g = qm_mpq_group(q, p);
    const float code = (float)qm_mpq_code(q, p, n);
    u[p] = qm_bie_direction(step, qm_mpq_feature(q, p) * q->n + n);
    w[p] = qm_bie_decode(step, code, qm_mpq_scale(q, g, n), qm_mpq_zero(q, g, n));
    w[p] = qm_round_to(step->dtype, w[p] + -step->numbers.rate * u[p]);
  }
  if (moves_zeros && !q->asym) move_zeros(step, n, u);
  for (int64_t p = 0; p < q->k; p++) {
    const int64_t g = qm_mpq_group(q, p);
    const int32_t w_bit = qm_mpq_section_of(q, p)->w_bit;
    qm_mpq_set_code(q, p, n,
                    qm_bie_encode(step, w_bit, w[p], qm_mpq_scale(q, g, n), qm_mpq_zero(q, g, n)));
  }
  if (moves_zeros && q->asym) move_zeros(step, n, u);
}

int32_t qm_reference_mpq_update_bie(void *context, const qm_mpq_update_bie_args *args) {
  (void)context;
  const qm_adam_source source =
      qm_adam_source_of(&args->adam, args->live.data, args->scale.data, args->exp_avg.data == NULL);
  const qm_adam_numbers numbers = qm_adam_in_force(&source);
  if (numbers.skip) return QM_OK;
  const qm_bie_step step = qm_bie_step_of(args, &numbers);
  const size_t k = (size_t)args->q.k;
  float *columns = malloc(2 * k * sizeof *columns + 1);
  if (columns == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  for (int64_t n = 0; n < args->q.n; n++) update_column(&step, n, columns, columns + k);
  free(columns);
  return QM_OK;
}
