/* reduce.c - reductions and softmax: operands checked, then dispatched. */
#include <stdlib.h>

#include "internal.h"

/* Is out x's shape with dimension dim of size 1, or left out? */
static bool is_reduced(const qm_array *x, const qm_array *out, int32_t dim) {
  if (out->ndim != x->ndim && out->ndim != x->ndim - 1) return false;
  int32_t at = 0; /* in out */
  for (int32_t i = 0; i < x->ndim; i++) {
    if (i == dim && out->ndim < x->ndim) continue;
    if (out->shape[at++] != (i == dim ? 1 : x->shape[i])) return false;
  }
  return true;
}

int32_t qm_reduce(int32_t op, const qm_tensor *x, const qm_tensor *out, int32_t dim) {
  qm__call call = qm__begin("qm_reduce");
  qm_reduce_args args = {.op = op, .outer = 1, .inner = 1};
  qm__require(&call, op >= 0 && op < QM_REDUCE_COUNT, "argument 'op': there is no operation %d",
              op);
  qm__operand(&call, "x", x, "float [...]", QM__READ, &args.x);
  qm__operand(&call, "out", out, op == QM_ARGMAX ? "i32 [...]" : "float [...]", QM__WRITE,
              &args.out);
  qm__require(&call, dim >= 0 && dim < args.x.ndim,
              "argument 'dim': expected a dimension of %d, got number %d", args.x.ndim, dim);
  if (call.status != QM_OK) return call.status;
  for (int32_t i = 0; i < dim; i++) args.outer *= args.x.shape[i];
  for (int32_t i = dim + 1; i < args.x.ndim; i++) args.inner *= args.x.shape[i];
  args.length = args.x.shape[dim];
  char x_text[160], out_text[160];
  qm__describe(x, x_text, sizeof x_text);
  qm__describe(out, out_text, sizeof out_text);
  qm__require(&call, is_reduced(&args.x, &args.out, dim),
              "argument 'out': expected the shape of x, %s, without dimension %d, got %s", x_text,
              dim, out_text);
  qm__require(&call, args.length > 0 || op == QM_SUM || op == QM_MEAN,
              "argument 'x': expected at least one element along dimension %d, got %s", dim,
              x_text);
  qm__require(&call, op != QM_ARGMAX || args.length <= INT32_MAX,
              "argument 'x': expected less than 2^31 elements along dimension %d, got %s", dim,
              x_text);
  return QM__DISPATCH(call, reduce, &args);
}

int32_t qm_sum_squares(const qm_tensor *const *x, int64_t count, const qm_tensor *out,
                       int32_t accumulate) {
  qm__call call = qm__begin("qm_sum_squares");
  qm_sum_squares_args *args = qm__list_args(&call, sizeof *args, x, count, sizeof args->x[0], 1);
  if (args == NULL) return call.status;
  args->count = count;
  args->accumulate = accumulate;
  for (int64_t i = 0; i < count; i++) {
    qm__list_item(&call, i, count);
    qm__operand(&call, "x", x[i], "float [...]", QM__READ, &args->x[i]);
  }
  qm__list_item(&call, count, count);
  qm__operand(&call, "out", out, "f32 []", QM__WRITE, &args->out);
  const int32_t status = QM__DISPATCH(call, sum_squares, args);
  free(args);
  return status;
}

int32_t qm_softmax(const qm_tensor *x, const qm_tensor *out) {
  qm__call call = qm__begin("qm_softmax");
  qm_softmax_args args = {.rows = 0};
  qm__operand(&call, "x", x, "float [...]", QM__READ, &args.x);
  qm__operand(&call, "out", out, "=x [...]", QM__IN_PLACE, &args.out);
  qm__same_shape(&call, "out", &args.x, &args.out);
  qm__require(&call, args.x.ndim >= 1,
              "argument 'x': expected at least one dimension, got a scalar");
  if (call.status != QM_OK) return call.status;
  args.columns = args.x.shape[args.x.ndim - 1];
  args.rows = args.columns == 0 ? 0 : args.x.count / args.columns;
  return QM__DISPATCH(call, softmax, &args);
}
