/* qr.c - the orthonormal factor of the thin QR decomposition, by Householder reflections.
** Source: Golub and Van Loan, Matrix Computations, 4th edition, algorithms 5.2.1 and 5.1.6.
**
** Signs as LAPACK has them: a reflection takes its column to the far side of the origin, and a
** column that needs none is left alone. The factor is orthonormal whatever the rank of a.
*/
#include <stdlib.h>

#include "reference.h"

int32_t qm_reference_check_finite(const char *name, const qm_array *x) {
  const float *values = x->data;
  for (int64_t i = 0; i < x->count; i++)
    if (!isfinite(values[i]))
      return qm_reference_host->fail(QM_E_ARGUMENT,
                                     "argument '%s': expected finite values, got %g at %lld", name,
                                     (double)values[i], (long long)i);
  return QM_OK;
}

/* Apply I - tau v v^T to column `column` of w; v is column `pivot` from row `pivot` on, its first
** element a 1 that is not stored. */
static void reflect(double *w, int64_t m, int64_t n, int64_t pivot, double tau, const double *v,
                    int64_t column) {
  double sum = w[pivot * n + column];
  for (int64_t i = pivot + 1; i < m; i++) sum += v[i * n + pivot] * w[i * n + column];
  w[pivot * n + column] -= tau * sum;
  for (int64_t i = pivot + 1; i < m; i++) w[i * n + column] -= tau * sum * v[i * n + pivot];
}

/* Turn column j of w, from row j on, into the vector of its reflection; gives tau. */
static double make_reflection(double *w, int64_t m, int64_t n, int64_t j) {
  double below = 0.0;
  for (int64_t i = j + 1; i < m; i++) below += w[i * n + j] * w[i * n + j];
  if (below == 0.0) return 0.0;
  const double alpha = w[j * n + j], beta = -copysign(sqrt(alpha * alpha + below), alpha);
  for (int64_t i = j + 1; i < m; i++) w[i * n + j] /= alpha - beta;
  return (beta - alpha) / beta;
}

int32_t qm_reference_qr(void *context, const qm_qr_args *args) {
  (void)context;
  const int64_t m = args->m, n = args->n, count = args->a.count;
  const int32_t status = qm_reference_check_finite("a", &args->a);
  if (status != QM_OK || count == 0) return status;
  double *w = malloc((size_t)(2 * count + n) * sizeof *w);
  if (w == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  double *q = w + count, *tau = q + count;
  for (int64_t i = 0; i < count; i++) w[i] = (double)((const float *)args->a.data)[i];
  for (int64_t j = 0; j < n; j++) {
    tau[j] = make_reflection(w, m, n, j);
    for (int64_t column = j + 1; column < n; column++) reflect(w, m, n, j, tau[j], w, column);
  }
  for (int64_t i = 0; i < count; i++) q[i] = i / n == i % n ? 1.0 : 0.0;
  for (int64_t j = n - 1; j >= 0; j--)
    for (int64_t column = 0; column < n; column++) reflect(q, m, n, j, tau[j], w, column);
  for (int64_t i = 0; i < count; i++) ((float *)args->q.data)[i] = (float)q[i];
  free(w);
  return QM_OK;
}
