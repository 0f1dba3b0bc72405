/* tensor_map.cu - descriptions of tensors for Hopper's copy engine. */
#include "attention_wgmma.cuh"

typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* The driver's, found at run time: nothing here links against it. */
static encode_function find_encode() {
  void *function = NULL;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? (encode_function)function
                                                                      : NULL;
}

int32_t qm_map_rows(CUtensorMap *map, const qm_array *x, int64_t rows, int64_t heads,
                    int64_t head_size, int64_t stride, uint32_t box_rows) {
  static const encode_function encode = find_encode();
  if (encode == NULL)
    return qm_cuda_host->fail(QM_E_DEVICE, "cuda: the driver has no cuTensorMapEncodeTiled");
  const cuuint64_t extents[] = {(cuuint64_t)head_size, (cuuint64_t)heads, (cuuint64_t)rows};
  const cuuint64_t strides_bytes[] = {(cuuint64_t)head_size * 2, (cuuint64_t)stride * 2};
  const cuuint32_t columns = head_size < 64 ? (cuuint32_t)head_size : 64;
  const cuuint32_t box[] = {columns, 1, box_rows}, steps[] = {1, 1, 1};
  const CUresult result = encode(
      map, x->dtype == QM_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      3, x->data, extents, strides_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return QM_OK;
  return qm_cuda_host->fail(QM_E_DEVICE, "cuda: cuTensorMapEncodeTiled: error %d", (int)result);
}
