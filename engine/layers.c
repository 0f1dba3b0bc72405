/* layers.c - the transformer's layers but attention: operands checked, then dispatched. */
#include "internal.h"

int32_t qm_swiglu(const qm_tensor *gate, const qm_tensor *up, const qm_tensor *out) {
  qm__call call = qm__begin("qm_swiglu");
  qm_swiglu_args args;
  qm__operand(&call, "gate", gate, "float [...]", QM__READ, &args.gate);
  qm__operand(&call, "up", up, "=gate [...]", QM__READ, &args.up);
  qm__operand(&call, "out", out, "=gate [...]", QM__IN_PLACE, &args.out);
  qm__same_shape(&call, "up", &args.gate, &args.up);
  qm__same_shape(&call, "out", &args.gate, &args.out);
  return QM__DISPATCH(call, swiglu, &args);
}

int32_t qm_swiglu_backward(const qm_tensor *dout, const qm_tensor *gate, const qm_tensor *up,
                           const qm_tensor *dgate, const qm_tensor *dup) {
  qm__call call = qm__begin("qm_swiglu_backward");
  qm_swiglu_backward_args args;
  qm__operand(&call, "dout", dout, "float [...]", QM__READ, &args.dout);
  qm__operand(&call, "gate", gate, "=dout [...]", QM__READ, &args.gate);
  qm__operand(&call, "up", up, "=dout [...]", QM__READ, &args.up);
  qm__operand(&call, "dgate", dgate, "=dout [...]", QM__IN_PLACE, &args.dgate);
  qm__operand(&call, "dup", dup, "=dout [...]", QM__IN_PLACE, &args.dup);
  qm__same_shape(&call, "gate", &args.dout, &args.gate);
  qm__same_shape(&call, "up", &args.dout, &args.up);
  qm__same_shape(&call, "dgate", &args.dout, &args.dgate);
  qm__same_shape(&call, "dup", &args.dout, &args.dup);
  return QM__DISPATCH(call, swiglu_backward, &args);
}
