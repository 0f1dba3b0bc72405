/* attention_mma.h - the attention kernels on the tensor cores. */
#ifndef QM_ATTENTION_MMA_H
#define QM_ATTENTION_MMA_H

#include "cuda.h"

/* 16-bit elements, head sizes 64, 80, 96, 128, operands and strides in whole 16 bytes, scale >
** 0. */
int32_t qm_cuda_attention_mma(qm_cuda *cuda, const qm_attention_args *args);
int32_t qm_cuda_attention_backward_mma(qm_cuda *cuda, const qm_attention_backward_args *args);

#endif
