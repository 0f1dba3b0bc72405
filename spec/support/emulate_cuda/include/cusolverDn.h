/* cusolverDn.h - what the backend asks of cuSOLVER; libraries.cpp answers by LAPACK. */
#ifndef QM_EMULATED_CUSOLVER_H
#define QM_EMULATED_CUSOLVER_H

#include "cublas_v2.h"

typedef enum { CUSOLVER_STATUS_SUCCESS, CUSOLVER_STATUS_ALLOC_FAILED = 2 } cusolverStatus_t;
typedef struct emulated_library *cusolverDnHandle_t;

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t *handle);
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle);
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream);

cusolverStatus_t cusolverDnDgesvd_bufferSize(cusolverDnHandle_t handle, int m, int n, int *count);
cusolverStatus_t cusolverDnDgesvd(cusolverDnHandle_t handle, signed char job_u, signed char job_vt,
                                  int m, int n, double *a, int lda, double *s, double *u, int ldu,
                                  double *vt, int ldvt, double *space, int count, double *rwork,
                                  int *info);
cusolverStatus_t cusolverDnDgeqrf_bufferSize(cusolverDnHandle_t handle, int m, int n, double *a,
                                             int lda, int *count);
cusolverStatus_t cusolverDnDgeqrf(cusolverDnHandle_t handle, int m, int n, double *a, int lda,
                                  double *tau, double *space, int count, int *info);
cusolverStatus_t cusolverDnDorgqr_bufferSize(cusolverDnHandle_t handle, int m, int n, int k,
                                             const double *a, int lda, const double *tau,
                                             int *count);
cusolverStatus_t cusolverDnDorgqr(cusolverDnHandle_t handle, int m, int n, int k, double *a,
                                  int lda, const double *tau, double *space, int count, int *info);
cusolverStatus_t cusolverDnDpotrf_bufferSize(cusolverDnHandle_t handle, cublasFillMode_t part,
                                             int n, double *a, int lda, int *count);
cusolverStatus_t cusolverDnDpotrf(cusolverDnHandle_t handle, cublasFillMode_t part, int n,
                                  double *a, int lda, double *space, int count, int *info);

#endif
