/* runtime.h - what the fake runtime offers the fake kernels. */
#ifndef QM_FAKE_CUDA_RUNTIME_H
#define QM_FAKE_CUDA_RUNTIME_H

#include <cuda_runtime_api.h>

#include <functional>

using Work = std::function<void()>;
/* Do this when its turn in the stream comes. */
void fake_queue(cudaStream_t stream, Work work);
/* Do these bytes lie in device memory? */
bool fake_is_device(const void *data, size_t size_bytes);
/* From now on every call fails, as after an illegal access. */
void fake_lose();

#endif
