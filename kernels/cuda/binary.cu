/* binary.cu - operations on two tensors, broadcasting. Reference: kernels/reference/elementwise.c,
** equal
** bit for bit. A thread does a pack along the last dimension, where each operand has stride 1 or
** 0. */
#include "dtype.h"
#include "pack.cuh"

enum { THREADS = 256 };

/* Dimensions after neighbours were joined; strides in elements. */
struct layout {
  int64_t shape[QM_DIMS_MAX], stride_a[QM_DIMS_MAX], stride_b[QM_DIMS_MAX];
  int64_t packs; /* to a row of the last dimension */
  int64_t rows;
};

static __device__ __forceinline__ float binary(int32_t op, float a, float b) {
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

template <int N, typename T>
static __device__ __forceinline__ void read_operand(const T *x, int64_t stride, bool whole,
                                                    int64_t left, float (&v)[N]) {
  if (stride != 0) return qm_read<N>(x, whole, left, v);
  v[0] = qm_float(x[0]);
#pragma unroll
  for (int i = 1; i < N; i++) v[i] = v[0];
}

/* Index is 32 bits wide where that is enough: divisions cost less. */
template <int N, typename T, typename Index>
static __global__ void __launch_bounds__(THREADS)
    same_types(const T *a, const T *b, T *out, layout at, bool packs, int32_t op) {
  const Index i = (Index)blockIdx.x * THREADS + threadIdx.x;
  const Index row = i / (Index)at.packs, column = (i - row * (Index)at.packs) * N;
  if (row >= (Index)at.rows) return;
  const int64_t left = at.shape[3] - (int64_t)column;
  int64_t at_a = (int64_t)column * at.stride_a[3], at_b = (int64_t)column * at.stride_b[3];
  Index rest = row;
#pragma unroll
  for (int dim = 2; dim >= 0; dim--) {
    if (at.shape[dim] == 1) continue;
    const Index next = rest / (Index)at.shape[dim];
    const int64_t index = (int64_t)(rest - next * (Index)at.shape[dim]);
    at_a += index * at.stride_a[dim];
    at_b += index * at.stride_b[dim];
    rest = next;
  }
  float x[N], y[N];
  const bool whole = packs && left >= N;
  read_operand<N>(a + at_a, at.stride_a[3], whole, left, x);
  read_operand<N>(b + at_b, at.stride_b[3], whole, left, y);
#pragma unroll
  for (int j = 0; j < N; j++) x[j] = binary(op, x[j], y[j]);
  qm_write<N>(out + ((int64_t)row * at.shape[3] + (int64_t)column), whole, left, x);
}

static __global__ void __launch_bounds__(THREADS)
    mixed_types(const qm_binary_args args, layout at, int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  int64_t rest = i, at_a = 0, at_b = 0;
  for (int dim = QM_DIMS_MAX - 1; dim >= 0; dim--) {
    at_a += rest % at.shape[dim] * at.stride_a[dim];
    at_b += rest % at.shape[dim] * at.stride_b[dim];
    rest /= at.shape[dim];
  }
  const float a = qm_load(args.a.data, args.a.dtype, at_a);
  const float b = qm_load(args.b.data, args.b.dtype, at_b);
  qm_store(args.out.data, args.out.dtype, i, binary(args.op, a, b));
}

/* Join dimensions that both operands step through as one, moving them to the right. */
static layout join(const qm_binary_args *args) {
  layout at = {{1, 1, 1, 1}, {0, 0, 0, 0}, {0, 0, 0, 0}, 0, 1};
  int to = QM_DIMS_MAX;
  for (int dim = QM_DIMS_MAX - 1; dim >= 0; dim--) {
    const int64_t extent = args->shape[dim], a = args->stride_a[dim], b = args->stride_b[dim];
    if (extent == 1) continue;
    if (to < QM_DIMS_MAX && a == at.stride_a[to] * at.shape[to] &&
        b == at.stride_b[to] * at.shape[to]) {
      at.shape[to] *= extent;
      continue;
    }
    to--;
    at.shape[to] = extent;
    at.stride_a[to] = a;
    at.stride_b[to] = b;
  }
  for (int dim = 0; dim < QM_DIMS_MAX - 1; dim++) at.rows *= at.shape[dim];
  return at;
}

template <int N, typename T>
static int32_t launch(qm_cuda *cuda, const qm_binary_args *args, layout at) {
  const T *a = (const T *)args->a.data, *b = (const T *)args->b.data;
  T *out = (T *)args->out.data;
  bool packs = qm_packs<N>(a) && qm_packs<N>(b) && qm_packs<N>(out);
  if (at.rows > 1) packs = packs && at.shape[3] % N == 0;
  for (int dim = 0; dim < QM_DIMS_MAX - 1; dim++) /* a broadcast value needs no alignment */
    packs = packs && (at.stride_a[dim] % N == 0 || at.stride_a[3] == 0) &&
            (at.stride_b[dim] % N == 0 || at.stride_b[3] == 0);
  at.packs = qm_ceil_div(at.shape[3], N);
  const int64_t threads = at.packs * at.rows, blocks = qm_ceil_div(threads, THREADS);
  if (blocks * THREADS * N <= INT32_MAX)
    same_types<N, T, uint32_t>
        <<<(unsigned)blocks, THREADS, 0, cuda->compute>>>(a, b, out, at, packs, args->op);
  else
    same_types<N, T, uint64_t>
        <<<(unsigned)blocks, THREADS, 0, cuda->compute>>>(a, b, out, at, packs, args->op);
  return qm_cuda_launched(cuda, "binary");
}

int32_t qm_cuda_binary(void *context, const qm_binary_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t count = args->out.count;
  if (count == 0) return QM_OK;
  const layout at = join(args);
  const int32_t dtype = args->out.dtype;
  if (args->a.dtype == dtype && args->b.dtype == dtype)
    return qm_with_float(dtype, [&](auto element) {
      using T = decltype(element);
      return at.shape[3] >= qm_width<T> ? launch<qm_width<T>, T>(cuda, args, at)
                                        : launch<1, T>(cuda, args, at);
    });
  mixed_types<<<(unsigned)qm_ceil_div(count, THREADS), THREADS, 0, cuda->compute>>>(*args, at,
                                                                                    count);
  return qm_cuda_launched(cuda, "binary");
}
