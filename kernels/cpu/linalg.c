/* linalg.c - decompositions through LAPACK. */
#include "cpu.h"

int32_t qm_cpu_svd(void *context, const qm_svd_args *args) {
  return qm_reference_svd(context, args);
}
int32_t qm_cpu_qr(void *context, const qm_qr_args *args) { return qm_reference_qr(context, args); }
