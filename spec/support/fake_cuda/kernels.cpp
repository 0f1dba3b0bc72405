/* kernels.cpp - the CUDA backend with the reference's kernels, queued like the real ones. */
#include "cuda.h"
#include "runtime.h"

extern "C" {
#define X(name) int32_t qm_reference_##name(void *context, const qm_##name##_args *args);
QM_KERNEL_LIST(X)
#undef X
/* backend.cu's, compiled under this name. */
const qm_backend *real_backend_entry(const qm_host *host);
}

/* What backend.cu opens and closes beside the host side. */
int32_t qm_cuda_gemm_open(qm_cuda *) { return QM_OK; }
void qm_cuda_gemm_close(qm_cuda *) {}
void qm_cuda_linalg_close(qm_cuda *) {}

/* A reference kernel refuses an index; a CUDA kernel notes it. The values are those of the spec. */
static void note_late(qm_cuda *cuda, int32_t operation) {
  if (cuda->late->found) return;
  *cuda->late = {1, operation, 7, 4};
}

static bool is_spoilt(const qm_fill_args *args) {
  return args->out.count > 0 && !fake_is_device(args->out.data, 1);
}
template <typename Args>
static bool is_spoilt(const Args *) {
  return false;
}

#define X(name)                                                                                    \
  int32_t qm_cuda_##name(void *context, const qm_##name##_args *args) {                            \
    QM_CUDA_ENTER(context);                                                                        \
    void *scratch;                                                                                 \
    if (const int32_t status = qm_cuda_scratch(cuda, 1000, &scratch)) return status;               \
    fake_queue(cuda->compute, [cuda, copy = *args] {                                               \
      if (is_spoilt(&copy))                                                                        \
        fake_lose();                                                                               \
      else if (qm_reference_##name(NULL, &copy) != QM_OK)                                          \
        note_late(cuda, QM_CUDA_OP_##name);                                                        \
    });                                                                                            \
    return qm_cuda_launched(cuda, #name);                                                          \
  }
QM_KERNEL_LIST(X)
#undef X

extern "C" __attribute__((visibility("default"))) const qm_backend *qm_backend_entry(
    const qm_host *host) {
  qm_reference_backend(host);
  qm_backend *backend = const_cast<qm_backend *>(real_backend_entry(host));
#define X(name) backend->kernels.name = qm_cuda_##name;
  QM_KERNEL_LIST(X)
#undef X
  return backend;
}
