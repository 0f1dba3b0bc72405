/* attention_wgmma.h - the attention kernels for Hopper (compute capability 9.0). */
#ifndef QM_ATTENTION_WGMMA_H
#define QM_ATTENTION_WGMMA_H

#include "cuda.h"

/* 16-bit elements, head sizes 64 and 128, operands and strides in whole 16 bytes, scale > 0. */
int32_t qm_cuda_attention_wgmma(qm_cuda *cuda, const qm_attention_args *args);
int32_t qm_cuda_attention_backward_wgmma(qm_cuda *cuda, const qm_attention_backward_args *args);

#endif
