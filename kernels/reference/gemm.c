/* gemm.c - out = alpha op(a) op(b) + bias + beta out, three loops, with its epilogue. */
#include "reference.h"

static float finish(const qm_gemm_args *args, int64_t at, float result) {
  void *aux = args->aux.data;
  switch (args->epilogue) {
    case QM_EPILOGUE_GELU:
      qm_store(aux, args->aux.dtype, at, result);
      return (float)qm_reference_gelu((double)qm_load(aux, args->aux.dtype, at), 1);
    case QM_EPILOGUE_GELU_GRAD:
      return (float)((double)result *
                     qm_reference_gelu_grad((double)qm_load(aux, args->aux.dtype, at), 1));
    default: return result;
  }
}

int32_t qm_reference_gemm(void *context, const qm_gemm_args *args) {
  (void)context;
  const int64_t m = args->m, k = args->k, n = args->n;
  /* Steps from one row and one column of op(a) and op(b) to the next. */
  const int64_t a_row = args->trans_a ? 1 : k, a_column = args->trans_a ? m : 1;
  const int64_t b_row = args->trans_b ? 1 : n, b_column = args->trans_b ? k : 1;
  for (int64_t at = 0; at < args->out.count; at++) {
    const int64_t batch = at / (m * n), i = at / n % m, j = at % n;
    const int64_t a = batch * m * k + i * a_row, b = batch * k * n + j * b_column;
    float sum = 0.0f;
    for (int64_t l = 0; l < k; l++)
      sum += qm_load(args->a.data, args->a.dtype, a + l * a_column) *
             qm_load(args->b.data, args->b.dtype, b + l * b_row);
    float result = (float)args->alpha * sum;
    if (args->bias.data != NULL) result += qm_load(args->bias.data, args->bias.dtype, j);
    /* beta 0 overwrites: out may hold anything, NaN too. */
    if (args->beta != 0.0)
      result += (float)args->beta * qm_load(args->out.data, args->out.dtype, at);
    qm_store(args->out.data, args->out.dtype, at, finish(args, at, result));
  }
  return QM_OK;
}
