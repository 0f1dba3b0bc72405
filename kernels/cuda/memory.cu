/* memory.cu - device memory, the workspace, and copies between devices. */
#include <stdlib.h>

#include "memory.h"

struct qm_cuda_retired {
  qm_cuda_retired *next;
  void *memory;
};

int32_t qm_cuda_allocate(void *context, int64_t size_bytes, void **memory) {
  QM_CUDA_ENTER(context);
  const cudaError_t error = cudaMalloc(memory, (size_t)size_bytes);
  if (error != cudaErrorMemoryAllocation) return qm_cuda_check(error, "allocate");
  cudaGetLastError();
  return QM_E_MEMORY; /* the engine's allocator words it */
}

void qm_cuda_release(void *context, void *memory, int64_t size_bytes) {
  (void)size_bytes;
  qm_cuda *cuda = (qm_cuda *)context;
  cudaSetDevice(cuda->index);
  /* It waits for the device: nothing queued can still use the memory. An error would be some former
  ** operation's: it comes up again where there is somebody to tell. */
  if (cudaFree(memory) != cudaSuccess) cudaGetLastError();
}

int32_t qm_cuda_scratch(qm_cuda *cuda, int64_t size_bytes, void **out) {
  if (size_bytes > cuda->scratch_bytes) {
    /* Queued work, and recorded graphs, still use the old one: it stays until the device closes.
    ** Doubling bounds what stays by what is in use. */
    const int64_t doubled = 2 * cuda->scratch_bytes;
    const int64_t wanted = size_bytes > doubled ? size_bytes : doubled;
    void *memory = NULL;
    const int32_t status = qm_cuda_check(cudaMalloc(&memory, (size_t)wanted), "workspace");
    if (status != QM_OK) return status;
    if (cuda->scratch != NULL) {
      qm_cuda_retired *retired = (qm_cuda_retired *)malloc(sizeof *retired);
      if (retired != NULL) *retired = {cuda->retired, cuda->scratch};
      if (retired != NULL) cuda->retired = retired;
    }
    cuda->scratch = memory;
    cuda->scratch_bytes = wanted;
    cuda->workspace_bytes += wanted;
  }
  *out = cuda->scratch;
  return QM_OK;
}

void qm_cuda_scratch_close(qm_cuda *cuda) {
  while (cuda->retired != NULL) {
    qm_cuda_retired *retired = cuda->retired;
    cuda->retired = retired->next;
    cudaFree(retired->memory);
    free(retired);
  }
  cudaFree(cuda->scratch);
}

int64_t qm_cuda_workspace_bytes(void *context) {
  return ((const qm_cuda *)context)->workspace_bytes;
}

/* Let `stream` go on only behind what `before` holds now. */
static cudaError_t follow(cudaStream_t stream, cudaStream_t before, cudaEvent_t event) {
  const cudaError_t error = cudaEventRecord(event, before);
  return error != cudaSuccess ? error : cudaStreamWaitEvent(stream, event, 0);
}

/* On the target's stream, behind the source's work; and the source waits in turn, lest it overwrite
** x too early. The driver goes by way of the host where the two devices cannot reach each other. */
int32_t qm_cuda_copy_between(void *context, void *out, void *from, const void *x,
                             int64_t size_bytes) {
  qm_cuda *source = (qm_cuda *)from;
  cudaSetDevice(source->index);
  cudaError_t error = cudaEventRecord(source->event, source->compute);
  QM_CUDA_ENTER(context);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(cuda->compute, source->event, 0);
  if (error == cudaSuccess)
    error =
        cudaMemcpyPeerAsync(out, cuda->index, x, source->index, (size_t)size_bytes, cuda->compute);
  if (error == cudaSuccess) error = follow(source->compute, cuda->compute, cuda->event);
  return qm_cuda_check(error, "copy between devices");
}
