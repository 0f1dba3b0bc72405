/* linalg.c - decompositions through LAPACK. Reference: kernels/reference/svd.c and qr.c.
**
** LAPACK counts by columns, so it sees the transpose of every row-major matrix. Both decompositions
** have a mirror image for that, and nothing is copied but the operand that LAPACK overwrites.
*/
#include <lapacke.h>
#include <stdlib.h>

#include "cpu.h"

/* Extents and positions in a LAPACK call are 32-bit numbers. */
static int32_t check(const qm_array *a) {
  if (a->count > INT32_MAX)
    return qm_reference_host->fail(
        QM_E_UNSUPPORTED, "argument 'a': LAPACK takes matrices of less than 2^31 elements");
  return qm_reference_check_finite("a", a);
}

static int32_t refuse(const char *function, lapack_int info) {
  if (info == LAPACK_WORK_MEMORY_ERROR || info == LAPACK_TRANSPOSE_MEMORY_ERROR)
    return qm_reference_host->fail(QM_E_MEMORY, "%s: the host is out of memory", function);
  if (info > 0)
    return qm_reference_host->fail(QM_E_DEVICE, "%s: the decomposition did not converge", function);
  return qm_reference_host->fail(QM_E_DEVICE, "%s: LAPACK failed with code %d", function,
                                 (int)info);
}

/* a = u s vt, so a^T = vt^T s u^T: what LAPACK calls u is our vt, by rows, and the other way
** round. */
int32_t qm_cpu_svd(void *context, const qm_svd_args *args) {
  (void)context;
  const int32_t status = check(&args->a);
  if (status != QM_OK || args->a.count == 0) return status;
  const lapack_int m = (lapack_int)args->m, n = (lapack_int)args->n, r = (lapack_int)args->r;
  const size_t size_bytes = (size_t)args->a.count * sizeof(float);
  float *a = malloc(size_bytes);
  if (a == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  memcpy(a, args->a.data, size_bytes);
  const lapack_int info = LAPACKE_sgesdd(LAPACK_COL_MAJOR, 'S', n, m, a, n, args->s.data,
                                         args->vt.data, n, args->u.data, r);
  free(a);
  return info == 0 ? QM_OK : refuse("sgesdd", info);
}

/* a = q r, so a^T = r^T q^T: an LQ decomposition, whose orthonormal factor lies as ours does. */
int32_t qm_cpu_qr(void *context, const qm_qr_args *args) {
  (void)context;
  const int32_t status = check(&args->a);
  if (status != QM_OK || args->a.count == 0) return status;
  const lapack_int m = (lapack_int)args->m, n = (lapack_int)args->n;
  float *tau = malloc((size_t)n * sizeof *tau);
  if (tau == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  memcpy(args->q.data, args->a.data, (size_t)args->a.count * sizeof(float));
  lapack_int info = LAPACKE_sgelqf(LAPACK_COL_MAJOR, n, m, args->q.data, n, tau);
  if (info == 0) info = LAPACKE_sorglq(LAPACK_COL_MAJOR, n, m, n, args->q.data, n, tau);
  free(tau);
  return info == 0 ? QM_OK : refuse("sgelqf", info);
}

/* What the reference calls the lower triangle of b is the upper one to LAPACK. */
int32_t qm_cpu_cholesky_inverse(void *context, const qm_cholesky_inverse_args *args) {
  (void)context;
  const int32_t status = check(&args->a);
  if (status != QM_OK || args->a.count == 0) return status;
  const int64_t count = args->a.count;
  const lapack_int n = (lapack_int)args->n;
  double *b = malloc((size_t)count * sizeof *b);
  if (b == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  for (int64_t i = 0; i < count; i++) b[count - 1 - i] = (double)((const float *)args->a.data)[i];
  const double damping = qm_reference_damped(args);
  for (int64_t i = 0; i < count; i += n + 1) b[i] += damping;
  lapack_int info = LAPACKE_dpotrf_work(LAPACK_COL_MAJOR, 'U', n, b, n);
  const int64_t row = info > 0 ? args->n - info : -1;
  if (info == 0) info = LAPACKE_dtrtri_work(LAPACK_COL_MAJOR, 'U', 'N', n, b, n);
  float *u = args->u.data;
  for (int64_t i = 0; info == 0 && i < args->n; i++)
    for (int64_t j = 0; j < args->n; j++)
      u[i * args->n + j] = j >= i ? (float)b[count - 1 - i * args->n - j] : 0.0f;
  free(b);
  if (row >= 0) return qm_reference_not_positive(row);
  return info == 0 ? QM_OK : refuse("dpotrf", info);
}
