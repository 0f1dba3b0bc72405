/* attention.cu - which of the attention kernels runs; the check of the offsets. */
#include <stdlib.h>
#include <string.h>

#include "attention.cuh"
#include "attention_mma.h"
#include "attention_rows.h"
#include "attention_wgmma.h"

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

/* Where the tensor cores' kernels go: whole 16-byte pieces of 16-bit elements. */
template <typename Args>
static bool suits_mma(const Args *args) {
  const int64_t size = args->head_size;
  return args->q.dtype != QM_F32 && (size == 64 || size == 80 || size == 96 || size == 128) &&
         args->options.scale > 0.0 && qm_aligned(args->q.data, 16) &&
         qm_aligned(args->k.data, 16) && qm_aligned(args->v.data, 16) &&
         qm_aligned(args->out.data, 16) &&
         (args->stride_q | args->stride_k | args->stride_v) % 8 == 0;
}

/* Hopper's own kernels: of those, the head sizes in whole tiles of 64. QM_CUDA_WGMMA=0 does
** without. */
template <typename Args>
static bool suits_wgmma(const qm_cuda *cuda, const Args *args) {
  const char *wanted = getenv("QM_CUDA_WGMMA");
  return (wanted == NULL || strcmp(wanted, "0") != 0) && cuda->capability == 90 &&
         (args->head_size == 64 || args->head_size == 128);
}

int32_t qm_cuda_attention(void *context, const qm_attention_args *args) {
  QM_CUDA_ENTER(context);
  if (args->sequences == 0 || args->rows_q == 0) return QM_OK;
  if (const int32_t status = check(cuda, args)) return status;
  if (!suits_mma(args)) return qm_cuda_attention_rows(cuda, args);
  return suits_wgmma(cuda, args) ? qm_cuda_attention_wgmma(cuda, args)
                                 : qm_cuda_attention_mma(cuda, args);
}

int32_t qm_cuda_attention_backward(void *context, const qm_attention_backward_args *args) {
  QM_CUDA_ENTER(context);
  if (args->sequences == 0) return QM_OK;
  const bool aligned = qm_aligned(args->dout.data, 16) && qm_aligned(args->dq.data, 16) &&
                       qm_aligned(args->dk.data, 16) && qm_aligned(args->dv.data, 16);
  if (!aligned || !suits_mma(args)) return qm_cuda_attention_backward_rows(cuda, args);
  return suits_wgmma(cuda, args) ? qm_cuda_attention_backward_wgmma(cuda, args)
                                 : qm_cuda_attention_backward_mma(cuda, args);
}
