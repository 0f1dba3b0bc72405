/* optim.c - optimizer steps on dense parameters: operands checked, then dispatched. */
#include <stdlib.h>
#include <string.h>

#include "adam.h"
#include "internal.h"

static void check_numbers(qm__call *call, const qm_adam *adam) {
  qm__require(call, adam->step >= 1, "argument 'step': expected at least 1, got %lld",
              (long long)adam->step);
  qm__require(call,
              adam->beta1 >= 0.0 && adam->beta1 < 1.0 && adam->beta2 >= 0.0 && adam->beta2 < 1.0,
              "argument 'betas': expected both in [0, 1), got %g and %g", adam->beta1, adam->beta2);
  qm__require(call, adam->eps >= 0.0, "argument 'eps': expected at least 0, got %g", adam->eps);
}

qm_adam qm__adam(qm__call *call, const qm_adam *adam, qm_array *live, qm_array *scale) {
  memset(live, 0, sizeof *live);
  memset(scale, 0, sizeof *scale);
  qm__require(call, adam != NULL, "argument 'adam': expected the step's numbers, got nothing");
  if (adam == NULL) return (qm_adam){0};
  if (adam->live == NULL) check_numbers(call, adam);
  qm__optional(call, "live", adam->live, "i32 [16]", QM__READ, live);
  qm__optional(call, "scale", adam->scale, "f32 []", QM__READ, scale);
  return *adam;
}

void qm__moments(qm__call *call, const qm_tensor *exp_avg, const qm_tensor *exp_avg_sq,
                 const char *spec_exp_avg, const char *spec_exp_avg_sq, qm_array *m, qm_array *v) {
  qm__require(call, (exp_avg == NULL) == (exp_avg_sq == NULL),
              "argument 'exp_avg_sq': expected both moments, or neither");
  qm__optional(call, "exp_avg", exp_avg, spec_exp_avg, QM__WRITE, m);
  qm__optional(call, "exp_avg_sq", exp_avg_sq, spec_exp_avg_sq, QM__WRITE, v);
}

int32_t qm_adam_write(const qm_adam *adams, int64_t count, const qm_tensor *live) {
  qm__call call = qm__begin("qm_adam_write");
  qm_array array;
  qm__require(&call, adams != NULL && count >= 0,
              "argument 'adams': expected the numbers of 0 or more steps");
  qm__bind(&call, "count", count);
  qm__operand(&call, "live", live, "i32 [count, 16]", QM__WRITE, &array);
  for (int64_t i = 0; i < count && call.status == QM_OK; i++) check_numbers(&call, &adams[i]);
  if (qm__finish(&call) != QM_OK) return call.status;
  if (qm__graph_refuse(call.device, "writing to it from the host") != QM_OK) return QM_E_ARGUMENT;
  qm_adam_numbers *rows = malloc((size_t)count * sizeof *rows + 1);
  if (rows == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  for (int64_t i = 0; i < count; i++) rows[i] = qm_adam_prepare(&adams[i]);
  const int32_t status = call.device->backend->write(call.device->context, array.data, rows,
                                                     count * (int64_t)sizeof *rows);
  free(rows);
  return status;
}

static void check_step(qm__call *call, const qm_adamw_step *step, qm_adamw_item *item) {
  qm__operand(call, "param", step->param, "f32|bf16 [...]", QM__WRITE, &item->param);
  qm__operand(call, "grad", step->grad, "float [...]", QM__READ, &item->grad);
  qm__moments(call, step->exp_avg, step->exp_avg_sq, "f32|bf16 [...]", "f32|bf16 [...]",
              &item->exp_avg, &item->exp_avg_sq);
  qm__same_shape(call, "grad", &item->param, &item->grad);
  if (step->exp_avg != NULL) qm__same_shape(call, "exp_avg", &item->param, &item->exp_avg);
  if (step->exp_avg != NULL) qm__same_shape(call, "exp_avg_sq", &item->param, &item->exp_avg_sq);
  item->adam = qm__adam(call, &step->adam, &item->live, &item->scale);
}

int32_t qm_adamw(const qm_adamw_step *steps, int64_t count) {
  qm__call call = qm__begin("qm_adamw");
  qm_adamw_args *args = qm__list_args(&call, sizeof *args, steps, count, sizeof args->step[0], 6);
  if (args == NULL) return call.status;
  args->count = count;
  for (int64_t i = 0; i < count && call.status == QM_OK; i++) {
    qm__list_item(&call, i, count);
    check_step(&call, &steps[i], &args->step[i]);
  }
  const int32_t status = count == 0 ? QM_OK : QM__DISPATCH(call, adamw, args);
  free(args);
  return status;
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
  args.adam = qm__adam(&call, adam, &args.live, &args.scale);
  return QM__DISPATCH(call, adam_direction, &args);
}

int32_t qm_grad_scale(const qm_tensor *squares, const qm_tensor *norm, const qm_tensor *scale,
                      const qm_tensor *skipped, double factor, double max_norm) {
  qm__call call = qm__begin("qm_grad_scale");
  qm_grad_scale_args args = {.factor = factor, .max_norm = max_norm};
  qm__operand(&call, "squares", squares, "f32 []", QM__READ, &args.squares);
  qm__operand(&call, "norm", norm, "f32 []", QM__WRITE, &args.norm);
  qm__operand(&call, "scale", scale, "f32 []", QM__WRITE, &args.scale);
  qm__operand(&call, "skipped", skipped, "i64 []", QM__WRITE, &args.skipped);
  qm__require(&call, max_norm >= 0.0, "argument 'max_norm': expected at least 0, got %g", max_norm);
  return QM__DISPATCH(call, grad_scale, &args);
}
