/* level.c - which kernels this instruction-set level overrides. */
#include "cpu/cpu.h"

void QM_CPU(level)(qm_kernels *kernels) {
  kernels->swiglu = QM_CPU(swiglu);
  kernels->swiglu_backward = QM_CPU(swiglu_backward);
}
