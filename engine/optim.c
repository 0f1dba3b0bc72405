/* optim.c - optimizer steps on dense parameters: operands checked, then dispatched. */
#include "internal.h"

qm_adam qm__adam(qm__call *call, const qm_adam *adam) {
  qm_adam checked = {0};
  qm__require(call, adam != NULL, "argument 'adam': expected the step's numbers, got nothing");
  if (adam == NULL) return checked;
  checked = *adam;
  checked.noise.step = (uint32_t)checked.step;
  qm__require(call, adam->step >= 1, "argument 'step': expected at least 1, got %lld",
              (long long)adam->step);
  qm__require(call,
              adam->beta1 >= 0.0 && adam->beta1 < 1.0 && adam->beta2 >= 0.0 && adam->beta2 < 1.0,
              "argument 'betas': expected both in [0, 1), got %g and %g", adam->beta1, adam->beta2);
  qm__require(call, adam->eps >= 0.0, "argument 'eps': expected at least 0, got %g", adam->eps);
  return checked;
}

int32_t qm_adamw(const qm_tensor *param, const qm_tensor *grad, const qm_tensor *exp_avg,
                 const qm_tensor *exp_avg_sq, const qm_adam *adam) {
  qm__call call = qm__begin("qm_adamw");
  qm_adamw_args args;
  qm__operand(&call, "param", param, "f32|bf16 [...]", QM__WRITE, &args.param);
  qm__operand(&call, "grad", grad, "float [...]", QM__READ, &args.grad);
  qm__operand(&call, "exp_avg", exp_avg, "f32|bf16 [...]", QM__WRITE, &args.exp_avg);
  qm__operand(&call, "exp_avg_sq", exp_avg_sq, "f32|bf16 [...]", QM__WRITE, &args.exp_avg_sq);
  qm__same_shape(&call, "grad", &args.param, &args.grad);
  qm__same_shape(&call, "exp_avg", &args.param, &args.exp_avg);
  qm__same_shape(&call, "exp_avg_sq", &args.param, &args.exp_avg_sq);
  args.adam = qm__adam(&call, adam);
  return QM__DISPATCH(call, adamw, &args);
}

int32_t qm_adam_direction(const qm_tensor *grad, const qm_tensor *exp_avg,
                          const qm_tensor *exp_avg_sq, const qm_tensor *update,
                          const qm_adam *adam) {
  qm__call call = qm__begin("qm_adam_direction");
  qm_adam_direction_args args;
  qm__operand(&call, "grad", grad, "float [...]", QM__READ, &args.grad);
  qm__operand(&call, "exp_avg", exp_avg, "f32|bf16 [...]", QM__WRITE, &args.exp_avg);
  qm__operand(&call, "exp_avg_sq", exp_avg_sq, "f32|bf16 [...]", QM__WRITE, &args.exp_avg_sq);
  qm__operand(&call, "update", update, "f32 [...]", QM__WRITE, &args.update);
  qm__same_shape(&call, "exp_avg", &args.grad, &args.exp_avg);
  qm__same_shape(&call, "exp_avg_sq", &args.grad, &args.exp_avg_sq);
  qm__same_shape(&call, "update", &args.grad, &args.update);
  args.adam = qm__adam(&call, adam);
  return QM__DISPATCH(call, adam_direction, &args);
}
