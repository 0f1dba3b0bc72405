/* cuda.h - what the backend uses of NVIDIA's driver: descriptions of tensors for the copy
** engine. */
#ifndef QM_EMULATED_CUDA_DRIVER_H
#define QM_EMULATED_CUDA_DRIVER_H

#include <stdint.h>

typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
typedef enum { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE } CUresult;
typedef enum {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
} CUtensorMapDataType;
typedef enum { CU_TENSOR_MAP_INTERLEAVE_NONE } CUtensorMapInterleave;
typedef enum { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 } CUtensorMapSwizzle;
typedef enum { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 } CUtensorMapL2promotion;
typedef enum { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE } CUtensorMapFloatOOBfill;

/* The real one is 128 opaque bytes. */
typedef struct alignas(64) CUtensorMap {
  const void *data;
  uint64_t extents[3], strides_bytes[2];
  uint32_t box[3];
  bool swizzled;
} CUtensorMap;

#endif
