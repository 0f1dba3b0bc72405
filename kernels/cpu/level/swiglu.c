/* swiglu.c - silu(gate) * up and its gradient, in blocks. Reference: kernels/reference/swiglu.c,
** within the rounding of exp. 3 and 5 elements moved per element; a division or a library's exp
** would take longer than the memory.
*/
#include "simd.h"

/* n elements from i on as f32, and zeros up to a whole vector. */
static inline void expand(float *out, const qm_array *x, int64_t i, int64_t n) {
  qm_expand(out, x->data, x->dtype, i, n);
  for (; n % QM_LANES != 0; n++) out[n] = 0.0f;
}

int32_t QM_CPU(swiglu)(void *context, const qm_swiglu_args *args) {
  (void)context;
  const int64_t count = args->out.count;
#pragma omp parallel for schedule(static) if (count > QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float gate[QM_BLOCK], up[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    expand(gate, &args->gate, i, n);
    expand(up, &args->up, i, n);
    for (int64_t j = 0; j < n; j += QM_LANES) {
      const qm_vec x = qm_vec_load(gate + j);
      qm_vec_store(gate + j, x * qm_vec_sigmoid(x) * qm_vec_load(up + j));
    }
    qm_narrow(gate, args->out.data, args->out.dtype, i, n);
  }
  return QM_OK;
}

int32_t QM_CPU(swiglu_backward)(void *context, const qm_swiglu_backward_args *args) {
  (void)context;
  const int64_t count = args->dout.count;
#pragma omp parallel for schedule(static) if (count > QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float dout[QM_BLOCK], gate[QM_BLOCK], up[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    expand(dout, &args->dout, i, n);
    expand(gate, &args->gate, i, n);
    expand(up, &args->up, i, n);
    for (int64_t j = 0; j < n; j += QM_LANES) {
      const qm_vec x = qm_vec_load(gate + j), dy = qm_vec_load(dout + j);
      const qm_vec sigmoid = qm_vec_sigmoid(x), silu = x * sigmoid;
      const qm_vec slope = qm_vec_fma(silu, 1.0f - sigmoid, sigmoid);
      qm_vec_store(gate + j, dy * qm_vec_load(up + j) * slope);
      qm_vec_store(up + j, dy * silu);
    }
    qm_narrow(gate, args->dgate.data, args->dgate.dtype, i, n);
    qm_narrow(up, args->dup.data, args->dup.dtype, i, n);
  }
  return QM_OK;
}
