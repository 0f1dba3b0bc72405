/* linalg.cu - decompositions through cuSOLVER. References: kernels/reference/svd.c and qr.c.
**
** In f64: what is decomposed here is small (a projector's sketch), and bases come out orthonormal
** to f32's last bit. cuSOLVER counts by columns and wants no more columns than rows, so operands
** are copied, transposed where needed. Both calls wait for the device: whether there is a result at
** all is known only then, so a graph cannot hold them.
*/
#include "linalg.cuh"

enum { THREADS = 256, KEPT_BYTES_MAX = 64 << 20 };

int32_t qm_linalg_solved(cusolverStatus_t code, const char *what) {
  if (code == CUSOLVER_STATUS_SUCCESS) return QM_OK;
  return qm_cuda_host->fail(code == CUSOLVER_STATUS_ALLOC_FAILED ? QM_E_MEMORY : QM_E_DEVICE,
                            "cuda: %s: cuSOLVER failed with code %d", what, (int)code);
}

/* ---- one decomposition's memory ---- */

int32_t qm_linalg_reserve(qm_cuda *cuda, qm_linalg *w, const int64_t (&counts)[4]) {
  int64_t size_bytes = 256;
  for (const int64_t count : counts) size_bytes += qm_ceil_div(count * 8, 256) * 256;
  w->owned = size_bytes > KEPT_BYTES_MAX;
  const int32_t status = w->owned
                             ? qm_cuda_check(cudaMalloc(&w->block, (size_t)size_bytes), "workspace")
                             : qm_cuda_scratch(cuda, size_bytes, &w->block);
  if (status != QM_OK) return status;
  char *next = (char *)w->block;
  w->found = (qm_linalg_report *)next;
  next += 256;
  for (int i = 0; i < 4; i++) {
    w->parts[i] = (double *)next;
    next += qm_ceil_div(counts[i] * 8, 256) * 256;
  }
  return QM_OK;
}

int32_t qm_linalg_begin(qm_cuda *cuda, const qm_array *a, const char *name,
                        cusolverDnHandle_t *out) {
  if (cuda->recording)
    return qm_cuda_host->fail(QM_E_UNSUPPORTED, "%s waits for the device: a graph cannot hold it",
                              name);
  if (a->count > INT32_MAX)
    return qm_cuda_host->fail(QM_E_UNSUPPORTED,
                              "argument 'a': cuSOLVER takes matrices of less than 2^31 elements");
  if (cuda->solver == NULL) {
    cusolverDnHandle_t handle;
    int32_t made = qm_linalg_solved(cusolverDnCreate(&handle), "opening cuSOLVER");
    if (made != QM_OK) return made;
    cuda->solver = handle;
    made = qm_linalg_solved(cusolverDnSetStream(handle, cuda->compute), "opening cuSOLVER");
    if (made != QM_OK) return made;
  }
  *out = (cusolverDnHandle_t)cuda->solver;
  return QM_OK;
}

void qm_cuda_linalg_close(qm_cuda *cuda) {
  if (cuda->solver != NULL) cusolverDnDestroy((cusolverDnHandle_t)cuda->solver);
  if (cuda->triangles != NULL) cublasDestroy((cublasHandle_t)cuda->triangles);
}

/* ---- copies ---- */

/* out [rows, columns] = x, which lies so too, or as [columns, rows]. */
template <typename From, typename To>
static __global__ void convert(const From *x, To *out, int64_t rows, int64_t columns,
                               bool transposed) {
  const int64_t stride = (int64_t)gridDim.x * THREADS, count = rows * columns;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride)
    out[i] = (To)x[transposed ? i % columns * rows + i / columns : i];
}

template <typename From, typename To>
static int32_t copy(qm_cuda *cuda, const From *x, To *out, int64_t rows, int64_t columns,
                    bool transposed) {
  convert<<<qm_blocks(cuda, rows * columns, THREADS), THREADS, 0, cuda->compute>>>(
      x, out, rows, columns, transposed);
  return qm_cuda_launched(cuda, "linalg");
}

static __global__ void find_not_finite(const float *x, qm_linalg_report *found, int64_t count) {
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride)
    if (!isfinite(x[i])) atomicMin(&found->at, (unsigned long long)i);
}
static __global__ void fetch(const float *x, qm_linalg_report *found, unsigned long long count) {
  if (found->at < count) found->value = x[found->at];
}

int32_t qm_linalg_check_finite(qm_cuda *cuda, const qm_array *a, qm_linalg_report *found) {
  const float *x = (const float *)a->data;
  int32_t status =
      qm_cuda_check(cudaMemsetAsync(found, 0xFF, sizeof *found, cuda->compute), "linalg");
  if (status != QM_OK) return status;
  find_not_finite<<<qm_blocks(cuda, a->count, THREADS), THREADS, 0, cuda->compute>>>(x, found,
                                                                                     a->count);
  fetch<<<1, 1, 0, cuda->compute>>>(x, found, (unsigned long long)a->count);
  status = qm_cuda_launched(cuda, "linalg");
  qm_linalg_report seen;
  if (status == QM_OK)
    status = qm_cuda_check(
        cudaMemcpyAsync(&seen, found, sizeof seen, cudaMemcpyDeviceToHost, cuda->compute),
        "linalg");
  if (status == QM_OK) status = qm_cuda_check(cudaStreamSynchronize(cuda->compute), "linalg");
  if (status != QM_OK || seen.at >= (unsigned long long)a->count) return status;
  return qm_cuda_host->fail(QM_E_ARGUMENT, "argument 'a': expected finite values, got %g at %lld",
                            (double)seen.value, (long long)seen.at);
}

int32_t qm_linalg_wait(qm_cuda *cuda, qm_linalg *w, int32_t status, int *info) {
  *info = 0;
  if (status == QM_OK)
    status = qm_cuda_check(
        cudaMemcpyAsync(info, &w->found->info, sizeof *info, cudaMemcpyDeviceToHost, cuda->compute),
        "linalg");
  if (status == QM_OK) status = qm_cuda_check(cudaStreamSynchronize(cuda->compute), "linalg");
  if (w->owned) cudaFree(w->block);
  if (status == QM_OK && *info < 0)
    return qm_cuda_host->fail(QM_E_DEVICE, "cuSOLVER refused an argument");
  return status;
}

static int32_t finish(qm_cuda *cuda, qm_linalg *w, int32_t status) {
  int info;
  status = qm_linalg_wait(cuda, w, status, &info);
  if (status == QM_OK && info > 0)
    return qm_cuda_host->fail(QM_E_DEVICE, "the decomposition did not converge");
  return status;
}

/* ---- decompositions ---- */

/* a tall matrix as it is, of a wide one the transpose: x = u s vt with x [rows, r] by column. */
static int32_t decompose(qm_cuda *cuda, cusolverDnHandle_t handle, const qm_svd_args *args,
                         qm_linalg *w) {
  const bool tall = args->m >= args->n;
  const int rows = (int)(tall ? args->m : args->n), r = (int)args->r;
  int count = 0;
  int32_t status = qm_linalg_solved(cusolverDnDgesvd_bufferSize(handle, rows, r, &count), "svd");
  const int64_t square = args->r * args->r;
  if (status == QM_OK)
    status = qm_linalg_reserve(cuda, w, {args->a.count, args->a.count, square + r, count});
  if (status == QM_OK) status = qm_linalg_check_finite(cuda, &args->a, w->found);
  double *x = w->parts[0], *u = w->parts[1], *vt = w->parts[2], *s = vt + square;
  if (status == QM_OK) status = copy(cuda, (const float *)args->a.data, x, r, rows, tall);
  if (status == QM_OK)
    status = qm_linalg_solved(cusolverDnDgesvd(handle, 'S', 'S', rows, r, x, rows, s, u, rows, vt,
                                               r, w->parts[3], count, NULL, &w->found->info),
                              "svd");
  if (status == QM_OK) status = copy(cuda, s, (float *)args->s.data, 1, r, false);
  /* By column, the transpose of a factor is that factor by row. */
  float *out_u = (float *)args->u.data, *out_vt = (float *)args->vt.data;
  if (status == QM_OK) status = copy(cuda, tall ? u : vt, out_u, args->m, r, tall);
  if (status == QM_OK) status = copy(cuda, tall ? vt : u, out_vt, r, args->n, tall);
  return status;
}

int32_t qm_cuda_svd(void *context, const qm_svd_args *args) {
  QM_CUDA_ENTER(context);
  cusolverDnHandle_t handle;
  if (args->a.count == 0) return QM_OK;
  const int32_t status = qm_linalg_begin(cuda, &args->a, "svd", &handle);
  if (status != QM_OK) return status;
  qm_linalg w = {};
  return finish(cuda, &w, decompose(cuda, handle, args, &w));
}

static int32_t orthonormalize(qm_cuda *cuda, cusolverDnHandle_t handle, const qm_qr_args *args,
                              qm_linalg *w) {
  const int m = (int)args->m, n = (int)args->n;
  int factor = 0, form = 0;
  int32_t status =
      qm_linalg_solved(cusolverDnDgeqrf_bufferSize(handle, m, n, NULL, m, &factor), "qr");
  if (status == QM_OK)
    status =
        qm_linalg_solved(cusolverDnDorgqr_bufferSize(handle, m, n, n, NULL, m, NULL, &form), "qr");
  const int count = factor > form ? factor : form;
  if (status == QM_OK) status = qm_linalg_reserve(cuda, w, {args->a.count, n, count, 0});
  if (status == QM_OK) status = qm_linalg_check_finite(cuda, &args->a, w->found);
  double *x = w->parts[0], *tau = w->parts[1], *space = w->parts[2];
  int *info = &w->found->info;
  if (status == QM_OK) status = copy(cuda, (const float *)args->a.data, x, n, m, true);
  if (status == QM_OK)
    status = qm_linalg_solved(cusolverDnDgeqrf(handle, m, n, x, m, tau, space, count, info), "qr");
  if (status == QM_OK)
    status =
        qm_linalg_solved(cusolverDnDorgqr(handle, m, n, n, x, m, tau, space, count, info), "qr");
  if (status == QM_OK) status = copy(cuda, x, (float *)args->q.data, m, n, true);
  return status;
}

int32_t qm_cuda_qr(void *context, const qm_qr_args *args) {
  QM_CUDA_ENTER(context);
  cusolverDnHandle_t handle;
  if (args->a.count == 0) return QM_OK;
  const int32_t status = qm_linalg_begin(cuda, &args->a, "qr", &handle);
  if (status != QM_OK) return status;
  qm_linalg w = {};
  return finish(cuda, &w, orthonormalize(cuda, handle, args, &w));
}
