/* libraries.cpp - what NVIDIA's libraries do in the real backend, by the reference's kernels. */
#include "../../../kernels/cuda/cuda.h"
#include "runtime.h"

extern "C" {
#define X(name) int32_t qm_reference_##name(void *context, const qm_##name##_args *args);
QM_KERNEL_LIST(X)
#undef X
}
/* The reference's own functions need their host: opening its backend leaves it there. */
extern "C" const qm_backend *qm_reference_backend(const qm_host *host);

int32_t qm_cuda_gemm_open(qm_cuda *) {
  qm_reference_backend(qm_cuda_host);
  return QM_OK;
}
void qm_cuda_gemm_close(qm_cuda *) {}
void qm_cuda_linalg_close(qm_cuda *) {}

#define QM_BY_REFERENCE(name)                                                                      \
  int32_t qm_cuda_##name(void *context, const qm_##name##_args *args) {                            \
    QM_CUDA_ENTER(context);                                                                        \
    runtime_queue(cuda->compute, [copy = *args] { qm_reference_##name(NULL, &copy); });            \
    return qm_cuda_launched(cuda, #name);                                                          \
  }
QM_BY_REFERENCE(gemm)
QM_BY_REFERENCE(svd)
QM_BY_REFERENCE(qr)
