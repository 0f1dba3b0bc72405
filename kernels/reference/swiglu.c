/* swiglu.c - silu(gate) * up and its gradient. Source: Shazeer, arXiv 2002.05202. */
#include "reference.h"

int32_t qm_reference_swiglu(void *context, const qm_swiglu_args *args) {
  (void)context;
  const int32_t dtype = args->out.dtype;
  for (int64_t i = 0; i < args->out.count; i++) {
    const float gate = qm_load(args->gate.data, dtype, i), up = qm_load(args->up.data, dtype, i);
    qm_store(args->out.data, dtype, i, gate / (1.0f + expf(-gate)) * up);
  }
  return QM_OK;
}

int32_t qm_reference_swiglu_backward(void *context, const qm_swiglu_backward_args *args) {
  (void)context;
  const int32_t dtype = args->dout.dtype;
  for (int64_t i = 0; i < args->dout.count; i++) {
    const float dout = qm_load(args->dout.data, dtype, i);
    const float gate = qm_load(args->gate.data, dtype, i), up = qm_load(args->up.data, dtype, i);
    const float sigmoid = 1.0f / (1.0f + expf(-gate)), silu = gate * sigmoid;
    qm_store(args->dgate.data, dtype, i, dout * up * (sigmoid + silu * (1.0f - sigmoid)));
    qm_store(args->dup.data, dtype, i, dout * silu);
  }
  return QM_OK;
}
