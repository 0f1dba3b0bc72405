/* attention.cu - which of the attention kernels runs; the check of the offsets. */
#include "attention.cuh"
#include "attention_few.h"
#include "attention_mma.h"
#include "attention_rows.h"
#include "attention_wgmma.h"

static __global__ void check_offsets(qm_attention_shape shape, qm_cuda_late *late) {
  qm_attention_check(shape, late);
}

template <typename Args>
static int32_t check(qm_cuda *cuda, const Args *args) {
  check_offsets<<<1, 64, 0, cuda->compute>>>(qm_attention_shape_of(args), cuda->late_device);
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

/* Hopper's own kernels take the head sizes in whole tiles of 64. */
template <typename Args>
static bool suits_wgmma(const qm_cuda *cuda, const Args *args) {
  return cuda->has_wgmma && (args->head_size == 64 || args->head_size == 128);
}

int32_t qm_cuda_attention(void *context, const qm_attention_args *args) {
  QM_CUDA_ENTER(context);
  if (args->sequences == 0 || args->rows_q == 0) return QM_OK;
  if (suits_mma(args) && qm_cuda_attention_is_few(args)) return qm_cuda_attention_few(cuda, args);
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
