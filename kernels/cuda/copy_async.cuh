/* copy_async.cuh - copies to shared memory in the background; the thread that asked waits. */
#ifndef QM_COPY_ASYNC_CUH
#define QM_COPY_ASYNC_CUH

#include "device.cuh"

/* Copy 16 bytes to shared memory in the background; zeros where `there` is false. */
__device__ __forceinline__ void qm_copy_async(void *shared, const void *global, bool there) {
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void qm_copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/* Wait until at most PENDING of this thread's commits are under way. */
template <int PENDING>
__device__ __forceinline__ void qm_copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

#endif
