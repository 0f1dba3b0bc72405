/* attention_few.h - the attention kernel for few queries. */
#ifndef QM_ATTENTION_FEW_H
#define QM_ATTENTION_FEW_H

#include "cuda.h"

/* Whether it is the faster one; what the tensor cores' kernels ask for holds. */
bool qm_cuda_attention_is_few(const qm_attention_args *args);
/* Checks the offsets too. */
int32_t qm_cuda_attention_few(qm_cuda *cuda, const qm_attention_args *args);

#endif
