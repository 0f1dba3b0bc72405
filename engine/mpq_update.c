/* mpq_update.c - update steps of quantized parameters: operands checked, then dispatched. */
#include <math.h>

#include "internal.h"

static qm_mpq_update_options check_options(qm__call *call, const qm_mpq_update_options *options,
                                           bool has_residual, bool has_moments, qm_array *live,
                                           qm_array *scale) {
  qm_mpq_update_options checked = {0};
  qm__require(call, options != NULL,
              "argument 'options': expected the step's options, got nothing");
  if (options == NULL) return checked;
  checked = *options;
  checked.adam = qm__adam(call, &options->adam, live, scale);
  const int32_t feedback = options->feedback;
  const bool is_live = options->adam.live != NULL;
  qm__require(call,
              options->rounding == QM_ROUND_NEAREST || options->rounding == QM_ROUND_STOCHASTIC,
              "argument 'rounding': expected one of QM_ROUND_*, got %d", options->rounding);
  qm__require(call, feedback >= QM_FEEDBACK_NONE && feedback <= QM_FEEDBACK_RESIDUAL,
              "argument 'feedback': expected one of QM_FEEDBACK_*, got %d", feedback);
  qm__require(call, feedback != QM_FEEDBACK_RESIDUAL || has_residual,
              "argument 'feedback': residual feedback needs a parameter with a residual");
  qm__require(call, feedback == QM_FEEDBACK_RESIDUAL || !has_residual,
              "argument 'feedback': expected residual feedback, for the parameter has a residual");
  qm__require(call, feedback != QM_FEEDBACK_MOMENTUM || has_moments,
              "argument 'feedback': momentum feedback needs the moments at the weight's own shape; "
              "for a projected gradient, give the parameter a residual");
  qm__require(call, feedback != QM_FEEDBACK_MOMENTUM || is_live || options->adam.beta1 > 0.0,
              "argument 'feedback': momentum feedback needs beta1 above 0");
  qm__require(call,
              is_live || (isfinite(options->adam.lr) && isfinite(options->adam.weight_decay) &&
                          options->adam.lr_next >= 0.0 && isfinite(options->adam.lr_next)),
              "argument 'lr': expected finite numbers, lr_next at least 0");
  return checked;
}

int32_t qm_mpq_update(const qm_mpq *q, const qm_tensor *grad, const qm_tensor *exp_avg,
                      const qm_tensor *exp_avg_sq, const qm_mpq_update_options *options,
                      const qm_tensor *health) {
  qm__call call = qm__begin("qm_mpq_update");
  qm_mpq_update_args args;
  qm__mpq(&call, q, QM__WRITE, QM__READ, &args.q);
  qm__operand(&call, "grad", grad, "float [K, N]", QM__READ, &args.grad);
  qm__moments(&call, exp_avg, exp_avg_sq, "f32|bf16 [K, N]", "=exp_avg [K, N]", &args.exp_avg,
              &args.exp_avg_sq);
  args.options = check_options(&call, options, args.q.residual.data != NULL, exp_avg != NULL,
                               &args.live, &args.scale);
  qm__optional(&call, "health", health, "i64 [4]", QM__WRITE, &args.health);
  return QM__DISPATCH(call, mpq_update, &args);
}

int32_t qm_mpq_update_bie(const qm_mpq *q, const qm_tensor *grad, const qm_tensor *exp_avg,
                          const qm_tensor *exp_avg_sq, const qm_adam *adam) {
  qm__call call = qm__begin("qm_mpq_update_bie");
  qm_mpq_update_bie_args args;
  qm__mpq(&call, q, QM__WRITE, QM__WRITE, &args.q);
  qm__operand(&call, "grad", grad, "float [K, N]", QM__READ, &args.grad);
  qm__moments(&call, exp_avg, exp_avg_sq, "float [K, N]", "=exp_avg [K, N]", &args.exp_avg,
              &args.exp_avg_sq);
  args.adam = qm__adam(&call, adam, &args.live, &args.scale);
  qm__require(&call, args.q.residual.data == NULL,
              "argument 'q': the original's step knows no residual, and this parameter has one");
  return QM__DISPATCH(call, mpq_update_bie, &args);
}
