/* cholesky_inverse.cu - the upper Cholesky factor of a symmetric matrix's inverse, in f64.
**
** Reference: kernels/reference/cholesky_inverse.c: the matrix is read from its last element to the
**            first, so that one factorization and one triangular inverse suffice. What it calls the
**            lower triangle is the upper one to libraries that count by columns.
*/
#include "linalg.cuh"

enum { THREADS = 256 };

static int32_t multiplied(cublasStatus_t code, const char *what) {
  if (code == CUBLAS_STATUS_SUCCESS) return QM_OK;
  return qm_cuda_host->fail(code == CUBLAS_STATUS_ALLOC_FAILED ? QM_E_MEMORY : QM_E_DEVICE,
                            "cuda: %s: cuBLAS failed with code %d", what, (int)code);
}

/* cuBLAS's handle, made when first asked for. */
static int32_t begin_triangle(qm_cuda *cuda, cublasHandle_t *out) {
  if (cuda->triangles == NULL) {
    cublasHandle_t handle;
    int32_t made = multiplied(cublasCreate(&handle), "opening cuBLAS");
    if (made != QM_OK) return made;
    cuda->triangles = handle;
    made = multiplied(cublasSetStream(handle, cuda->compute), "opening cuBLAS");
    if (made != QM_OK) return made;
  }
  *out = (cublasHandle_t)cuda->triangles;
  return QM_OK;
}

/* One block: the damping that a's mean diagonal asks for. */
static __global__ void __launch_bounds__(THREADS)
    damping_of(const float *a, double *out, int64_t n, double damping) {
  __shared__ double partial[THREADS];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += THREADS) sum += (double)a[i * n + i];
  partial[threadIdx.x] = sum;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = damping * partial[0] / (double)n;
}

/* b = the damped a, read from its last element to the first; inverse = the identity. */
static __global__ void __launch_bounds__(THREADS)
    turn(const float *a, const double *damping, double *b, double *inverse, int64_t n) {
  const int64_t stride = (int64_t)gridDim.x * THREADS, count = n * n;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) {
    const bool diagonal = i / n == i % n;
    b[count - 1 - i] = (double)a[i] + (diagonal ? *damping : 0.0);
    inverse[i] = diagonal ? 1.0 : 0.0;
  }
}

/* The upper triangle of u, from the last element to the first. */
static __global__ void __launch_bounds__(THREADS)
    turn_back(const double *inverse, float *u, int64_t n) {
  const int64_t stride = (int64_t)gridDim.x * THREADS, count = n * n;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride)
    u[i] = i % n >= i / n ? (float)inverse[count - 1 - i] : 0.0f;
}

static int32_t invert(qm_cuda *cuda, cusolverDnHandle_t handle, cublasHandle_t triangles,
                      const qm_cholesky_inverse_args *args, qm_linalg *w) {
  const char *what = "cholesky_inverse";
  const int n = (int)args->n;
  int count = 0;
  int32_t status = qm_linalg_solved(
      cusolverDnDpotrf_bufferSize(handle, CUBLAS_FILL_MODE_UPPER, n, NULL, n, &count), what);
  if (status == QM_OK)
    status = qm_linalg_reserve(cuda, w, {args->a.count, args->a.count, count, 1});
  if (status == QM_OK) status = qm_linalg_check_finite(cuda, &args->a, w->found);
  if (status != QM_OK) return status;
  const float *a = (const float *)args->a.data;
  double *b = w->parts[0], *inverse = w->parts[1], *damping = w->parts[3];
  const unsigned blocks = qm_blocks(cuda, args->a.count, THREADS);
  damping_of<<<1, THREADS, 0, cuda->compute>>>(a, damping, args->n, args->damping);
  turn<<<blocks, THREADS, 0, cuda->compute>>>(a, damping, b, inverse, args->n);
  status = qm_cuda_launched(cuda, what);
  if (status == QM_OK)
    status = qm_linalg_solved(cusolverDnDpotrf(handle, CUBLAS_FILL_MODE_UPPER, n, b, n, w->parts[2],
                                               count, &w->found->info),
                              what);
  const double one = 1.0;
  if (status == QM_OK)
    status =
        multiplied(cublasDtrsm(triangles, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N,
                               CUBLAS_DIAG_NON_UNIT, n, n, &one, b, n, inverse, n),
                   what);
  if (status != QM_OK) return status;
  turn_back<<<blocks, THREADS, 0, cuda->compute>>>(inverse, (float *)args->u.data, args->n);
  return qm_cuda_launched(cuda, what);
}

int32_t qm_cuda_cholesky_inverse(void *context, const qm_cholesky_inverse_args *args) {
  QM_CUDA_ENTER(context);
  cusolverDnHandle_t handle;
  cublasHandle_t triangles;
  if (args->a.count == 0) return QM_OK;
  int32_t status = qm_linalg_begin(cuda, &args->a, "cholesky_inverse", &handle);
  if (status == QM_OK) status = begin_triangle(cuda, &triangles);
  if (status != QM_OK) return status;
  qm_linalg w = {};
  int info;
  status = qm_linalg_wait(cuda, &w, invert(cuda, handle, triangles, args, &w), &info);
  if (status == QM_OK && info > 0)
    return qm_cuda_host->fail(
        QM_E_ARGUMENT,
        "argument 'a': expected a positive definite matrix; it is not from row %lld on",
        (long long)(args->n - info));
  return status;
}
