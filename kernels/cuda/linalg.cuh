/* linalg.cuh - what decompositions in f64 share: memory, cuSOLVER's handle, checks. See
** linalg.cu. */
#ifndef QM_LINALG_CUH
#define QM_LINALG_CUH

#include <cublas_v2.h>
#include <cusolverDn.h>

#include "device.cuh"

/* What the device reports back. */
typedef struct qm_linalg_report {
  unsigned long long at; /* index of the first value that is not finite */
  float value;
  int info; /* cuSOLVER's */
} qm_linalg_report;

/* Parts of one block: an operand and results, by column and in f64, and cuSOLVER's workspace. */
typedef struct qm_linalg {
  void *block;
  bool owned; /* too large to keep: freed at the end */
  double *parts[4];
  qm_linalg_report *found;
} qm_linalg;

/* The handle, made when first asked for, and whether `a` is a matrix for it. */
int32_t qm_linalg_begin(qm_cuda *cuda, const qm_array *a, const char *name,
                        cusolverDnHandle_t *out);
/* Room for parts of so many numbers. */
int32_t qm_linalg_reserve(qm_cuda *cuda, qm_linalg *w, const int64_t (&counts)[4]);
/* Refuse a matrix with NaN or infinity, naming the first. */
int32_t qm_linalg_check_finite(qm_cuda *cuda, const qm_array *a, qm_linalg_report *found);
/* cuSOLVER's answer to a call as a status. */
int32_t qm_linalg_solved(cusolverStatus_t code, const char *what);
/* Wait, release, and read cuSOLVER's info: above 0 it says where the decomposition ended. */
int32_t qm_linalg_wait(qm_cuda *cuda, qm_linalg *w, int32_t status, int *info);

#endif
