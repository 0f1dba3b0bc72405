/* norm.cu - rows normalised: RMSNorm (arXiv 1910.07467), LayerNorm (arXiv 1607.06450), forward.
** A block takes one row at a time, all of it in registers, and keeps the weights there from row to
** row. Memory bound: x (and the residual) read once, out (and the sum) written once. */
#include "norm.cuh"

enum { THREADS_WANTED = 256, BLOCKS_PER_MULTIPROCESSOR = 8 };

/* The row's mean and 1 / sqrt(variance + eps), or the root mean square's where not CENTER. */
template <bool CENTER, int PACKS, int WIDTH>
static __device__ __forceinline__ float2 statistics(const float (&x)[PACKS][WIDTH], int packs,
                                                    float columns, float eps,
                                                    float (*partial)[32]) {
  const int first = threadIdx.x, step = blockDim.x;
  float mean = 0.0f;
  if (CENTER) {
    float sum[1] = {0.0f};
#pragma unroll
    for (int p = 0; p < PACKS; p++)
      for (int i = 0; i < WIDTH; i++) sum[0] += x[p][i];
    qm_block_sums(sum, partial);
    mean = sum[0] / columns;
  }
  float squares[1] = {0.0f};
#pragma unroll
  for (int p = 0; p < PACKS; p++)
    if (first + p * step < packs)
      for (int i = 0; i < WIDTH; i++) squares[0] = fmaf(x[p][i] - mean, x[p][i] - mean, squares[0]);
  qm_block_sums(squares, partial + 1);
  return {mean, 1.0f / sqrtf(squares[0] / columns + eps)};
}

template <bool CENTER, typename T, int WIDTH, int PACKS>
static __global__ void __launch_bounds__(QM_NORM_THREADS_MAX) norm(qm_cuda_norm args, int packs) {
  using pack = qm_pack<T, WIDTH>;
  __shared__ float partial[2][2][32];
  const int first = threadIdx.x, step = blockDim.x;
  float weight[PACKS][WIDTH], bias[PACKS][WIDTH];
#pragma unroll
  for (int p = 0; p < PACKS; p++)
    for (int i = 0; i < WIDTH && first + p * step < packs; i++) {
      const int64_t c = (int64_t)(first + p * step) * WIDTH + i;
      weight[p][i] = qm_any_float(args.weight, args.weight_dtype, c);
      if (CENTER)
        bias[p][i] = args.bias == NULL ? 0.0f : qm_any_float(args.bias, args.weight_dtype, c);
    }
  int turn = 0;
  for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x, turn ^= 1) {
    const int64_t row = r * packs;
    float x[PACKS][WIDTH];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int at = first + p * step;
      if (at >= packs) {
        for (int i = 0; i < WIDTH; i++) x[p][i] = 0.0f;
        continue;
      }
      pack in = ((const pack *)args.x)[row + at];
      if (args.sum != NULL) {
        const pack other = ((const pack *)args.residual)[row + at];
        for (int i = 0; i < WIDTH; i++)
          in.at[i] = qm_as<T>(qm_float(in.at[i]) + qm_float(other.at[i]));
        ((pack *)args.sum)[row + at] = in;
      }
      for (int i = 0; i < WIDTH; i++) x[p][i] = qm_float(in.at[i]);
    }
    const float2 at_row =
        statistics<CENTER>(x, packs, (float)args.columns, args.eps, partial[turn]);
    if (first == 0) {
      args.rstd[r] = at_row.y;
      if (CENTER) args.mean[r] = at_row.x;
    }
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      if (first + p * step >= packs) continue;
      pack out;
      for (int i = 0; i < WIDTH; i++) {
        const float y = (CENTER ? x[p][i] - at_row.x : x[p][i]) * at_row.y;
        out.at[i] = qm_as<T>(CENTER ? fmaf(y, weight[p][i], bias[p][i]) : y * weight[p][i]);
      }
      ((pack *)args.out)[row + first + p * step] = out;
    }
  }
}

/* Rows of any length and alignment, an element at a time. */
template <bool CENTER, typename T>
static __global__ void norm_any(qm_cuda_norm args) {
  __shared__ float partial[2][1][32];
  const T *sum = (const T *)(args.sum != NULL ? args.sum : args.x);
  const float columns = (float)args.columns;
  for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
    const int64_t row = r * args.columns;
    float mean = 0.0f, total[1] = {0.0f}, squares[1] = {0.0f};
    for (int64_t c = threadIdx.x; c < args.columns; c += blockDim.x) {
      if (args.sum != NULL)
        ((T *)args.sum)[row + c] = qm_as<T>(qm_float(((const T *)args.x)[row + c]) +
                                            qm_float(((const T *)args.residual)[row + c]));
      total[0] += qm_float(sum[row + c]);
    }
    qm_block_sums(total, partial[0]);
    if (CENTER) mean = total[0] / columns;
    for (int64_t c = threadIdx.x; c < args.columns; c += blockDim.x) {
      const float x = qm_float(sum[row + c]) - mean;
      squares[0] = fmaf(x, x, squares[0]);
    }
    qm_block_sums(squares, partial[1]);
    const float rstd = 1.0f / sqrtf(squares[0] / columns + args.eps);
    if (threadIdx.x == 0) {
      args.rstd[r] = rstd;
      if (CENTER) args.mean[r] = mean;
    }
    for (int64_t c = threadIdx.x; c < args.columns; c += blockDim.x) {
      const float weight = qm_any_float(args.weight, args.weight_dtype, c);
      const float y = (qm_float(sum[row + c]) - mean) * rstd * weight;
      const float bias =
          CENTER && args.bias != NULL ? qm_any_float(args.bias, args.weight_dtype, c) : 0.0f;
      ((T *)args.out)[row + c] = qm_as<T>(y + bias);
    }
  }
}

template <bool CENTER, typename T>
static void launch(qm_cuda *cuda, const qm_cuda_norm *args) {
  constexpr int WIDTH = 16 / sizeof(T);
  const bool aligned = qm_aligned(args->x, 16) && qm_aligned(args->residual, 16) &&
                       qm_aligned(args->sum, 16) && qm_aligned(args->out, 16);
  const qm_norm_shape shape = qm_norm_shape_of(args->columns, WIDTH, aligned, THREADS_WANTED, 4);
  const int32_t resident = 256 * BLOCKS_PER_MULTIPROCESSOR / shape.threads;
  const unsigned blocks = qm_blocks(cuda, args->rows, 1, resident < 1 ? 1 : resident);
  const int packs = shape.packs, threads = shape.threads;
  switch (shape.per_thread) {
    case 0: norm_any<CENTER, T><<<blocks, threads, 0, cuda->compute>>>(*args); break;
    case 1: norm<CENTER, T, WIDTH, 1><<<blocks, threads, 0, cuda->compute>>>(*args, packs); break;
    case 2: norm<CENTER, T, WIDTH, 2><<<blocks, threads, 0, cuda->compute>>>(*args, packs); break;
    default: norm<CENTER, T, WIDTH, 4><<<blocks, threads, 0, cuda->compute>>>(*args, packs);
  }
}

int32_t qm_cuda_norm_run(qm_cuda *cuda, const qm_cuda_norm *args) {
  if (args->rows == 0) return QM_OK;
  return qm_with_float(args->dtype, [&](auto element) {
    using T = decltype(element);
    if (args->mean != NULL)
      launch<true, T>(cuda, args);
    else
      launch<false, T>(cuda, args);
    return qm_cuda_launched(cuda, args->name);
  });
}
