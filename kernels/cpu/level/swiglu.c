/* swiglu.c - silu(gate) * up and its gradient, in blocks. Reference: kernels/reference/swiglu.c,
** within the rounding of exp. Memory bound: 3 and 5 elements moved per element. */
#include "vector.h"

int32_t QM_CPU(swiglu)(void *context, const qm_swiglu_args *args) {
  (void)context;
  const int32_t dtype = args->out.dtype;
  const int64_t count = args->out.count;
#pragma omp parallel for schedule(static) if (count > QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float gate[QM_BLOCK], up[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    qm_expand(gate, args->gate.data, dtype, i, n);
    qm_expand(up, args->up.data, dtype, i, n);
    for (int64_t j = 0; j < n; j++) gate[j] = gate[j] / (1.0f + qm_expf(-gate[j])) * up[j];
    qm_narrow(gate, args->out.data, dtype, i, n);
  }
  return QM_OK;
}

int32_t QM_CPU(swiglu_backward)(void *context, const qm_swiglu_backward_args *args) {
  (void)context;
  const int32_t dtype = args->dout.dtype;
  const int64_t count = args->dout.count;
#pragma omp parallel for schedule(static) if (count > QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float dout[QM_BLOCK], gate[QM_BLOCK], up[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    qm_expand(dout, args->dout.data, dtype, i, n);
    qm_expand(gate, args->gate.data, dtype, i, n);
    qm_expand(up, args->up.data, dtype, i, n);
    for (int64_t j = 0; j < n; j++) {
      const float sigmoid = 1.0f / (1.0f + qm_expf(-gate[j])), silu = gate[j] * sigmoid;
      gate[j] = dout[j] * up[j] * (sigmoid + silu * (1.0f - sigmoid));
      up[j] = dout[j] * silu;
    }
    qm_narrow(gate, args->dgate.data, dtype, i, n);
    qm_narrow(up, args->dup.data, dtype, i, n);
  }
  return QM_OK;
}
