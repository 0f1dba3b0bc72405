/* cholesky_inverse.c - the upper Cholesky factor of a symmetric matrix's inverse, in f64.
** Source: GPTQ, arXiv 2210.17323, which wants the inverse Hessian in this form.
**
** With b, a read from its last row and column to the first, and b = l l^T: a = r r^T for r, l read
** the same way, which is upper triangular. So inverse(a) = u^T u for u = inverse(r): one
** factorization and one triangular inverse, and the inverse of a itself is never formed.
*/
#include <stdlib.h>

#include "reference.h"

double qm_reference_damped(const qm_cholesky_inverse_args *args) {
  const float *a = args->a.data;
  double trace = 0.0;
  for (int64_t i = 0; i < args->n; i++) trace += (double)a[i * args->n + i];
  return args->damping * trace / (double)args->n;
}

int32_t qm_reference_not_positive(int64_t row) {
  return qm_reference_host->fail(
      QM_E_ARGUMENT,
      "argument 'a': expected a positive definite matrix; it is not from row %lld on",
      (long long)row);
}

/* b = l l^T, l over b's lower half; the row that has no positive pivot, or -1. */
static int64_t factor(double *b, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j <= i; j++) {
      double sum = b[i * n + j];
      for (int64_t k = 0; k < j; k++) sum -= b[i * n + k] * b[j * n + k];
      if (i == j && !(sum > 0.0)) return i;
      b[i * n + j] = i == j ? sqrt(sum) : sum / b[j * n + j];
    }
  return -1;
}

/* The inverse of the lower triangle, in its place. */
static void invert(double *l, int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    l[j * n + j] = 1.0 / l[j * n + j];
    for (int64_t i = j + 1; i < n; i++) {
      double sum = 0.0;
      for (int64_t k = j; k < i; k++) sum -= l[i * n + k] * l[k * n + j];
      l[i * n + j] = sum / l[i * n + i]; /* row i's diagonal is inverted later */
    }
  }
}

int32_t qm_reference_cholesky_inverse(void *context, const qm_cholesky_inverse_args *args) {
  (void)context;
  const int64_t n = args->n, count = args->a.count;
  int32_t status = qm_reference_check_finite("a", &args->a);
  if (status != QM_OK || count == 0) return status;
  double *b = malloc((size_t)count * sizeof *b);
  if (b == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  const double damping = qm_reference_damped(args);
  for (int64_t i = 0; i < count; i++)
    b[count - 1 - i] = (double)((const float *)args->a.data)[i] + (i / n == i % n ? damping : 0.0);
  const int64_t row = factor(b, n);
  if (row >= 0) {
    status = qm_reference_not_positive(n - 1 - row);
  } else {
    invert(b, n);
    for (int64_t i = 0; i < count; i++)
      ((float *)args->u.data)[i] = i % n >= i / n ? (float)b[count - 1 - i] : 0.0f;
  }
  free(b);
  return status;
}
