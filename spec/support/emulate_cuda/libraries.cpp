/* libraries.cpp - what NVIDIA's libraries do in the real backend: cuSOLVER's and cuBLAS's calls by
** LAPACK. cuBLASLt's are in products.cpp. */
#include <cusolverDn.h>
#include <lapacke.h>

#include "runtime.h"

/* ---- decompositions: nobody looks at a handle but for its stream ---- */

struct emulated_library {
  cudaStream_t stream;
};

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t *handle) {
  *handle = new emulated_library{};
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) {
  delete handle;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
  handle->stream = stream;
  return CUSOLVER_STATUS_SUCCESS;
}
cublasStatus_t cublasCreate(cublasHandle_t *handle) {
  *handle = new emulated_library{};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
  handle->stream = stream;
  return CUBLAS_STATUS_SUCCESS;
}

/* Calls want room for what a step of theirs spoils; ours is a number that they write. */
static cusolverStatus_t room(int *count) {
  *count = 1;
  return CUSOLVER_STATUS_SUCCESS;
}
static cusolverStatus_t queue(cusolverDnHandle_t handle, double *space, int *info,
                              std::function<lapack_int()> call) {
  runtime_queue(handle->stream, [=] {
    *space = 0.0 / 0.0;
    *info = (int)call();
  });
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDgesvd_bufferSize(cusolverDnHandle_t, int, int, int *count) {
  return room(count);
}
cusolverStatus_t cusolverDnDgesvd(cusolverDnHandle_t handle, signed char job_u, signed char job_vt,
                                  int m, int n, double *a, int lda, double *s, double *u, int ldu,
                                  double *vt, int ldvt, double *space, int, double *, int *info) {
  return queue(handle, space, info, [=] {
    double *superdiagonal = new double[(size_t)(m < n ? m : n)];
    const lapack_int result =
        LAPACKE_dgesvd(LAPACK_COL_MAJOR, (char)job_u, (char)job_vt, m, n, a, lda, s, u, ldu, vt,
                       ldvt, superdiagonal);
    delete[] superdiagonal;
    return result;
  });
}

cusolverStatus_t cusolverDnDgeqrf_bufferSize(cusolverDnHandle_t, int, int, double *, int,
                                             int *count) {
  return room(count);
}
cusolverStatus_t cusolverDnDgeqrf(cusolverDnHandle_t handle, int m, int n, double *a, int lda,
                                  double *tau, double *space, int, int *info) {
  return queue(handle, space, info,
               [=] { return LAPACKE_dgeqrf(LAPACK_COL_MAJOR, m, n, a, lda, tau); });
}
cusolverStatus_t cusolverDnDorgqr_bufferSize(cusolverDnHandle_t, int, int, int, const double *, int,
                                             const double *, int *count) {
  return room(count);
}
cusolverStatus_t cusolverDnDorgqr(cusolverDnHandle_t handle, int m, int n, int k, double *a,
                                  int lda, const double *tau, double *space, int, int *info) {
  return queue(handle, space, info,
               [=] { return LAPACKE_dorgqr(LAPACK_COL_MAJOR, m, n, k, a, lda, tau); });
}

static char part_of(cublasFillMode_t part) { return part == CUBLAS_FILL_MODE_UPPER ? 'U' : 'L'; }

cusolverStatus_t cusolverDnDpotrf_bufferSize(cusolverDnHandle_t, cublasFillMode_t, int, double *,
                                             int, int *count) {
  return room(count);
}
cusolverStatus_t cusolverDnDpotrf(cusolverDnHandle_t handle, cublasFillMode_t part, int n,
                                  double *a, int lda, double *space, int, int *info) {
  return queue(handle, space, info,
               [=] { return LAPACKE_dpotrf(LAPACK_COL_MAJOR, part_of(part), n, a, lda); });
}

/* As the backend calls it: from the left, by 1. */
cublasStatus_t cublasDtrsm(cublasHandle_t handle, cublasSideMode_t, cublasFillMode_t part,
                           cublasOperation_t operation, cublasDiagType_t diagonal, int m, int n,
                           const double *, const double *a, int lda, double *b, int ldb) {
  runtime_queue(handle->stream, [=] {
    LAPACKE_dtrtrs(LAPACK_COL_MAJOR, part_of(part), operation == CUBLAS_OP_N ? 'N' : 'T',
                   diagonal == CUBLAS_DIAG_UNIT ? 'U' : 'N', m, n, a, lda, b, ldb);
  });
  return CUBLAS_STATUS_SUCCESS;
}
