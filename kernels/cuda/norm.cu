/* norm.cu - rows normalised: RMSNorm (arXiv 1910.07467), LayerNorm (arXiv 1607.06450), forward. A
** warp or a block takes one row at a time, all of it in registers, and keeps the weights there from
** row to row, while the next rows come to shared memory. Memory bound: x (and the residual) read
** once, out (and the sum) written once. */
#include "norm.cuh"

enum { NARROW_ROWS = QM_NORM_THREADS / 32, THREADS_WANTED = 256 };

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

/* A warp's part of one row in shared memory, as it lies in memory. Each thread copies and reads its
** own packs alone, so that copies need no barrier. */
template <int PACKS>
struct row_part {
  qm_words<4> x[PACKS][32], residual[PACKS][32];
};

/* Row r's part, from pack `from` of each tensor on. */
template <int PACKS>
static __device__ __forceinline__ void fetch(const qm_cuda_norm &args, int64_t r, int64_t from,
                                             int packs, row_part<PACKS> &to) {
  using pack = qm_words<4>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    if (r >= args.rows || threadIdx.x + p * blockDim.x >= packs) continue;
    qm_copy_async(&to.x[p][lane], (const pack *)args.x + from + p * blockDim.x);
    if (args.sum != NULL)
      qm_copy_async(&to.residual[p][lane], (const pack *)args.residual + from + p * blockDim.x);
  }
  qm_copy_commit();
}

/* NARROW: a warp to a row, blockDim.y rows in a block. */
template <bool CENTER, typename T, int WIDTH, int PACKS, bool NARROW>
static __global__ void __launch_bounds__(NARROW ? QM_NORM_THREADS : QM_NORM_THREADS_WIDE)
    norm(qm_cuda_norm args, int packs, int ahead) {
  extern __shared__ uint4 shared[];
  __shared__ float partial[2][2][32];
  qm_take_turn();
  const int first = threadIdx.x, step = blockDim.x, lane = first % 32;
  const auto get = [&](int64_t r, int64_t from, row_part<PACKS> &to) {
    fetch(args, r, from, packs, to);
  };
  qm_norm_walk<row_part<PACKS>> walk(shared, NARROW, packs, ahead);
  walk.begin(get);
  float weight[PACKS][WIDTH], bias[PACKS][WIDTH];
  qm_read_packs(args.weight, args.weight_dtype, packs, weight);
  if (CENTER) qm_read_packs(args.bias, args.weight_dtype, packs, bias);
  for (int turn = 0; walk.row < args.rows; walk.row += walk.step, turn ^= 1) {
    const row_part<PACKS> &in = walk.take(get);
    const int64_t r = walk.row, row = r * packs;
    float x[PACKS][WIDTH];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int at = first + p * step;
      for (int i = 0; i < WIDTH; i++) x[p][i] = 0.0f;
      if (at >= packs) continue;
      qm_unpack<T>(in.x[p][lane], x[p]);
      if (args.sum == NULL) continue;
      float residual[WIDTH];
      qm_unpack<T>(in.residual[p][lane], residual);
      for (int i = 0; i < WIDTH; i++) x[p][i] += residual[i];
      const qm_words<4> sum = qm_repack<T, 4>(x[p]);
      ((qm_words<4> *)args.sum)[row + at] = sum;
      qm_unpack<T>(sum, x[p]); /* rounded, as later readers see it */
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
      float out[WIDTH];
      for (int i = 0; i < WIDTH; i++) {
        const float y = (CENTER ? x[p][i] - at_row.x : x[p][i]) * at_row.y;
        out[i] = CENTER ? fmaf(y, weight[p][i], bias[p][i]) : y * weight[p][i];
      }
      ((qm_words<4> *)args.out)[row + first + p * step] = qm_repack<T, 4>(out);
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

template <bool CENTER, typename T, int PACKS, bool NARROW>
static int32_t launch_shape(qm_cuda *cuda, const qm_cuda_norm *args, const qm_norm_shape &shape) {
  const auto kernel = norm<CENTER, T, 16 / sizeof(T), PACKS, NARROW>;
  qm_norm_launch plan;
  const int32_t status = qm_norm_plan(cuda, args->name, kernel, args->rows, shape,
                                      (int32_t)sizeof(row_part<PACKS>), &plan);
  if (status != QM_OK) return status;
  qm_launch_early(cuda, kernel, dim3(plan.blocks), plan.block, plan.bytes, *args, shape.packs,
                  plan.ahead);
  return qm_cuda_launched(cuda, args->name);
}

template <bool CENTER, typename T>
static int32_t launch(qm_cuda *cuda, const qm_cuda_norm *args) {
  const bool aligned = qm_aligned(args->x, 16) && qm_aligned(args->residual, 16) &&
                       qm_aligned(args->sum, 16) && qm_aligned(args->out, 16) &&
                       qm_aligned(args->weight, 16) && qm_aligned(args->bias, 16);
  const qm_norm_shape shape = qm_norm_shape_of(args->columns, 16 / sizeof(T), aligned, NARROW_ROWS,
                                               THREADS_WANTED, CENTER ? 2 : 4);
  if (shape.per_thread == 0) {
    const unsigned blocks = qm_blocks(cuda, args->rows, 1, 8);
    norm_any<CENTER, T><<<blocks, shape.threads, 0, cuda->compute>>>(*args);
    return qm_cuda_launched(cuda, args->name);
  } else if (shape.threads == 32) {
    switch (shape.per_thread) {
      case 1: return launch_shape<CENTER, T, 1, true>(cuda, args, shape);
      case 2: return launch_shape<CENTER, T, 2, true>(cuda, args, shape);
      case 3: return launch_shape<CENTER, T, 3, true>(cuda, args, shape);
      default: return launch_shape<CENTER, T, 4, true>(cuda, args, shape);
    }
  } else {
    switch (shape.per_thread) {
      case 1: return launch_shape<CENTER, T, 1, false>(cuda, args, shape);
      case 2: return launch_shape<CENTER, T, 2, false>(cuda, args, shape);
      default: return launch_shape < CENTER, T, CENTER ? 2 : 4, false > (cuda, args, shape);
    }
  }
}

int32_t qm_cuda_norm_run(qm_cuda *cuda, const qm_cuda_norm *args) {
  if (args->rows == 0) return QM_OK;
  return qm_with_float(args->dtype, [&](auto element) {
    using T = decltype(element);
    return args->mean != NULL ? launch<true, T>(cuda, args) : launch<false, T>(cuda, args);
  });
}
