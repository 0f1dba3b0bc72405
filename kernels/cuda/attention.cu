/* attention.cu - which of the attention kernels runs; the check of the offsets. */
#include "attention.cuh"
#include "attention_rows.h"

/* Offsets ascend from 0 to the row count: note the first that does not. */
static __global__ void check_offsets(const int32_t *cu, int32_t count, int32_t rows,
                                     qm_cuda_late *late) {
  for (int32_t s = threadIdx.x; s < count; s += blockDim.x) {
    const int32_t low = s == 0 ? 0 : cu[s - 1], high = s == 0 ? 0 : rows;
    const bool fits = cu[s] >= low && cu[s] <= high && (s < count - 1 || cu[s] == rows);
    if (!fits) qm_index_fits(late, QM_CUDA_OP_attention, -1 - s, 0);
  }
}

template <typename Args>
static int32_t check(qm_cuda *cuda, const Args *args) {
  check_offsets<<<1, 32, 0, cuda->compute>>>((const int32_t *)args->cu_q.data,
                                             (int32_t)args->cu_q.count, (int32_t)args->rows_q,
                                             cuda->late_device);
  if (args->cu_k.data != args->cu_q.data || args->rows_k != args->rows_q)
    check_offsets<<<1, 32, 0, cuda->compute>>>((const int32_t *)args->cu_k.data,
                                               (int32_t)args->cu_k.count, (int32_t)args->rows_k,
                                               cuda->late_device);
  return qm_cuda_launched(cuda, "attention");
}

int32_t qm_cuda_attention(void *context, const qm_attention_args *args) {
  QM_CUDA_ENTER(context);
  if (args->sequences == 0 || args->rows_q == 0) return QM_OK;
  if (const int32_t status = check(cuda, args)) return status;
  return qm_cuda_attention_rows(cuda, args);
}

int32_t qm_cuda_attention_backward(void *context, const qm_attention_backward_args *args) {
  QM_CUDA_ENTER(context);
  if (args->sequences == 0) return QM_OK;
  return qm_cuda_attention_backward_rows(cuda, args);
}
