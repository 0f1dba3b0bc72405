/* gemm_apart.h - a product, and by a kernel of its own the epilogue that its backend cannot join
** with it. */
#ifndef QM_GEMM_APART_H
#define QM_GEMM_APART_H

#include <string.h>

#include "backend.h"

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

/* kernels: gemm, which is asked for the product and its bias alone; unary, unary_backward. */
static inline int32_t qm_gemm_apart(const qm_kernels *kernels, void *context,
                                    const qm_gemm_args *args) {
  qm_gemm_args product = *args;
  if (args->epilogue == QM_EPILOGUE_GELU) product.out = args->aux;
  product.epilogue = QM_EPILOGUE_NONE;
  memset(&product.aux, 0, sizeof product.aux);
  const int32_t status = kernels->gemm(context, &product);
  if (status != QM_OK || args->out.count == 0) return status;
  return qm_gemm_epilogue_apart(kernels, context, args);
}

#endif
