/* mpq_update.cuh - the two kernels of the update step: which calls the fused one takes. */
#ifndef QM_MPQ_UPDATE_CUH
#define QM_MPQ_UPDATE_CUH

#include "mpq.cuh"

/* Launch the fused kernel where the call fits it; false where it does not. */
bool qm_cuda_mpq_update_fused(qm_cuda *cuda, const qm_mpq_update_args *args,
                              const qm_adam_source &source);

#endif
