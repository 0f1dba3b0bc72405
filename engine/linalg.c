/* linalg.c - matrix products and decompositions: operands checked, then dispatched. */
#include "internal.h"

int32_t qm_gemm(const qm_tensor *a, const qm_tensor *b, const qm_tensor *out, int32_t trans_a,
                int32_t trans_b, double alpha, double beta) {
  static const char *const a_specs[2][2] = {{"float [M, K]", "float [K, M]"},
                                            {"float [B, M, K]", "float [B, K, M]"}};
  static const char *const b_specs[2][2] = {{"=a [K, N]", "=a [N, K]"},
                                            {"=a [B, K, N]", "=a [B, N, K]"}};
  const int batched = a != NULL && a->ndim == 3;
  qm__call call = qm__begin("qm_gemm");
  qm_gemm_args args;
  qm__operand(&call, "a", a, a_specs[batched][trans_a != 0], QM__READ, &args.a);
  qm__operand(&call, "b", b, b_specs[batched][trans_b != 0], QM__READ, &args.b);
  qm__operand(&call, "out", out, batched ? "float [B, M, N]" : "float [M, N]", QM__WRITE,
              &args.out);
  args.batch = batched ? qm__size(&call, "B") : 1;
  args.m = qm__size(&call, "M");
  args.k = qm__size(&call, "K");
  args.n = qm__size(&call, "N");
  args.trans_a = trans_a != 0;
  args.trans_b = trans_b != 0;
  args.alpha = alpha;
  args.beta = beta;
  args.bias = args.aux = (qm_array){0};
  args.epilogue = QM_EPILOGUE_NONE;
  return QM__DISPATCH(call, gemm, &args);
}

int32_t qm_linear(const qm_tensor *x, const qm_tensor *weight, const qm_tensor *bias,
                  const qm_tensor *out, int32_t transposed, int32_t epilogue,
                  const qm_tensor *aux) {
  qm__call call = qm__begin("qm_linear");
  qm_gemm_args args = {.batch = 1, .alpha = 1.0, .trans_b = transposed != 0, .epilogue = epilogue};
  qm__require(&call, epilogue >= 0 && epilogue < QM_EPILOGUE_COUNT,
              "argument 'epilogue': there is no epilogue %d", epilogue);
  qm__require(&call, epilogue != QM_EPILOGUE_NONE || aux == NULL,
              "argument 'aux': expected nothing without an epilogue");
  qm__operand(&call, "x", x, "float [M, K]", QM__READ, &args.a);
  qm__operand(&call, "weight", weight, transposed ? "=x [N, K]" : "=x [K, N]", QM__READ, &args.b);
  if (bias != NULL) qm__operand(&call, "bias", bias, "float [N]", QM__READ, &args.bias);
  qm__operand(&call, "out", out, "float [M, N]", QM__WRITE, &args.out);
  if (epilogue != QM_EPILOGUE_NONE)
    qm__operand(&call, "aux", aux, "=out [M, N]",
                epilogue == QM_EPILOGUE_GELU ? QM__WRITE : QM__READ, &args.aux);
  args.m = qm__size(&call, "M");
  args.k = qm__size(&call, "K");
  args.n = qm__size(&call, "N");
  return QM__DISPATCH(call, gemm, &args);
}

int32_t qm_svd(const qm_tensor *a, const qm_tensor *u, const qm_tensor *s, const qm_tensor *vt) {
  qm__call call = qm__begin("qm_svd");
  qm_svd_args args;
  qm__operand(&call, "a", a, "f32 [M, N]", QM__READ, &args.a);
  args.m = qm__size(&call, "M");
  args.n = qm__size(&call, "N");
  args.r = args.m < args.n ? args.m : args.n;
  qm__bind(&call, "R", args.r);
  qm__operand(&call, "u", u, "f32 [M, R]", QM__WRITE, &args.u);
  qm__operand(&call, "s", s, "f32 [R]", QM__WRITE, &args.s);
  qm__operand(&call, "vt", vt, "f32 [R, N]", QM__WRITE, &args.vt);
  return QM__DISPATCH(call, svd, &args);
}

int32_t qm_qr(const qm_tensor *a, const qm_tensor *q) {
  qm__call call = qm__begin("qm_qr");
  qm_qr_args args;
  qm__operand(&call, "a", a, "f32 [M, N]", QM__READ, &args.a);
  args.m = qm__size(&call, "M");
  args.n = qm__size(&call, "N");
  qm__require(&call, args.m >= args.n,
              "argument 'a': expected at least as many rows as columns, got f32 [%lld, %lld]",
              (long long)args.m, (long long)args.n);
  qm__operand(&call, "q", q, "f32 [M, N]", QM__WRITE, &args.q);
  return QM__DISPATCH(call, qr, &args);
}

int32_t qm_cholesky_inverse(const qm_tensor *a, const qm_tensor *u, double damping) {
  qm__call call = qm__begin("qm_cholesky_inverse");
  qm_cholesky_inverse_args args = {.damping = damping};
  qm__operand(&call, "a", a, "f32 [N, N]", QM__READ, &args.a);
  qm__operand(&call, "u", u, "f32 [N, N]", QM__WRITE, &args.u);
  args.n = qm__size(&call, "N");
  qm__require(&call, damping >= 0.0 && damping < 1e30,
              "argument 'damping': expected a number of at least 0, got %g", damping);
  return QM__DISPATCH(call, cholesky_inverse, &args);
}
