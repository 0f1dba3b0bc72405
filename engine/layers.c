/* layers.c - the transformer's layers but attention: operands checked, then dispatched. */
#include <math.h>

#include "internal.h"

static void require_norm(qm__call *call, const qm_tensor *residual, const qm_tensor *sum,
                         double eps) {
  qm__require(call, (residual == NULL) == (sum == NULL),
              "argument 'sum': expected it with a residual and only then");
  qm__require(call, isfinite(eps) && eps >= 0.0,
              "argument 'eps': expected a number of at least 0, got %g", eps);
}

int32_t qm_rms_norm(const qm_tensor *x, const qm_tensor *residual, const qm_tensor *weight,
                    const qm_tensor *sum, const qm_tensor *out, const qm_tensor *rstd, double eps) {
  qm__call call = qm__begin("qm_rms_norm");
  qm_rms_norm_args args;
  qm__operand(&call, "x", x, "float [R, C]", QM__READ, &args.x);
  qm__optional(&call, "residual", residual, "=x [R, C]", QM__READ, &args.residual);
  qm__operand(&call, "weight", weight, "float [C]", QM__READ, &args.weight);
  qm__optional(&call, "sum", sum, "=x [R, C]", QM__IN_PLACE, &args.sum);
  qm__operand(&call, "out", out, "=x [R, C]", QM__WRITE, &args.out);
  qm__operand(&call, "rstd", rstd, "f32 [R]", QM__WRITE, &args.rstd);
  require_norm(&call, residual, sum, eps);
  args.rows = qm__size(&call, "R");
  args.columns = qm__size(&call, "C");
  args.eps = eps;
  return QM__DISPATCH(call, rms_norm, &args);
}

int32_t qm_rms_norm_backward(const qm_tensor *dout, const qm_tensor *sum, const qm_tensor *weight,
                             const qm_tensor *rstd, const qm_tensor *dsum, const qm_tensor *dx,
                             const qm_tensor *dweight) {
  qm__call call = qm__begin("qm_rms_norm_backward");
  qm_rms_norm_backward_args args;
  qm__operand(&call, "sum", sum, "float [R, C]", QM__READ, &args.sum);
  qm__operand(&call, "dout", dout, "=sum [R, C]", QM__READ, &args.dout);
  qm__operand(&call, "weight", weight, "float [C]", QM__READ, &args.weight);
  qm__operand(&call, "rstd", rstd, "f32 [R]", QM__READ, &args.rstd);
  qm__optional(&call, "dsum", dsum, "=sum [R, C]", QM__READ, &args.dsum);
  qm__operand(&call, "dx", dx, "=sum [R, C]", QM__WRITE, &args.dx);
  qm__optional(&call, "dweight", dweight, "f32 [C]", QM__WRITE, &args.dweight);
  args.rows = qm__size(&call, "R");
  args.columns = qm__size(&call, "C");
  return QM__DISPATCH(call, rms_norm_backward, &args);
}

int32_t qm_layer_norm(const qm_tensor *x, const qm_tensor *residual, const qm_tensor *weight,
                      const qm_tensor *bias, const qm_tensor *sum, const qm_tensor *out,
                      const qm_tensor *mean, const qm_tensor *rstd, double eps) {
  qm__call call = qm__begin("qm_layer_norm");
  qm_layer_norm_args args;
  qm__operand(&call, "x", x, "float [R, C]", QM__READ, &args.x);
  qm__optional(&call, "residual", residual, "=x [R, C]", QM__READ, &args.residual);
  qm__operand(&call, "weight", weight, "float [C]", QM__READ, &args.weight);
  qm__optional(&call, "bias", bias, "=weight [C]", QM__READ, &args.bias);
  qm__optional(&call, "sum", sum, "=x [R, C]", QM__IN_PLACE, &args.sum);
  qm__operand(&call, "out", out, "=x [R, C]", QM__WRITE, &args.out);
  qm__operand(&call, "mean", mean, "f32 [R]", QM__WRITE, &args.mean);
  qm__operand(&call, "rstd", rstd, "f32 [R]", QM__WRITE, &args.rstd);
  require_norm(&call, residual, sum, eps);
  args.rows = qm__size(&call, "R");
  args.columns = qm__size(&call, "C");
  args.eps = eps;
  return QM__DISPATCH(call, layer_norm, &args);
}

int32_t qm_layer_norm_backward(const qm_tensor *dout, const qm_tensor *sum, const qm_tensor *weight,
                               const qm_tensor *mean, const qm_tensor *rstd, const qm_tensor *dsum,
                               const qm_tensor *dx, const qm_tensor *dweight,
                               const qm_tensor *dbias) {
  qm__call call = qm__begin("qm_layer_norm_backward");
  qm_layer_norm_backward_args args;
  qm__operand(&call, "sum", sum, "float [R, C]", QM__READ, &args.sum);
  qm__operand(&call, "dout", dout, "=sum [R, C]", QM__READ, &args.dout);
  qm__operand(&call, "weight", weight, "float [C]", QM__READ, &args.weight);
  qm__operand(&call, "mean", mean, "f32 [R]", QM__READ, &args.mean);
  qm__operand(&call, "rstd", rstd, "f32 [R]", QM__READ, &args.rstd);
  qm__optional(&call, "dsum", dsum, "=sum [R, C]", QM__READ, &args.dsum);
  qm__operand(&call, "dx", dx, "=sum [R, C]", QM__WRITE, &args.dx);
  qm__optional(&call, "dweight", dweight, "f32 [C]", QM__WRITE, &args.dweight);
  qm__optional(&call, "dbias", dbias, "f32 [C]", QM__WRITE, &args.dbias);
  args.rows = qm__size(&call, "R");
  args.columns = qm__size(&call, "C");
  return QM__DISPATCH(call, layer_norm_backward, &args);
}

/* Heads of two halves, D/2 each. */
static int64_t require_halves(qm__call *call, const char *argument) {
  const int64_t head_size = qm__size(call, "D");
  qm__require(call, head_size % 2 == 0, "argument '%s': expected an even D, got D=%lld", argument,
              (long long)head_size);
  qm__bind(call, "D/2", head_size / 2);
  return head_size;
}

/* The positions' values lie in device memory, so the kernels check those. */
int32_t qm_rope(const qm_tensor *x, const qm_tensor *cos, const qm_tensor *sin,
                const qm_tensor *positions, const qm_tensor *out, int32_t inverse) {
  qm__call call = qm__begin("qm_rope");
  qm_rope_args args;
  qm__operand(&call, "x", x, "float [R, H, D]", QM__READ, &args.x);
  const int64_t head_size = require_halves(&call, "x");
  qm__operand(&call, "cos", cos, "f32 [P, D/2]", QM__READ, &args.cos);
  qm__operand(&call, "sin", sin, "f32 [P, D/2]", QM__READ, &args.sin);
  qm__operand(&call, "positions", positions, "i32 [R]", QM__READ, &args.positions);
  qm__operand(&call, "out", out, "=x [R, H, D]", QM__IN_PLACE, &args.out);
  args.rows = qm__size(&call, "R");
  args.heads = qm__size(&call, "H");
  args.head_size = head_size;
  args.position_count = qm__size(&call, "P");
  args.inverse = inverse;
  return QM__DISPATCH(call, rope, &args);
}

int32_t qm_rope_append(const qm_tensor *q, const qm_tensor *k, const qm_tensor *v,
                       const qm_tensor *cos, const qm_tensor *sin, const qm_tensor *positions,
                       const qm_tensor *places, const qm_tensor *out, const qm_tensor *keys,
                       const qm_tensor *values) {
  qm__call call = qm__begin("qm_rope_append");
  qm_rope_append_args args;
  qm__operand(&call, "q", q, "float [R, H, D]", QM__READ, &args.q);
  const int64_t head_size = require_halves(&call, "q");
  qm__operand(&call, "k", k, "=q [R, HK, D]", QM__READ, &args.k);
  qm__operand(&call, "v", v, "=q [R, HK, D]", QM__READ, &args.v);
  qm__operand(&call, "cos", cos, "f32 [P, D/2]", QM__READ, &args.cos);
  qm__operand(&call, "sin", sin, "f32 [P, D/2]", QM__READ, &args.sin);
  qm__operand(&call, "positions", positions, "i32 [R]", QM__READ, &args.positions);
  qm__operand(&call, "places", places, "i32 [R]", QM__READ, &args.places);
  qm__operand(&call, "out", out, "=q [R, H, D]", QM__IN_PLACE, &args.out);
  qm__operand(&call, "keys", keys, "=q [V, HK, D]", QM__WRITE, &args.keys);
  qm__operand(&call, "values", values, "=q [V, HK, D]", QM__WRITE, &args.values);
  args.rows = qm__size(&call, "R");
  args.heads = qm__size(&call, "H");
  args.kv_heads = qm__size(&call, "HK");
  args.head_size = head_size;
  args.position_count = qm__size(&call, "P");
  args.place_count = qm__size(&call, "V");
  return QM__DISPATCH(call, rope_append, &args);
}

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
