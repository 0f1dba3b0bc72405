/* cuda.h - what the files of the CUDA backend share: a device's context, launches, late errors.
**
** A kernel named `x` in backend.h is qm_cuda_x here: it launches on the context's compute stream
** and returns at once. Arithmetic follows the reference: compiled with -fmad=false, so that a fused
** multiply-add is one only where the code says fmaf.
*/
#ifndef QM_CUDA_H
#define QM_CUDA_H

#include <cuda_runtime.h>

#include "backend.h"

/* The first index that a kernel found out of range, in memory that both sides see. The kernel
** skips it and goes on; the next call that waits for the device reports it. */
typedef struct qm_cuda_late {
  uint32_t *taken;   /* in the device's memory: 1 once a thread has found one; it alone notes it */
  uint32_t found;    /* 1: the rest is filled in */
  int32_t operation; /* index into QM_KERNEL_LIST */
  int64_t value, limit;
} qm_cuda_late;

typedef struct qm_cuda {
  int32_t index;
  int32_t multiprocessors;
  int32_t capability; /* 90 for compute capability 9.0 */
  cudaStream_t compute, copy;
  cudaEvent_t event; /* for one stream to follow another */
  void *scratch;     /* one workspace, see qm_cuda_scratch */
  int64_t scratch_bytes;
  struct qm_cuda_retired *retired;  /* earlier, smaller workspaces */
  qm_cuda_late *late;               /* as the host sees it */
  qm_cuda_late *late_device;        /* the same memory as kernels see it */
  int64_t workspace_bytes;          /* of all workspaces */
  struct qm_cuda_mark *marks;       /* pairs of events for the profile, not in use */
  struct qm_cuda_staging *staging;  /* pinned memory between the host and the device */
  struct qm_cuda_reading *readings; /* finished reads, whose pinned memory is kept */
  struct qm_cuda_blas *blas;        /* cuBLASLt's handle, plans and workspace */
  void *solver, *triangles;         /* cuSOLVER's handle and cuBLAS's, made when first used */
  const char *last;                 /* the operation queued last */
  bool recording;                   /* the compute stream is being captured */
  bool has_wgmma;                   /* takes Hopper's own kernels; not with $QM_CUDA_WGMMA=0 */
  bool wait_each;                   /* $QM_CUDA_SYNC=1: wait after every launch, for exact errors */
  char description[192];
} qm_cuda;

extern const qm_host *qm_cuda_host;

/* QM_OK, or the failure's status with the operation's name in the sentence. */
int32_t qm_cuda_check(cudaError_t error, const char *operation);
/* The same for the launch just made. */
int32_t qm_cuda_launched(qm_cuda *cuda, const char *operation);
/* Memory for one call's intermediate results: good until the next call on this device takes it,
** since both run on the compute stream. Grows to the largest request. */
int32_t qm_cuda_scratch(qm_cuda *cuda, int64_t size_bytes, void **out);

/* gemm.cu, linalg.cu */
int32_t qm_cuda_gemm_open(qm_cuda *cuda);
void qm_cuda_gemm_close(qm_cuda *cuda);
void qm_cuda_linalg_close(qm_cuda *cuda);

/* Make the context's device current for this thread, or return from the calling function. */
#define QM_CUDA_ENTER(context)                                                                     \
  qm_cuda *cuda = (qm_cuda *)(context);                                                            \
  if (const int32_t entered = qm_cuda_check(cudaSetDevice(cuda->index), __func__)) return entered

#define X(name) int32_t qm_cuda_##name(void *context, const qm_##name##_args *args);
QM_KERNEL_LIST(X)
#undef X

/* Which kernel an index in qm_cuda_late means. */
enum {
#define X(name) QM_CUDA_OP_##name,
  QM_KERNEL_LIST(X)
#undef X
};

#endif
