/* loss.c - the losses: operands checked, then dispatched. */
#include "internal.h"

int32_t qm_cross_entropy(const qm_tensor *logits, const qm_tensor *targets, const qm_tensor *factor,
                         const qm_tensor *loss, const qm_tensor *dlogits, double scale,
                         int32_t ignore_index, int64_t classes) {
  qm__call call = qm__begin("qm_cross_entropy");
  qm_cross_entropy_args args = {.scale = scale, .ignore_index = ignore_index, .classes = classes};
  qm__operand(&call, "logits", logits, "float [R, V]", QM__READ, &args.logits);
  qm__operand(&call, "targets", targets, "i32 [R]", QM__READ, &args.targets);
  qm__optional(&call, "factor", factor, "f32 []", QM__READ, &args.factor);
  qm__operand(&call, "loss", loss, "f32 [R]", QM__WRITE, &args.loss);
  qm__optional(&call, "dlogits", dlogits, "=logits [R, V]", QM__IN_PLACE, &args.dlogits);
  args.rows = qm__size(&call, "R");
  args.columns = qm__size(&call, "V");
  qm__require(&call, classes >= 0 && classes <= args.columns,
              "argument 'classes': expected 0 to %lld, got %lld", (long long)args.columns,
              (long long)classes);
  return QM__DISPATCH(call, cross_entropy, &args);
}
