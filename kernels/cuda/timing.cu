/* timing.cu - how long the device takes between two places of its queue, and names for tools that
** look on. */
#include <nvtx3/nvToolsExt.h>
#include <stdlib.h>

#include "memory.h"

struct qm_cuda_mark {
  qm_cuda_mark *next; /* in the list of those that wait to be used again */
  cudaEvent_t begin, end;
};

static void destroy(qm_cuda_mark *mark) {
  if (mark->begin != NULL) cudaEventDestroy(mark->begin);
  if (mark->end != NULL) cudaEventDestroy(mark->end);
  free(mark);
}

void qm_cuda_marks_close(qm_cuda *cuda) {
  while (cuda->marks != NULL) {
    qm_cuda_mark *mark = cuda->marks;
    cuda->marks = mark->next;
    destroy(mark);
  }
}

static int32_t take(qm_cuda *cuda, qm_cuda_mark **out) {
  qm_cuda_mark *mark = cuda->marks;
  *out = mark;
  if (mark != NULL) {
    cuda->marks = mark->next;
    return QM_OK;
  }
  mark = (qm_cuda_mark *)calloc(1, sizeof *mark);
  if (mark == NULL) return qm_cuda_host->fail(QM_E_MEMORY, "the host is out of memory");
  cudaError_t error = cudaEventCreate(&mark->begin);
  if (error == cudaSuccess) error = cudaEventCreate(&mark->end);
  if (error != cudaSuccess)
    destroy(mark);
  else
    *out = mark;
  return qm_cuda_check(error, "profile");
}

int32_t qm_cuda_time_begin(void *context, void **out) {
  QM_CUDA_ENTER(context);
  qm_cuda_mark *mark = NULL;
  if (const int32_t status = take(cuda, &mark)) return status;
  *out = mark;
  return qm_cuda_check(cudaEventRecord(mark->begin, cuda->compute), "profile");
}

int32_t qm_cuda_time_end(void *context, void *mark) {
  QM_CUDA_ENTER(context);
  return qm_cuda_check(cudaEventRecord(((qm_cuda_mark *)mark)->end, cuda->compute), "profile");
}

int32_t qm_cuda_time_read(void *context, void *opaque, double *seconds) {
  QM_CUDA_ENTER(context);
  qm_cuda_mark *mark = (qm_cuda_mark *)opaque;
  float milliseconds = 0.0f;
  cudaError_t error = cudaEventSynchronize(mark->end);
  if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, mark->begin, mark->end);
  mark->next = cuda->marks;
  cuda->marks = mark;
  *seconds = 1e-3 * (double)milliseconds;
  return qm_cuda_check(error, "profile");
}

/* Next to nothing when no tool listens. */
void qm_cuda_range_begin(void *context, const char *name) {
  (void)context;
  nvtxRangePushA(name);
}

void qm_cuda_range_end(void *context) {
  (void)context;
  nvtxRangePop();
}
