/* elementwise.c - unary and binary operations and accumulation, one element at a time.
** Source of GELU: Hendrycks and Gimpel, arXiv 1606.08415. */
#include "reference.h"

double qm_reference_gelu(double x, int tanh_form) {
  const double inner = 0.7978845608028654 * (x + 0.044715 * x * x * x); /* sqrt(2 / pi) */
  return 0.5 * x * (1.0 + (tanh_form ? tanh(inner) : erf(x * 0.7071067811865476)));
}

double qm_reference_gelu_grad(double x, int tanh_form) {
  if (!tanh_form) /* Phi(x) + x phi(x) */
    return 0.5 * (1.0 + erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * exp(-0.5 * x * x);
  const double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
  const double slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x);
  return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope;
}

static double silu_grad(double x) {
  const double sigmoid = 1.0 / (1.0 + exp(-x));
  return sigmoid * (1.0 + x * (1.0 - sigmoid));
}

static float unary(const qm_unary_args *args, float x) {
  switch (args->op) {
    case QM_NEG: return -x;
    case QM_ABS: return fabsf(x);
    case QM_EXP: return expf(x);
    case QM_LOG: return logf(x);
    case QM_SQRT: return sqrtf(x);
    case QM_RSQRT: return 1.0f / sqrtf(x);
    case QM_TANH: return tanhf(x);
    case QM_SIGMOID: return 1.0f / (1.0f + expf(-x));
    case QM_SILU: return x / (1.0f + expf(-x));
    case QM_GELU: return (float)qm_reference_gelu((double)x, args->p0 != 0.0);
    case QM_RELU: return x < 0.0f ? 0.0f : x;
    case QM_SQUARE: return x * x;
    case QM_POW: return powf(x, (float)args->p0);
    case QM_CLAMP:
      return x < (float)args->p0 ? (float)args->p0 : x > (float)args->p1 ? (float)args->p1 : x;
    case QM_AFFINE: return (float)args->p0 * x + (float)args->p1;
    case QM_SIGN: return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x;
    case QM_FLOOR: return floorf(x);
    case QM_ROUND: return rintf(x);
    case QM_SIN: return sinf(x);
    case QM_COS: return cosf(x);
    case QM_RECIPROCAL: return 1.0f / x;
    case QM_GELU_GRAD: return (float)qm_reference_gelu_grad((double)x, args->p0 != 0.0);
    default: return (float)silu_grad((double)x);
  }
}

int32_t qm_reference_unary(void *context, const qm_unary_args *args) {
  (void)context;
  const int32_t dtype = args->x.dtype;
  for (int64_t i = 0; i < args->x.count; i++)
    qm_store(args->out.data, dtype, i, unary(args, qm_load(args->x.data, dtype, i)));
  return QM_OK;
}

static double derivative(const qm_unary_backward_args *args, double x) {
  const double sigmoid = 1.0 / (1.0 + exp(-x));
  switch (args->op) {
    case QM_NEG: return -1.0;
    case QM_ABS: return x > 0.0 ? 1.0 : x < 0.0 ? -1.0 : x;
    case QM_EXP: return exp(x);
    case QM_LOG: return 1.0 / x;
    case QM_SQRT: return 0.5 / sqrt(x);
    case QM_RSQRT: return -0.5 / (x * sqrt(x));
    case QM_TANH: return 1.0 - tanh(x) * tanh(x);
    case QM_SIGMOID: return sigmoid * (1.0 - sigmoid);
    case QM_SILU: return silu_grad(x);
    case QM_GELU: return qm_reference_gelu_grad(x, args->p0 != 0.0);
    case QM_RELU: return x > 0.0 ? 1.0 : x != x ? x : 0.0;
    case QM_SQUARE: return 2.0 * x;
    case QM_POW: return args->p0 == 0.0 ? 0.0 : args->p0 * pow(x, args->p0 - 1.0);
    case QM_CLAMP: return x >= (double)(float)args->p0 && x <= (double)(float)args->p1 ? 1.0 : 0.0;
    case QM_AFFINE: return args->p0;
    case QM_SIN: return cos(x);
    case QM_COS: return -sin(x);
    case QM_RECIPROCAL: return -1.0 / (x * x);
    default: return 0.0;
  }
}

int32_t qm_reference_unary_backward(void *context, const qm_unary_backward_args *args) {
  (void)context;
  const int32_t dtype = args->x.dtype;
  for (int64_t i = 0; i < args->x.count; i++) {
    const double slope = derivative(args, (double)qm_load(args->x.data, dtype, i));
    qm_store(args->dx.data, dtype, i, (float)((double)qm_load(args->dout.data, dtype, i) * slope));
  }
  return QM_OK;
}

static float binary(int32_t op, float a, float b) {
  switch (op) {
    case QM_ADD: return a + b;
    case QM_SUB: return a - b;
    case QM_MUL: return a * b;
    case QM_DIV: return a / b;
    case QM_MAXIMUM: return a > b || a != a ? a : b;
    case QM_MINIMUM: return a < b || a != a ? a : b;
    case QM_EQ: return a == b ? 1.0f : 0.0f;
    case QM_LT: return a < b ? 1.0f : 0.0f;
    default: return a <= b ? 1.0f : 0.0f;
  }
}

int32_t qm_reference_binary(void *context, const qm_binary_args *args) {
  (void)context;
  const int64_t *shape = args->shape, *sa = args->stride_a, *sb = args->stride_b;
  for (int64_t i = 0; i < args->out.count; i++) {
    int64_t rest = i, at_a = 0, at_b = 0;
    for (int32_t dim = QM_DIMS_MAX - 1; dim >= 0; dim--) {
      at_a += rest % shape[dim] * sa[dim];
      at_b += rest % shape[dim] * sb[dim];
      rest /= shape[dim];
    }
    const float a = qm_load(args->a.data, args->a.dtype, at_a);
    const float b = qm_load(args->b.data, args->b.dtype, at_b);
    qm_store(args->out.data, args->out.dtype, i, binary(args->op, a, b));
  }
  return QM_OK;
}

/* beta = 0 overwrites: what out held, NaN even, is forgotten. */
int32_t qm_reference_accumulate(void *context, const qm_accumulate_args *args) {
  (void)context;
  const float alpha = (float)args->alpha, beta = (float)args->beta;
  for (int64_t i = 0; i < args->out.count; i++) {
    float sum = alpha * qm_load(args->x.data, args->x.dtype, i);
    if (beta != 0.0f) sum += beta * qm_load(args->out.data, args->out.dtype, i);
    qm_store(args->out.data, args->out.dtype, i, sum);
  }
  return QM_OK;
}
