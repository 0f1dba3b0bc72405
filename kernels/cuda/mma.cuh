/* mma.cuh - the tensor cores' warp-level instructions (sm_80 and later) for 16-bit elements.
**
** Fragments of mma.m16n8k16 for lane l, g = l / 4, t = l % 4: A holds rows g and g + 8, columns 2t,
** 2t+1 and 2t+8, 2t+9; B holds rows 2t, 2t+1, 2t+8, 2t+9 of column g; the accumulator holds rows g
** and g + 8 of columns 2t and 2t + 1. Source: PTX ISA, "Matrix multiply-accumulate operation".
*/
#ifndef QM_MMA_CUH
#define QM_MMA_CUH

#include "copy_async.cuh"

/* acc += a b */
template <typename T>
static __device__ __forceinline__ void qm_mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1);
template <>
__device__ __forceinline__ void qm_mma<__nv_bfloat16>(float (&acc)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void qm_mma<__half>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Four 8 x 8 tiles of 16-bit elements out of shared memory; lane l gives the row l % 8 of tile
** l / 8. Transposed: each tile arrives as its transpose. */
static __device__ __forceinline__ void qm_ldmatrix(uint32_t (&out)[4], const void *row) {
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}
static __device__ __forceinline__ void qm_ldmatrix_transposed(uint32_t (&out)[4], const void *row) {
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

/* Two floats as two elements in one word, the first in the low half. */
template <typename T>
static __device__ __forceinline__ uint32_t qm_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t qm_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *(const uint32_t *)&pair;
}
template <>
__device__ __forceinline__ uint32_t qm_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *(const uint32_t *)&pair;
}
/* One of the two back. */
template <typename T>
static __device__ __forceinline__ float qm_half_of(uint32_t pair, int high) {
  const uint16_t bits = (uint16_t)(high ? pair >> 16 : pair);
  return qm_float(*(const T *)&bits);
}

#endif
