/* unfinished.c - TEMPORARY: weak stand-ins for kernels not written yet. Goes when none is left. */
#include "reference/reference.h"

#define X(name)                                                                                    \
  __attribute__((weak)) int32_t qm_reference_##name(void *context, const qm_##name##_args *args) { \
    (void)context;                                                                                 \
    (void)args;                                                                                    \
    return qm_reference_host->fail(QM_E_UNSUPPORTED, "%s is not written yet", #name);              \
  }
QM_KERNEL_LIST(X)
#undef X
