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
__device__ __forceinline__ void qm_copy_async(void *shared, const void *global) {
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(at), "l"(global) : "memory");
}
/* One number. */
__device__ __forceinline__ void qm_copy_number(float *shared, const float *global) {
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(at), "l"(global) : "memory");
}
__device__ __forceinline__ void qm_copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/* Wait until at most PENDING of this thread's commits are under way. */
template <int PENDING>
__device__ __forceinline__ void qm_copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

/* Copy quad `quad` of x, 4 elements of 16 or 8 aligned bytes. Through the first cache: past it
** (.cg), an update step with f32 moments took 4 to 7 % longer on an H200; with bf16 moments neither
** was better at every size. */
template <typename T>
__device__ __forceinline__ void qm_copy_four(void *shared, const T *x, uint32_t quad) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 2, "16 or 8 bytes");
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
  if constexpr (sizeof(T) == 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;\n" ::"r"(at),
                 "l"((const uint4 *)x + quad)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(at),
                 "l"((const uint2 *)x + quad)
                 : "memory");
}

#endif
