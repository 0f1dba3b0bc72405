/* memory.h - what backend.cu puts into its table: memory, copies, graphs, times. */
#ifndef QM_CUDA_MEMORY_H
#define QM_CUDA_MEMORY_H

#include "cuda.h"

/* ---- errors.cu ---- */

/* Wait for a stream; report what failed late, `operation` being what waits. */
int32_t qm_cuda_wait(qm_cuda *cuda, cudaStream_t stream, const char *operation);
/* The same for the index that a kernel found out of range, without waiting. */
int32_t qm_cuda_late_index(qm_cuda *cuda);
/* Why there is no device, from what counting them returned. */
int32_t qm_cuda_no_device(cudaError_t error);

/* ---- memory.cu ---- */

int32_t qm_cuda_allocate(void *context, int64_t size_bytes, void **memory);
void qm_cuda_release(void *context, void *memory, int64_t size_bytes);
void qm_cuda_scratch_close(qm_cuda *cuda);
int64_t qm_cuda_workspace_bytes(void *context);
int32_t qm_cuda_copy_between(void *context, void *out, void *from, const void *x,
                             int64_t size_bytes);

/* ---- staging.cu ---- */

void qm_cuda_staging_close(qm_cuda *cuda);
int32_t qm_cuda_write(void *context, void *out, const void *host, int64_t size_bytes);
int32_t qm_cuda_read(void *context, const void *x, void *host, int64_t size_bytes);

/* ---- reading.cu ---- */

void qm_cuda_readings_close(qm_cuda *cuda);
int32_t qm_cuda_read_begin(void *context, const void *x, void *snapshot, int64_t size_bytes,
                           void **reading);
int32_t qm_cuda_read_ready(void *context, void *reading);
int32_t qm_cuda_read_end(void *context, void *reading, void *host);

/* ---- graph.cu ---- */

int32_t qm_cuda_graph_begin(void *context);
int32_t qm_cuda_graph_end(void *context, void **graph);
int32_t qm_cuda_graph_launch(void *context, void *graph);
void qm_cuda_graph_release(void *context, void *graph);

/* ---- timing.cu ---- */

void qm_cuda_marks_close(qm_cuda *cuda);
int32_t qm_cuda_time_begin(void *context, void **mark);
int32_t qm_cuda_time_end(void *context, void *mark);
int32_t qm_cuda_time_read(void *context, void *mark, double *seconds);
void qm_cuda_range_begin(void *context, const char *name);
void qm_cuda_range_end(void *context);

#endif
