/* elementwise.c - unary, binary and accumulating operations: operands checked, then dispatched. */
#include "internal.h"

int32_t qm_unary(int32_t op, const qm_tensor *x, const qm_tensor *out, double p0, double p1) {
  qm__call call = qm__begin("qm_unary");
  qm_unary_args args = {.op = op, .p0 = p0, .p1 = p1};
  qm__require(&call, op >= 0 && op < QM_UNARY_COUNT, "argument 'op': there is no operation %d", op);
  qm__operand(&call, "x", x, "float [...]", QM__READ, &args.x);
  qm__operand(&call, "out", out, "=x [...]", QM__IN_PLACE, &args.out);
  qm__same_shape(&call, "out", &args.x, &args.out);
  return QM__DISPATCH(call, unary, &args);
}

int32_t qm_unary_backward(int32_t op, const qm_tensor *dout, const qm_tensor *x,
                          const qm_tensor *dx, double p0, double p1) {
  qm__call call = qm__begin("qm_unary_backward");
  qm_unary_backward_args args = {.op = op, .p0 = p0, .p1 = p1};
  qm__require(&call, op >= 0 && op < QM_GELU_GRAD,
              "argument 'op': expected an operation with a derivative, got %d", op);
  qm__operand(&call, "x", x, "float [...]", QM__READ, &args.x);
  qm__operand(&call, "dout", dout, "=x [...]", QM__READ, &args.dout);
  qm__operand(&call, "dx", dx, "=x [...]", QM__IN_PLACE, &args.dx);
  qm__same_shape(&call, "dout", &args.x, &args.dout);
  qm__same_shape(&call, "dx", &args.x, &args.dx);
  return QM__DISPATCH(call, unary_backward, &args);
}

/* Strides of x seen with out's (left-padded) shape: 0 where x is broadcast. */
static void broadcast(qm__call *call, const char *name, const qm_tensor *tensor, const qm_array *x,
                      const qm_array *out, int64_t stride[QM_DIMS_MAX]) {
  if (call->status != QM_OK) return;
  bool fits = x->ndim <= out->ndim;
  int64_t step = 1;
  for (int32_t i = 1; i <= QM_DIMS_MAX; i++) { /* from the last dimension */
    const int64_t extent = i <= x->ndim ? x->shape[x->ndim - i] : 1;
    const int64_t target = i <= out->ndim ? out->shape[out->ndim - i] : 1;
    fits = fits && (extent == target || extent == 1);
    stride[QM_DIMS_MAX - i] = extent == 1 ? 0 : step;
    step *= extent;
  }
  char got[160], expected[160];
  const qm_tensor shape = {.ndim = out->ndim,
                           .dtype = x->dtype,
                           .shape = {out->shape[0], out->shape[1], out->shape[2], out->shape[3]}};
  qm__describe(&shape, expected, sizeof expected);
  qm__describe(tensor, got, sizeof got);
  qm__require(call, fits, "argument '%s': expected what broadcasts to %s, got %s", name, expected,
              got);
}

int32_t qm_binary(int32_t op, const qm_tensor *a, const qm_tensor *b, const qm_tensor *out) {
  qm__call call = qm__begin("qm_binary");
  qm_binary_args args = {.op = op};
  qm__require(&call, op >= 0 && op < QM_BINARY_COUNT, "argument 'op': there is no operation %d",
              op);
  qm__operand(&call, "a", a, "float [...]", QM__READ, &args.a);
  qm__operand(&call, "b", b, "float [...]", QM__READ, &args.b);
  qm__operand(&call, "out", out, "float [...]", QM__IN_PLACE, &args.out);
  for (int32_t i = 1; i <= QM_DIMS_MAX; i++)
    args.shape[QM_DIMS_MAX - i] = i <= args.out.ndim ? args.out.shape[args.out.ndim - i] : 1;
  broadcast(&call, "a", a, &args.a, &args.out, args.stride_a);
  broadcast(&call, "b", b, &args.b, &args.out, args.stride_b);
  return QM__DISPATCH(call, binary, &args);
}

int32_t qm_accumulate(const qm_tensor *x, const qm_tensor *out, double alpha, double beta) {
  qm__call call = qm__begin("qm_accumulate");
  qm_accumulate_args args = {.alpha = alpha, .beta = beta};
  qm__operand(&call, "x", x, "float [...]", QM__READ, &args.x);
  qm__operand(&call, "out", out, "float [...]", QM__IN_PLACE, &args.out);
  qm__same_shape(&call, "out", &args.x, &args.out);
  return QM__DISPATCH(call, accumulate, &args);
}
