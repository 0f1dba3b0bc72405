/* cpu.h - the fast CPU backend: the reference's table with what matters overridden.
**
** Files in kernels/cpu/ are compiled once. Files in kernels/cpu/level/ hold the vectorized kernels:
** plain C that the compiler vectorizes, compiled once per instruction-set level (QM_CPU_LEVEL), and
** the table picks a level when the device opens. Every name there goes through QM_CPU().
*/
#ifndef QM_CPU_H
#define QM_CPU_H

#include "reference/reference.h"

typedef struct qm_cpu_context {
  int32_t threads;
  int32_t bf16;              /* oneDNN multiplies bf16 natively here */
  int32_t amx;               /* bf16 tile registers are there and the kernel lets us use them */
  const char *level;         /* "base", "v3", "v4" */
  const qm_kernels *kernels; /* the device's own table, for kernels made of others */
  struct qm_cpu_gemm *gemm;  /* oneDNN's engine, stream and primitive cache; see gemm.c */
} qm_cpu_context;

/* Kernels of one level, written over a copy of the reference's table. */
void qm_cpu_level_base(qm_kernels *kernels);
void qm_cpu_level_v3(qm_kernels *kernels);
void qm_cpu_level_v4(qm_kernels *kernels);

/* gemm.c, linalg.c: compiled once, the libraries choose their own instructions. */
int32_t qm_cpu_gemm_open(qm_cpu_context *context);
void qm_cpu_gemm_close(qm_cpu_context *context);
int32_t qm_cpu_gemm(void *context, const qm_gemm_args *args);
int32_t qm_cpu_svd(void *context, const qm_svd_args *args);
int32_t qm_cpu_qr(void *context, const qm_qr_args *args);
int32_t qm_cpu_cholesky_inverse(void *context, const qm_cholesky_inverse_args *args);

#ifdef QM_CPU_LEVEL
#define QM_CPU_PASTE_(a, b, c) a##b##_##c
#define QM_CPU_PASTE(a, b, c) QM_CPU_PASTE_(a, b, c)
/* qm_cpu_swiglu_v4 and its kin */
#define QM_CPU(name) QM_CPU_PASTE(qm_cpu_, name, QM_CPU_LEVEL)

#define X(name) int32_t QM_CPU(name)(void *context, const qm_##name##_args *args);
QM_KERNEL_LIST(X)
#undef X

/* a * b + c: fused where the instruction exists, never a library call. Not for kernels that must
** agree with the reference to the bit. */
#if defined(__FMA__) || defined(__aarch64__)
#define QM_FMA(a, b, c) __builtin_fmaf((a), (b), (c))
#else
#define QM_FMA(a, b, c) ((a) * (b) + (c))
#endif
#endif

#endif
