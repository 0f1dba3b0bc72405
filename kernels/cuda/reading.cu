/* reading.cu - reads that do not wait: into pinned memory of their own, with an event behind
** them. */
#include <stdlib.h>
#include <string.h>

#include "memory.h"

struct qm_cuda_reading {
  qm_cuda_reading *next; /* in the list of those whose memory waits for another read */
  void *pinned;
  int64_t room_bytes, size_bytes;
  cudaEvent_t done;
};

static void destroy(qm_cuda_reading *reading) {
  if (reading->done != NULL) cudaEventDestroy(reading->done);
  cudaFreeHost(reading->pinned);
  free(reading);
}

void qm_cuda_readings_close(qm_cuda *cuda) {
  while (cuda->readings != NULL) {
    qm_cuda_reading *reading = cuda->readings;
    cuda->readings = reading->next;
    destroy(reading);
  }
}

static int32_t create(int64_t size_bytes, qm_cuda_reading **out) {
  qm_cuda_reading *reading = (qm_cuda_reading *)calloc(1, sizeof *reading);
  if (reading == NULL) return qm_cuda_host->fail(QM_E_MEMORY, "the host is out of memory");
  reading->room_bytes = 4096;
  while (reading->room_bytes < size_bytes) reading->room_bytes *= 2;
  cudaError_t error =
      cudaHostAlloc(&reading->pinned, (size_t)reading->room_bytes, cudaHostAllocDefault);
  if (error == cudaSuccess)
    error = cudaEventCreateWithFlags(&reading->done, cudaEventDisableTiming);
  if (error != cudaSuccess)
    destroy(reading);
  else
    *out = reading;
  return qm_cuda_check(error, "pinned memory");
}

/* One that is free and of the right size, or a new one: pinning memory is slow. */
static int32_t take(qm_cuda *cuda, int64_t size_bytes, qm_cuda_reading **out) {
  for (qm_cuda_reading **link = &cuda->readings; *link != NULL; link = &(*link)->next) {
    qm_cuda_reading *reading = *link;
    const bool small = reading->room_bytes == 4096 || reading->room_bytes < 2 * size_bytes;
    if (reading->room_bytes < size_bytes || !small) continue;
    *link = reading->next;
    *out = reading;
    return QM_OK;
  }
  return create(size_bytes, out);
}

int32_t qm_cuda_read_begin(void *context, const void *x, void *snapshot, int64_t size_bytes,
                           void **out) {
  QM_CUDA_ENTER(context);
  qm_cuda_reading *reading = NULL;
  if (const int32_t status = take(cuda, size_bytes, &reading)) return status;
  reading->size_bytes = size_bytes;
  cudaStream_t stream = cuda->compute;
  cudaError_t error = cudaSuccess;
  if (snapshot != NULL) {
    stream = cuda->copy;
    error =
        cudaMemcpyAsync(snapshot, x, (size_t)size_bytes, cudaMemcpyDeviceToDevice, cuda->compute);
    if (error == cudaSuccess) error = cudaEventRecord(cuda->event, cuda->compute);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(stream, cuda->event, 0);
    x = snapshot;
  }
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(reading->pinned, x, (size_t)size_bytes, cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaEventRecord(reading->done, stream);
  if (error != cudaSuccess)
    destroy(reading);
  else
    *out = reading;
  return qm_cuda_check(error, "read");
}

int32_t qm_cuda_read_ready(void *context, void *opaque) {
  QM_CUDA_ENTER(context);
  const cudaError_t error = cudaEventQuery(((const qm_cuda_reading *)opaque)->done);
  if (error == cudaErrorNotReady) return 0;
  const int32_t status = qm_cuda_check(error, "read");
  return status != QM_OK ? status : 1;
}

int32_t qm_cuda_read_end(void *context, void *opaque, void *host) {
  QM_CUDA_ENTER(context);
  qm_cuda_reading *reading = (qm_cuda_reading *)opaque;
  const cudaError_t error = cudaEventSynchronize(reading->done);
  if (error == cudaSuccess && host != NULL)
    memcpy(host, reading->pinned, (size_t)reading->size_bytes);
  reading->next = cuda->readings;
  cuda->readings = reading;
  const int32_t status = qm_cuda_check(error, "read");
  return status != QM_OK ? status : qm_cuda_late_index(cuda);
}
