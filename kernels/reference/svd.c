/* svd.c - thin singular value decomposition by one-sided Jacobi rotations, in f64.
** Source: Hestenes, J. SIAM 6 (1958); rotations as in Golub and Van Loan, 4th edition, 8.6.3.
**
** Columns of w (a, or its transpose where a is wide) are turned pairwise until all are orthogonal:
** then w = u diag(s), and v has gathered the turns.
*/
#include <stdlib.h>

#include "reference.h"

enum { SWEEPS_MAX = 60 };

typedef struct work {
  int64_t rows, columns; /* rows >= columns */
  double *w, *v, *s;     /* by column: w [columns][rows], v [columns][columns], s [columns] */
} work;

static double dot(const double *x, const double *y, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; i++) sum += x[i] * y[i];
  return sum;
}

static void rotate(double *x, double *y, int64_t count, double c, double s) {
  for (int64_t i = 0; i < count; i++) {
    const double xi = x[i], yi = y[i];
    x[i] = c * xi - s * yi;
    y[i] = s * xi + c * yi;
  }
}

/* Turn columns p and q so that they are orthogonal; 0 when they were. */
static int orthogonalize(const work *k, int64_t p, int64_t q) {
  double *x = k->w + p * k->rows, *y = k->w + q * k->rows;
  const double xx = dot(x, x, k->rows), yy = dot(y, y, k->rows), xy = dot(x, y, k->rows);
  if (fabs(xy) <= 1e-14 * sqrt(xx) * sqrt(yy) || fabs(xy) < 1e-290) return 0;
  const double zeta = (yy - xx) / (2.0 * xy);
  const double t = copysign(1.0, zeta) / (fabs(zeta) + sqrt(1.0 + zeta * zeta));
  const double c = 1.0 / sqrt(1.0 + t * t);
  rotate(x, y, k->rows, c, c * t);
  rotate(k->v + p * k->columns, k->v + q * k->columns, k->columns, c, c * t);
  return 1;
}

static void swap_columns(double *x, double *y, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const double xi = x[i];
    x[i] = y[i];
    y[i] = xi;
  }
}

/* Descending singular values: selection sort, columns along. */
static void sort(const work *k) {
  for (int64_t p = 0; p < k->columns; p++) {
    int64_t best = p;
    for (int64_t q = p + 1; q < k->columns; q++) best = k->s[q] > k->s[best] ? q : best;
    if (best == p) continue;
    swap_columns(k->s + p, k->s + best, 1);
    swap_columns(k->w + p * k->rows, k->w + best * k->rows, k->rows);
    swap_columns(k->v + p * k->columns, k->v + best * k->columns, k->columns);
  }
}

/* Make column p a unit vector orthogonal to those before it: its own direction, or, where the
** matrix has no such rank, what is left of some axis. */
static void normalize(const work *k, int64_t p) {
  double *x = k->w + p * k->rows;
  const int ranked = k->s[p] > 1e-14 * k->s[0] && k->s[p] > 0.0;
  if (ranked) {
    for (int64_t i = 0; i < k->rows; i++) x[i] /= k->s[p];
    return;
  }
  for (int64_t axis = 0; axis < k->rows; axis++) {
    for (int64_t i = 0; i < k->rows; i++) x[i] = i == axis ? 1.0 : 0.0;
    for (int pass = 0; pass < 2; pass++)
      for (int64_t q = 0; q < p; q++) {
        const double *y = k->w + q * k->rows, along = dot(x, y, k->rows);
        for (int64_t i = 0; i < k->rows; i++) x[i] -= along * y[i];
      }
    const double length = sqrt(dot(x, x, k->rows));
    if (length * length * (double)k->rows < 0.5) continue; /* some axis keeps 1 / rows or more */
    for (int64_t i = 0; i < k->rows; i++) x[i] /= length;
    return;
  }
}

/* Sweep over all pairs until nothing turns. */
static int converge(const work *k) {
  for (int sweep = 0; sweep < SWEEPS_MAX; sweep++) {
    int turned = 0;
    for (int64_t p = 0; p < k->columns; p++)
      for (int64_t q = p + 1; q < k->columns; q++) turned |= orthogonalize(k, p, q);
    if (!turned) return 1;
  }
  return 0;
}

static void write_out(const qm_svd_args *args, const work *k, int wide) {
  float *u = args->u.data, *vt = args->vt.data;
  const double *left = wide ? k->v : k->w, *right = wide ? k->w : k->v;
  for (int64_t p = 0; p < args->r; p++) {
    ((float *)args->s.data)[p] = (float)k->s[p];
    for (int64_t i = 0; i < args->m; i++) u[i * args->r + p] = (float)left[p * args->m + i];
    for (int64_t j = 0; j < args->n; j++) vt[p * args->n + j] = (float)right[p * args->n + j];
  }
}

int32_t qm_reference_svd(void *context, const qm_svd_args *args) {
  (void)context;
  const int32_t status = qm_reference_check_finite("a", &args->a);
  if (status != QM_OK || args->a.count == 0) return status;
  const int wide = args->m < args->n;
  work k = {.rows = wide ? args->n : args->m, .columns = args->r};
  k.w = calloc((size_t)(args->a.count + k.columns * k.columns + k.columns), sizeof *k.w);
  if (k.w == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  k.v = k.w + args->a.count;
  k.s = k.v + k.columns * k.columns;
  for (int64_t p = 0; p < k.columns; p++) {
    k.v[p * k.columns + p] = 1.0;
    for (int64_t i = 0; i < k.rows; i++)
      k.w[p * k.rows + i] =
          (double)((const float *)args->a.data)[wide ? p * args->n + i : i * args->n + p];
  }
  const int converged = converge(&k);
  for (int64_t p = 0; p < k.columns; p++)
    k.s[p] = sqrt(dot(k.w + p * k.rows, k.w + p * k.rows, k.rows));
  sort(&k);
  for (int64_t p = 0; p < k.columns; p++) normalize(&k, p);
  write_out(args, &k, wide);
  free(k.w);
  return converged ? QM_OK
                   : qm_reference_host->fail(QM_E_DEVICE, "the decomposition did not converge");
}
