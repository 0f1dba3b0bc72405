/* staging.cu - bytes between the host's memory and the device, by way of a ring of pinned chunks.
**
** A write copies into a chunk and returns: the device fetches the bytes in the order of the compute
** stream, and the caller may change its memory at once. Small writes share a chunk; a large one
** fills chunk after chunk while the device fetches the one before. A large read goes through the
** copy stream, which waits for what is queued so far, not for what will be.
*/
#include <stdlib.h>
#include <string.h>

#include "memory.h"

enum { CHUNKS = 4, CHUNK_BYTES = 4 << 20, SMALL_BYTES = 64 << 10, ALIGNMENT = 256 };

struct qm_cuda_staging {
  char *memory; /* CHUNKS * CHUNK_BYTES, pinned */
  int32_t chunk;
  int64_t used_bytes;        /* of that chunk */
  cudaEvent_t free_[CHUNKS]; /* recorded when a chunk's last user was queued */
};

static int32_t open_staging(qm_cuda *cuda) {
  if (cuda->staging != NULL) return QM_OK;
  qm_cuda_staging *staging = (qm_cuda_staging *)calloc(1, sizeof *staging);
  if (staging == NULL) return qm_cuda_host->fail(QM_E_MEMORY, "the host is out of memory");
  cudaError_t error =
      cudaHostAlloc((void **)&staging->memory, (size_t)CHUNKS * CHUNK_BYTES, cudaHostAllocDefault);
  for (int32_t i = 0; i < CHUNKS && error == cudaSuccess; i++)
    error = cudaEventCreateWithFlags(&staging->free_[i], cudaEventDisableTiming);
  cuda->staging = staging;
  if (error != cudaSuccess) qm_cuda_staging_close(cuda);
  return qm_cuda_check(error, "pinned memory");
}

void qm_cuda_staging_close(qm_cuda *cuda) {
  qm_cuda_staging *staging = cuda->staging;
  if (staging == NULL) return;
  for (int32_t i = 0; i < CHUNKS; i++)
    if (staging->free_[i] != NULL) cudaEventDestroy(staging->free_[i]);
  cudaFreeHost(staging->memory);
  free(staging);
  cuda->staging = NULL;
}

/* The next chunk, whole, once its former users are done; the present one is left to `stream`. */
static cudaError_t next_chunk(qm_cuda_staging *staging, cudaStream_t stream) {
  const cudaError_t error = cudaEventRecord(staging->free_[staging->chunk], stream);
  staging->chunk = (staging->chunk + 1) % CHUNKS;
  staging->used_bytes = 0;
  return error != cudaSuccess ? error : cudaEventSynchronize(staging->free_[staging->chunk]);
}

static char *chunk_memory(const qm_cuda_staging *staging, int32_t chunk) {
  return staging->memory + (size_t)chunk * CHUNK_BYTES;
}

static int64_t piece_of(int64_t rest) { return rest < CHUNK_BYTES ? rest : (int64_t)CHUNK_BYTES; }

int32_t qm_cuda_write(void *context, void *out, const void *host, int64_t size_bytes) {
  QM_CUDA_ENTER(context);
  if (const int32_t status = open_staging(cuda)) return status;
  qm_cuda_staging *staging = cuda->staging;
  cudaError_t error = cudaSuccess;
  for (int64_t at = 0; at < size_bytes && error == cudaSuccess;) {
    const int64_t rest = size_bytes - at;
    const bool full = rest > CHUNK_BYTES - staging->used_bytes;
    if (staging->used_bytes > 0 && full) error = next_chunk(staging, cuda->compute);
    if (error != cudaSuccess) break;
    const int64_t piece = piece_of(rest);
    char *pinned = chunk_memory(staging, staging->chunk) + staging->used_bytes;
    memcpy(pinned, (const char *)host + at, (size_t)piece);
    error = cudaMemcpyAsync((char *)out + at, pinned, (size_t)piece, cudaMemcpyHostToDevice,
                            cuda->compute);
    staging->used_bytes += (piece + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    at += piece;
  }
  cuda->last = "write";
  return qm_cuda_check(error, "write");
}

/* Chunk by chunk on the copy stream: while one arrives, the host empties the one before. */
static cudaError_t read_chunks(qm_cuda *cuda, const char *x, char *host, int64_t size_bytes) {
  qm_cuda_staging *staging = cuda->staging;
  cudaError_t error = cudaEventRecord(cuda->event, cuda->compute);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(cuda->copy, cuda->event, 0);
  if (error == cudaSuccess) error = next_chunk(staging, cuda->compute);
  int32_t oldest = staging->chunk;
  for (int64_t asked = 0, got = 0; got < size_bytes && error == cudaSuccess;) {
    while (asked < size_bytes && asked - got < 2 * CHUNK_BYTES && error == cudaSuccess) {
      const int64_t piece = piece_of(size_bytes - asked);
      error = cudaMemcpyAsync(chunk_memory(staging, staging->chunk), x + asked, (size_t)piece,
                              cudaMemcpyDeviceToHost, cuda->copy);
      if (error == cudaSuccess) error = next_chunk(staging, cuda->copy);
      asked += piece;
    }
    if (error == cudaSuccess) error = cudaEventSynchronize(staging->free_[oldest]);
    if (error != cudaSuccess) break;
    const int64_t piece = piece_of(size_bytes - got);
    memcpy(host + got, chunk_memory(staging, oldest), (size_t)piece);
    oldest = (oldest + 1) % CHUNKS;
    got += piece;
  }
  return error;
}

int32_t qm_cuda_read(void *context, const void *x, void *host, int64_t size_bytes) {
  QM_CUDA_ENTER(context);
  if (const int32_t status = open_staging(cuda)) return status;
  qm_cuda_staging *staging = cuda->staging;
  if (size_bytes > SMALL_BYTES) {
    const cudaError_t error = read_chunks(cuda, (const char *)x, (char *)host, size_bytes);
    if (error != cudaSuccess) return qm_cuda_check(error, "read");
    return qm_cuda_wait(cuda, cuda->copy, "read");
  }
  cudaError_t error = cudaSuccess;
  if (staging->used_bytes + size_bytes > CHUNK_BYTES) error = next_chunk(staging, cuda->compute);
  char *pinned = chunk_memory(staging, staging->chunk) + staging->used_bytes;
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(pinned, x, (size_t)size_bytes, cudaMemcpyDeviceToHost, cuda->compute);
  if (const int32_t status = qm_cuda_check(error, "read")) return status;
  const int32_t status = qm_cuda_wait(cuda, cuda->compute, "read");
  if (status == QM_OK) memcpy(host, pinned, (size_t)size_bytes);
  return status;
}
