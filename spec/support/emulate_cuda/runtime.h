/* runtime.h - what the runtime offers those who run kernels. */
#ifndef QM_EMULATED_RUNTIME_H
#define QM_EMULATED_RUNTIME_H

#include <cuda_runtime_api.h>

#include <functional>

using Work = std::function<void()>;
/* Do this when its turn in the stream comes. */
void runtime_queue(cudaStream_t stream, Work work);
/* From now on every call fails, as after an illegal access. */
void runtime_lose();
/* The launch just asked for was refused: cudaGetLastError tells. */
void runtime_fail(cudaError_t error);

#endif
