/* binary.cu - operations on two tensors, broadcasting. Reference: kernels/reference/elementwise.c,
** equal bit for bit. A thread does a pack along the last dimension, where each operand has stride 1
** or 0. */
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

/* Rows are counted in 32 bits: divisions cost less. */
template <int N, typename A, typename B, typename Out>
static __global__ void __launch_bounds__(THREADS)
    in_packs(const A *a, const B *b, Out *out, layout at, bool packs, int32_t op) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  int64_t column = i * N, at_a = 0, at_b = 0, to = column;
  if (at.rows > 1) {
    uint32_t rest = (uint32_t)i / (uint32_t)at.packs;
    if (rest >= (uint32_t)at.rows) return;
    column = (i - (int64_t)rest * at.packs) * N;
    to = (int64_t)rest * at.shape[3] + column;
#pragma unroll
    for (int dim = 2; dim >= 0; dim--) {
      if (at.shape[dim] == 1) continue;
      const uint32_t next = rest / (uint32_t)at.shape[dim];
      const int64_t index = (int64_t)(rest - next * (uint32_t)at.shape[dim]);
      at_a += index * at.stride_a[dim];
      at_b += index * at.stride_b[dim];
      rest = next;
    }
  }
  const int64_t left = at.shape[3] - column;
  if (left <= 0) return;
  float x[N], y[N];
  const bool whole = packs && left >= N;
  read_operand<N>(a + (at_a + column * at.stride_a[3]), at.stride_a[3], whole, left, x);
  read_operand<N>(b + (at_b + column * at.stride_b[3]), at.stride_b[3], whole, left, y);
#pragma unroll
  for (int j = 0; j < N; j++) x[j] = binary(op, x[j], y[j]);
  qm_write<N>(out + to, whole, left, x);
}

static __global__ void __launch_bounds__(THREADS)
    one_by_one(const qm_binary_args args, layout at, int64_t count) {
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

static int32_t launch_each(qm_cuda *cuda, const qm_binary_args *args, const layout &at) {
  const int64_t count = args->out.count;
  one_by_one<<<(unsigned)qm_ceil_div(count, THREADS), THREADS, 0, cuda->compute>>>(*args, at,
                                                                                   count);
  return qm_cuda_launched(cuda, "binary");
}

template <typename A, typename B, typename Out>
static int32_t launch(qm_cuda *cuda, const qm_binary_args *args, layout at) {
  constexpr int N = sizeof(A) == 2 && sizeof(B) == 2 && sizeof(Out) == 2 ? 8 : 4;
  const A *a = (const A *)args->a.data;
  const B *b = (const B *)args->b.data;
  Out *out = (Out *)args->out.data;
  at.packs = qm_ceil_div(at.shape[3], N);
  const int64_t blocks = qm_ceil_div(at.packs * at.rows, THREADS);
  if (at.shape[3] < N || (at.rows > 1 && blocks * THREADS > INT32_MAX))
    return launch_each(cuda, args, at);
  /* A value that is stretched along the last dimension needs no alignment. */
  const bool a_moves = at.stride_a[3] != 0, b_moves = at.stride_b[3] != 0;
  bool packs = qm_packs<N>(out) && (!a_moves || qm_packs<N>(a)) && (!b_moves || qm_packs<N>(b)) &&
               (at.rows == 1 || at.shape[3] % N == 0);
  for (int dim = 0; dim < QM_DIMS_MAX - 1; dim++)
    packs =
        packs && (!a_moves || at.stride_a[dim] % N == 0) && (!b_moves || at.stride_b[dim] % N == 0);
  in_packs<N><<<(unsigned)blocks, THREADS, 0, cuda->compute>>>(a, b, out, at, packs, args->op);
  return qm_cuda_launched(cuda, "binary");
}

int32_t qm_cuda_binary(void *context, const qm_binary_args *args) {
  QM_CUDA_ENTER(context);
  if (args->out.count == 0) return QM_OK;
  const layout at = join(args);
  const int32_t a = args->a.dtype, b = args->b.dtype, out = args->out.dtype;
  const int32_t half = a != QM_F32 ? a : b != QM_F32 ? b : out;
  return qm_with_float(half, [&](auto element) {
    using T = decltype(element);
    const auto fits = [&](bool float_a, bool float_b, bool float_out) {
      return a == (float_a ? QM_F32 : half) && b == (float_b ? QM_F32 : half) &&
             out == (float_out ? QM_F32 : half);
    };
    if (fits(0, 0, 0)) return launch<T, T, T>(cuda, args, at);
    if (fits(0, 1, 0)) return launch<T, float, T>(cuda, args, at);
    if (fits(0, 1, 1)) return launch<T, float, float>(cuda, args, at);
    if (fits(1, 0, 1)) return launch<float, T, float>(cuda, args, at);
    return launch_each(cuda, args, at);
  });
}
