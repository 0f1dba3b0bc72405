/* device.cuh - small device functions and launch arithmetic that the kernels share. */
#ifndef QM_DEVICE_CUH
#define QM_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda.h"

/* ---- element types ---- */

__device__ __forceinline__ float qm_float(float x) { return x; }
__device__ __forceinline__ float qm_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float qm_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T qm_as(float x);
template <>
__device__ __forceinline__ float qm_as<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half qm_as<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 qm_as<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/* Call `body` with a value of the element type that a float dtype names. */
template <typename Body>
int32_t qm_with_float(int32_t dtype, Body body) {
  switch (dtype) {
    case QM_F32: return body(float{});
    case QM_F16: return body(__half{});
    default: return body(__nv_bfloat16{});
  }
}

/* The same for the 16-bit ones. */
template <typename Body>
int32_t qm_with_half(int32_t dtype, Body body) {
  return dtype == QM_F16 ? body(__half{}) : body(__nv_bfloat16{});
}

/* N elements that move as one access of N * sizeof(T) bytes. */
template <typename T, int N>
struct alignas(sizeof(T) * N) qm_pack {
  T at[N];
};
/* True where x can be read in packs of `bytes`. */
static inline bool qm_aligned(const void *x, int64_t bytes) { return (uintptr_t)x % bytes == 0; }

/* ---- launches ---- */

static inline int64_t qm_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Blocks for a grid-stride loop over `items`: enough to fill the device, no more. */
static inline unsigned qm_blocks(const qm_cuda *cuda, int64_t items, int32_t per_block,
                                 int32_t blocks_per_multiprocessor = 16) {
  const int64_t wanted = qm_ceil_div(items, per_block);
  const int64_t most = (int64_t)cuda->multiprocessors * blocks_per_multiprocessor;
  return (unsigned)(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

/* ---- launches that begin early ----
**
** A kernel that qm_launch_early starts may begin (on a Hopper GPU) as soon as every block of the
** kernel before it in the stream has called qm_let_next_begin, and always once that has ended. What
** it does before qm_await_previous overlaps with that kernel; behind it, all that earlier kernels
** wrote is there. Kernels launched otherwise begin when all before them have ended.
**
** What must hold: only kernels that write no weights (codes, scales, zero points) call
** qm_let_next_begin; then whatever writes weights has ended before any later kernel begins, and
** weights may be read before qm_await_previous. All else that is read, and every write, comes
** behind it; so does the end of each block, which keeps the order over three kernels and more.
*/

/* cluster_y: blocks of the grid's column that make a cluster, which needs a Hopper GPU; or 1. */
template <typename... Parameters>
static inline void qm_launch_clusters(const qm_cuda *cuda, void (*kernel)(Parameters...),
                                      unsigned cluster_y, dim3 grid, dim3 block,
                                      int32_t shared_bytes,
                                      const std::type_identity_t<Parameters> &...parameters) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {1, cluster_y, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = (size_t)shared_bytes;
  config.stream = cuda->compute;
  config.attrs = attributes;
  config.numAttrs = cuda->capability < 90 ? 0 : cluster_y > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, parameters...); /* qm_cuda_launched finds its error */
}
template <typename... Parameters>
static inline void qm_launch_early(const qm_cuda *cuda, void (*kernel)(Parameters...), dim3 grid,
                                   dim3 block, int32_t shared_bytes,
                                   const std::type_identity_t<Parameters> &...parameters) {
  qm_launch_clusters(cuda, kernel, 1, grid, block, shared_bytes, parameters...);
}
__device__ __forceinline__ void qm_let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void qm_await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* Both, for kernels that have nothing to do before: what is gained is the time of a launch. */
__device__ __forceinline__ void qm_take_turn() {
  qm_let_next_begin();
  qm_await_previous();
}

/* ---- reductions of fixed order ---- */

__device__ __forceinline__ float qm_warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  return x;
}
__device__ __forceinline__ float qm_warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
  return x;
}
/* The block's sum, in every thread; blockDim.x a multiple of 32. Synchronizes the block. */
__device__ __forceinline__ float qm_block_sum(float x) {
  __shared__ float partial[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = qm_warp_sum(x);
  __syncthreads(); /* a former sum may still be read */
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return qm_warp_sum(lane < warps ? partial[lane] : 0.0f);
}

/* ---- indices that come from tensors ---- */

/* True when 0 <= value < limit; else note it for the next call that waits. */
__device__ __forceinline__ bool qm_index_fits(qm_cuda_late *late, int32_t operation, int64_t value,
                                              int64_t limit) {
  if (value >= 0 && value < limit) return true;
  if (atomicCAS(late->taken, 0u, 1u) == 0u) {
    late->operation = operation;
    late->value = value;
    late->limit = limit;
    __threadfence_system();
    late->found = 1u;
  }
  return false;
}

#endif
