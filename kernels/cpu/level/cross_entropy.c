/* cross_entropy.c - softmax, negative log-likelihood and their gradient, a row per thread.
**
** Reference: kernels/reference/cross_entropy.c, within the rounding of exp and of f32 sums.
** Cost:      two passes over a row; the second, for the gradient, finds it in the second-level
**            cache (128k columns of bf16 are 256 KiB). Two exps an element cost less than storing
**            one.
*/
#include "vector.h"

/* exp(x) for x <= 0, to 2 ulp plus the rounding of x / ln 2; 0 below -87. Two thirds of the work
** of qm_expf. exp(x) = 2^n 2^f, |f| <= 1/2, and 2^f is the polynomial of degree 5 with the least
** relative error, 7.5e-8 (Remez). */
static inline float exp_below(float x) {
  const float scaled = x * 1.44269504088896341f;
  const float t = scaled < -126.0f ? -126.0f : scaled; /* NaN stays */
  const float n = __builtin_rintf(t), f = t - n;
  float p = 0.00132764724f;
  p = QM_FMA(p, f, 0.00967554096f);
  p = QM_FMA(p, f, 0.0555071309f);
  p = QM_FMA(p, f, 0.240221202f);
  p = QM_FMA(p, f, 0.693146944f);
  p = QM_FMA(p, f, 1.0f);
  const float power = qm_bits_float((uint32_t)((int32_t)n + 127) << 23);
  return scaled < -126.0f ? 0.0f : p * power;
}

typedef struct statistics {
  float most; /* the row's largest logit, -inf for a row of those */
  double sum; /* of exp(x - most) */
} statistics;

/* In one pass: what was summed so far shrinks whenever a larger logit turns up. */
static statistics row_statistics(const void *logits, int32_t dtype, int64_t row, int64_t columns) {
  statistics s = {.most = -INFINITY};
  float x[QM_BLOCK];
  for (int64_t i = 0; i < columns; i += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, columns - i);
    qm_expand(x, logits, dtype, row + i, n);
    const float here = qm_largest(x, n), most = here > s.most ? here : s.most;
    /* While all are -inf, their distance from 0 stands for that from the largest: exp is 0. */
    const float shift = most == -INFINITY ? 0.0f : most;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += exp_below(x[j] - shift);
    s.sum = s.sum * (double)qm_expf(s.most - shift) + (double)sum;
    s.most = most;
  }
  return s;
}

/* dlogits = scale * (softmax - onehot); may overwrite the logits. */
static void row_gradient(const qm_cross_entropy_args *args, int64_t row, int64_t target,
                         statistics s) {
  const double whole = qm_reference_loss_scale(args);
  const float scale = (float)whole, factor = (float)(whole / s.sum), most = s.most;
  float x[QM_BLOCK];
  for (int64_t i = 0; i < args->columns; i += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, args->columns - i);
    qm_expand(x, args->logits.data, args->logits.dtype, row + i, n);
    for (int64_t j = 0; j < n; j++) x[j] = factor * exp_below(x[j] - most);
    if (target >= i && target < i + n) x[target - i] -= scale;
    qm_narrow(x, args->dlogits.data, args->logits.dtype, row + i, n);
  }
}

int32_t QM_CPU(cross_entropy)(void *context, const qm_cross_entropy_args *args) {
  (void)context;
  const int32_t status = qm_reference_check_targets(args);
  if (status != QM_OK) return status;
  const int32_t *targets = args->targets.data, dtype = args->logits.dtype;
  const int64_t columns = args->columns;
  const size_t row_bytes = (size_t)columns * (dtype == QM_F32 ? 4 : 2);
#pragma omp parallel for schedule(static) if (args->logits.count > 4096)
  for (int64_t i = 0; i < args->rows; i++) {
    const int64_t row = i * columns;
    float *loss = (float *)args->loss.data + i;
    if (targets[i] == args->ignore_index) {
      *loss = 0.0f;
      if (args->dlogits.data != NULL)
        memset((char *)args->dlogits.data + (size_t)i * row_bytes, 0, row_bytes);
      continue;
    }
    const statistics s = row_statistics(args->logits.data, dtype, row, columns);
    const double logit = (double)qm_load(args->logits.data, dtype, row + targets[i]);
    *loss = (float)(log(s.sum) + (double)s.most - logit);
    if (args->dlogits.data != NULL) row_gradient(args, row, targets[i], s);
  }
  return QM_OK;
}
