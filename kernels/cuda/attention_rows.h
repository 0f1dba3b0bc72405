/* attention_rows.h - the attention kernels that take any element type and head size. */
#ifndef QM_ATTENTION_ROWS_H
#define QM_ATTENTION_ROWS_H

#include "cuda.h"

int32_t qm_cuda_attention_rows(qm_cuda *cuda, const qm_attention_args *args);
int32_t qm_cuda_attention_backward_rows(qm_cuda *cuda, const qm_attention_backward_args *args);
/* *delta f32 [RQ, H] = dout . out, in the device's scratch. */
int32_t qm_cuda_attention_delta(qm_cuda *cuda, const qm_attention_backward_args *args,
                                float **delta);

#endif
