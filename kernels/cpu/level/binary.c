/* binary.c - two operands with broadcasting, and accumulation. References: elementwise.c there;
** binary equal to the bit, accumulate within one rounding. Memory bound.
**
** Dimensions that both operands walk alike are merged first, so that most calls are a few long
** rows; along a row an operand is contiguous or one repeated value. */
#include "vector.h"

typedef struct walk {
  int64_t shape[QM_DIMS_MAX], stride_a[QM_DIMS_MAX], stride_b[QM_DIMS_MAX];
  int32_t ndim;
} walk;

/* Dimensions from the last to the first, each merged with the one behind it where both operands
** step over it as if they were one. Dimension 0 of the result is the innermost. */
static walk merge(const qm_binary_args *args) {
  walk w = {.ndim = 0};
  for (int32_t dim = QM_DIMS_MAX - 1; dim >= 0; dim--) {
    const int64_t extent = args->shape[dim], a = args->stride_a[dim], b = args->stride_b[dim];
    if (extent == 1) continue;
    const int32_t last = w.ndim - 1;
    if (last >= 0 && a == w.stride_a[last] * w.shape[last] &&
        b == w.stride_b[last] * w.shape[last]) {
      w.shape[last] *= extent;
    } else {
      w.shape[w.ndim] = extent;
      w.stride_a[w.ndim] = a;
      w.stride_b[w.ndim++] = b;
    }
  }
  if (w.ndim == 0) w = (walk){.ndim = 1, .shape = {1}};
  return w;
}

/* n elements of a row from element i on; a stride of 0 repeats one. */
static const float *row(const qm_array *x, int64_t i, int64_t stride, int64_t n, float *buffer) {
  if (stride != 0) return qm_floats(x, i, n, buffer);
  const float value = qm_load(x->data, x->dtype, i);
  for (int64_t j = 0; j < n; j++) buffer[j] = value;
  return buffer;
}

#define EACH(expression)                                                                           \
  do {                                                                                             \
    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                          \
      const float x = a[j], y = b[j];                                                              \
      out[j] = (expression);                                                                       \
    }                                                                                              \
  } while (0)

static void combine(int32_t op, const float *a, const float *b, float *out, int64_t n) {
  switch (op) {
    case QM_ADD: EACH(x + y); break;
    case QM_SUB: EACH(x - y); break;
    case QM_MUL: EACH(x * y); break;
    case QM_DIV: EACH(x / y); break;
    case QM_MAXIMUM: EACH(((x > y) | (x != x)) ? x : y); break;
    case QM_MINIMUM: EACH(((x < y) | (x != x)) ? x : y); break;
    case QM_EQ: EACH(x == y ? 1.0f : 0.0f); break;
    case QM_LT: EACH(x < y ? 1.0f : 0.0f); break;
    default: EACH(x <= y ? 1.0f : 0.0f);
  }
}

int32_t QM_CPU(binary)(void *context, const qm_binary_args *args) {
  (void)context;
  const int64_t count = args->out.count;
  if (count == 0) return QM_OK;
  const walk w = merge(args);
  const int64_t length = w.shape[0], blocks = (length + QM_BLOCK - 1) / QM_BLOCK;
#pragma omp parallel for schedule(static) if (count >= QM_PARALLEL_MIN)
  for (int64_t task = 0; task < count / length * blocks; task++) {
    float a[QM_BLOCK], b[QM_BLOCK], result[QM_BLOCK];
    const int64_t from = task % blocks * QM_BLOCK, n = QM_MIN(QM_BLOCK, length - from);
    const int64_t at = task / blocks * length + from;
    int64_t rest = task / blocks, at_a = from * w.stride_a[0], at_b = from * w.stride_b[0];
    for (int32_t dim = 1; dim < w.ndim; dim++) {
      at_a += rest % w.shape[dim] * w.stride_a[dim];
      at_b += rest % w.shape[dim] * w.stride_b[dim];
      rest /= w.shape[dim];
    }
    combine(args->op, row(&args->a, at_a, w.stride_a[0], n, a),
            row(&args->b, at_b, w.stride_b[0], n, b), qm_target(&args->out, at, result), n);
    qm_stored(&args->out, at, n, result);
  }
  return QM_OK;
}

int32_t QM_CPU(accumulate)(void *context, const qm_accumulate_args *args) {
  (void)context;
  const float alpha = (float)args->alpha, beta = (float)args->beta;
  const int64_t count = args->out.count;
#pragma omp parallel for schedule(static) if (count >= QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    float x_block[QM_BLOCK], old_block[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    const float *x = qm_floats(&args->x, i, n, x_block);
    float *out = qm_target(&args->out, i, x_block);
    if (beta == 0.0f) {
#pragma omp simd
      for (int64_t j = 0; j < n; j++) out[j] = alpha * x[j];
    } else {
      const float *old = qm_floats(&args->out, i, n, old_block);
#pragma omp simd
      for (int64_t j = 0; j < n; j++) out[j] = QM_FMA(beta, old[j], alpha * x[j]);
    }
    qm_stored(&args->out, i, n, out);
  }
  return QM_OK;
}
