/* index.c - moving elements about: permutation, gather, scatter. Checked, then dispatched. */
#include "internal.h"

int32_t qm_permute(const qm_tensor *x, const qm_tensor *out, const int32_t *dims) {
  qm__call call = qm__begin("qm_permute");
  qm_permute_args args = {.shape = {1, 1, 1, 1}};
  qm__operand(&call, "x", x, "any [...]", QM__READ, &args.x);
  qm__operand(&call, "out", out, "=x [...]", QM__WRITE, &args.out);
  const int32_t ndim = args.x.ndim;
  qm__require(&call, dims != NULL || ndim == 0, "argument 'dims': expected %d numbers, got nothing",
              ndim);
  if (call.status != QM_OK) return call.status;
  int64_t stride[QM_DIMS_MAX];
  int64_t step = 1;
  for (int32_t i = ndim - 1; i >= 0; i--) {
    stride[i] = step;
    step *= args.x.shape[i];
  }
  uint32_t seen = 0;
  bool fits = args.out.ndim == ndim;
  for (int32_t i = 0; i < ndim && call.status == QM_OK; i++) {
    const bool valid = dims[i] >= 0 && dims[i] < ndim && (seen >> dims[i] & 1u) == 0;
    qm__require(&call, valid, "argument 'dims': expected each of 0 to %d once, got %d at %d",
                ndim - 1, dims[i], i);
    if (!valid) break;
    seen |= 1u << dims[i];
    args.shape[QM_DIMS_MAX - ndim + i] = args.x.shape[dims[i]];
    args.stride_x[QM_DIMS_MAX - ndim + i] = stride[dims[i]];
    fits = fits && args.out.shape[i] == args.x.shape[dims[i]];
  }
  char x_text[160], out_text[160];
  qm__describe(x, x_text, sizeof x_text);
  qm__describe(out, out_text, sizeof out_text);
  qm__require(&call, fits, "argument 'out': expected x, %s, with its dimensions permuted, got %s",
              x_text, out_text);
  return QM__DISPATCH(call, permute, &args);
}

static bool is_float(int32_t dtype) {
  return dtype == QM_F32 || dtype == QM_F16 || dtype == QM_BF16;
}

int32_t qm_gather(const qm_tensor *x, const qm_tensor *index, const qm_tensor *out) {
  qm__call call = qm__begin("qm_gather");
  qm_gather_args args = {.c = 1};
  const bool flat = x != NULL && x->ndim == 1;
  const bool converts = x != NULL && is_float(x->dtype);
  qm__operand(&call, "x", x, flat ? "any [V]" : "any [V, C]", QM__READ, &args.x);
  qm__operand(&call, "index", index, "i32 [R]", QM__READ, &args.index);
  if (converts)
    qm__operand(&call, "out", out, flat ? "float [R]" : "float [R, C]", QM__WRITE, &args.out);
  else
    qm__operand(&call, "out", out, flat ? "=x [R]" : "=x [R, C]", QM__WRITE, &args.out);
  args.v = qm__size(&call, "V");
  args.r = qm__size(&call, "R");
  if (!flat) args.c = qm__size(&call, "C");
  return QM__DISPATCH(call, gather, &args);
}

int32_t qm_scatter_add(const qm_tensor *x, const qm_tensor *index, const qm_tensor *out) {
  qm__call call = qm__begin("qm_scatter_add");
  qm_scatter_add_args args = {.c = 1};
  const bool flat = x != NULL && x->ndim == 1;
  qm__operand(&call, "x", x, flat ? "float [R]" : "float [R, C]", QM__READ, &args.x);
  qm__operand(&call, "index", index, "i32 [R]", QM__READ, &args.index);
  qm__operand(&call, "out", out, flat ? "f32 [V]" : "f32 [V, C]", QM__WRITE, &args.out);
  args.v = qm__size(&call, "V");
  args.r = qm__size(&call, "R");
  if (!flat) args.c = qm__size(&call, "C");
  return QM__DISPATCH(call, scatter_add, &args);
}

int32_t qm_scatter(const qm_tensor *x, const qm_tensor *index, const qm_tensor *out) {
  qm__call call = qm__begin("qm_scatter");
  qm_scatter_args args = {.c = 1};
  const bool flat = x != NULL && x->ndim == 1;
  qm__operand(&call, "x", x, flat ? "any [R]" : "any [R, C]", QM__READ, &args.x);
  qm__operand(&call, "index", index, "i32 [R]", QM__READ, &args.index);
  qm__operand(&call, "out", out, flat ? "=x [V]" : "=x [V, C]", QM__WRITE, &args.out);
  args.v = qm__size(&call, "V");
  args.r = qm__size(&call, "R");
  if (!flat) args.c = qm__size(&call, "C");
  return QM__DISPATCH(call, scatter, &args);
}
