/* gemm_apart.h - a product, and by kernels of their own what its backend cannot join with it. */
#ifndef QM_GEMM_APART_H
#define QM_GEMM_APART_H

#include <string.h>

#include "backend.h"

/* Is there more to do than the product and its bias? */
static inline int qm_gemm_is_joined(const qm_gemm_args *args) {
  return args->epilogue != QM_EPILOGUE_NONE || args->sums.count > 0;
}

static inline int32_t qm_gemm_epilogue_apart(const qm_kernels *kernels, void *context,
                                             const qm_gemm_args *args) {
  if (args->epilogue == QM_EPILOGUE_GELU) {
    qm_unary_args gelu;
    gelu.x = args->aux;
    gelu.out = args->out;
    gelu.op = QM_GELU;
    gelu.p0 = 1.0; /* the tanh form */
    gelu.p1 = 0.0;
    return kernels->unary(context, &gelu);
  }
  qm_unary_backward_args slope;
  slope.dout = slope.dx = args->out;
  slope.x = args->aux;
  slope.op = QM_GELU;
  slope.p0 = 1.0;
  slope.p1 = 0.0;
  return kernels->unary_backward(context, &slope);
}

static inline int32_t qm_gemm_sums_apart(const qm_kernels *kernels, void *context,
                                         const qm_gemm_args *args) {
  qm_reduce_args sum;
  sum.x = args->b;
  sum.out = args->sums;
  sum.outer = args->trans_b ? args->n : 1;
  sum.length = args->k;
  sum.inner = args->trans_b ? 1 : args->n;
  sum.op = QM_SUM;
  return kernels->reduce(context, &sum);
}

/* kernels: gemm, which is asked for no more than the product and its bias; unary, unary_backward,
** reduce. */
static inline int32_t qm_gemm_apart(const qm_kernels *kernels, void *context,
                                    const qm_gemm_args *args) {
  qm_gemm_args product = *args;
  if (args->epilogue == QM_EPILOGUE_GELU) product.out = args->aux;
  product.epilogue = QM_EPILOGUE_NONE;
  memset(&product.aux, 0, sizeof product.aux);
  memset(&product.sums, 0, sizeof product.sums);
  int32_t status = kernels->gemm(context, &product);
  if (status == QM_OK && args->epilogue != QM_EPILOGUE_NONE && args->out.count > 0)
    status = qm_gemm_epilogue_apart(kernels, context, args);
  if (status == QM_OK && args->sums.count > 0) status = qm_gemm_sums_apart(kernels, context, args);
  return status;
}

#endif
