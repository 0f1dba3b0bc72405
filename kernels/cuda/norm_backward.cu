/* norm_backward.cu - gradients of norm.cu, a block to a row, the row in registers.
** y = (x - mean) rstd, g = dout weight: dx = rstd (g - mean(g) - y mean(g y)) + dsum, without
** mean(g) where the row is not centred. dweight += dout y and dbias += dout over the rows: every
** block sums its own rows in registers, then column_sums adds the blocks' sums in their order. */
#include "norm.cuh"

enum { THREADS_WANTED = 512, THREADS_RESIDENT = 1024, COLUMNS = 32, STRIPES = 32 };

/* Block b's sums are row b of `sums` [2, blocks, columns]: dweight's, then dbias's. */
template <bool CENTER, typename T, int WIDTH, int PACKS>
static __global__ void __launch_bounds__(QM_NORM_THREADS_MAX)
    norm_backward(qm_cuda_norm_backward args, int packs, float *sums) {
  using pack = qm_pack<T, WIDTH>;
  __shared__ float partial[2][2][32];
  const int first = threadIdx.x, step = blockDim.x;
  const float columns = (float)args.columns;
  float weight[PACKS][WIDTH], dweight[PACKS][WIDTH], dbias[PACKS][WIDTH];
#pragma unroll
  for (int p = 0; p < PACKS; p++)
    for (int i = 0; i < WIDTH; i++) {
      const int at = first + p * step;
      dweight[p][i] = dbias[p][i] = weight[p][i] = 0.0f;
      if (at < packs)
        weight[p][i] = qm_any_float(args.weight, args.weight_dtype, (int64_t)at * WIDTH + i);
    }
  int turn = 0;
  for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x, turn ^= 1) {
    const int64_t row = r * packs;
    const float rstd = args.rstd[r], mean = CENTER ? args.mean[r] : 0.0f;
    pack dout[PACKS], x[PACKS], dsum[PACKS];
    float means[2] = {0.0f, 0.0f}; /* of g y and of g */
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int at = first + p * step;
      if (at >= packs) continue;
      dout[p] = ((const pack *)args.dout)[row + at];
      x[p] = ((const pack *)args.x)[row + at];
      if (args.dsum != NULL) dsum[p] = ((const pack *)args.dsum)[row + at];
    }
#pragma unroll
    for (int p = 0; p < PACKS; p++)
      for (int i = 0; i < WIDTH && first + p * step < packs; i++) {
        const float d = qm_float(dout[p].at[i]), y = (qm_float(x[p].at[i]) - mean) * rstd;
        const float g = d * weight[p][i];
        means[0] = fmaf(g, y, means[0]);
        means[1] += g;
        dweight[p][i] = fmaf(d, y, dweight[p][i]);
        if (CENTER) dbias[p][i] += d;
      }
    if (CENTER) {
      qm_block_sums(means, partial[turn]);
    } else {
      float first_mean[1] = {means[0]};
      qm_block_sums(first_mean, partial[turn]);
      means[0] = first_mean[0];
    }
    const float mean_gy = means[0] / columns, mean_g = CENTER ? means[1] / columns : 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      if (first + p * step >= packs) continue;
      pack out;
      for (int i = 0; i < WIDTH; i++) {
        const float g = qm_float(dout[p].at[i]) * weight[p][i];
        const float y = (qm_float(x[p].at[i]) - mean) * rstd;
        float dx = rstd * (fmaf(-y, mean_gy, g) - mean_g);
        if (args.dsum != NULL) dx += qm_float(dsum[p].at[i]);
        out.at[i] = qm_as<T>(dx);
      }
      ((pack *)args.dx)[row + first + p * step] = out;
    }
  }
  if (sums == NULL) return;
  const int64_t second = (int64_t)gridDim.x * args.columns;
#pragma unroll
  for (int p = 0; p < PACKS; p++)
    for (int i = 0; i < WIDTH && first + p * step < packs; i++) {
      const int64_t at = blockIdx.x * args.columns + (int64_t)(first + p * step) * WIDTH + i;
      sums[at] = dweight[p][i];
      if (CENTER) sums[second + at] = dbias[p][i];
    }
}

/* Rows of any length and alignment, an element at a time; the block's sums gather in memory. */
template <bool CENTER, typename T>
static __global__ void norm_backward_any(qm_cuda_norm_backward args, float *sums) {
  __shared__ float partial[2][2][32];
  const T *douts = (const T *)args.dout, *xs = (const T *)args.x, *dsums = (const T *)args.dsum;
  const float columns = (float)args.columns;
  float *dweight = sums + blockIdx.x * args.columns;
  float *dbias = dweight + gridDim.x * args.columns;
  int turn = 0;
  for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x, turn ^= 1) {
    const int64_t row = r * args.columns;
    const float rstd = args.rstd[r], mean = CENTER ? args.mean[r] : 0.0f;
    const bool is_first = r == blockIdx.x;
    float means[2] = {0.0f, 0.0f};
    for (int64_t c = threadIdx.x; c < args.columns; c += blockDim.x) {
      const float d = qm_float(douts[row + c]), y = (qm_float(xs[row + c]) - mean) * rstd;
      const float g = d * qm_any_float(args.weight, args.weight_dtype, c);
      means[0] = fmaf(g, y, means[0]);
      means[1] += g;
      if (sums == NULL) continue;
      dweight[c] = fmaf(d, y, is_first ? 0.0f : dweight[c]);
      if (CENTER) dbias[c] = d + (is_first ? 0.0f : dbias[c]);
    }
    qm_block_sums(means, partial[turn]);
    const float mean_gy = means[0] / columns, mean_g = CENTER ? means[1] / columns : 0.0f;
    for (int64_t c = threadIdx.x; c < args.columns; c += blockDim.x) {
      const float g = qm_float(douts[row + c]) * qm_any_float(args.weight, args.weight_dtype, c);
      const float y = (qm_float(xs[row + c]) - mean) * rstd;
      float dx = rstd * (fmaf(-y, mean_gy, g) - mean_g);
      if (dsums != NULL) dx += qm_float(dsums[row + c]);
      ((T *)args.dx)[row + c] = qm_as<T>(dx);
    }
  }
}

/* out[c] += the sum of column c of sums [rows, columns]; blockIdx.y: dweight or dbias. */
static __global__ void column_sums(const float *sums, int rows, int64_t columns, float *dweight,
                                   float *dbias) {
  __shared__ float stripes[STRIPES][COLUMNS];
  float *out = blockIdx.y == 0 ? dweight : dbias;
  if (out == NULL) return;
  sums += (int64_t)blockIdx.y * rows * columns;
  const int64_t c = (int64_t)blockIdx.x * COLUMNS + threadIdx.x;
  float sum = 0.0f;
  if (c < columns)
    for (int r = threadIdx.y; r < rows; r += STRIPES) sum += sums[r * columns + c];
  stripes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= columns) return;
  for (int stripe = 1; stripe < STRIPES; stripe++) sum += stripes[stripe][threadIdx.x];
  out[c] += sum;
}

template <bool CENTER, typename T>
static int32_t launch(qm_cuda *cuda, const qm_cuda_norm_backward *args) {
  constexpr int WIDTH = 16 / sizeof(T);
  const bool aligned = qm_aligned(args->dout, 16) && qm_aligned(args->x, 16) &&
                       qm_aligned(args->dsum, 16) && qm_aligned(args->dx, 16);
  const qm_norm_shape shape = qm_norm_shape_of(args->columns, WIDTH, aligned, THREADS_WANTED, 2);
  const int32_t resident = THREADS_RESIDENT / shape.threads;
  const unsigned blocks = qm_blocks(cuda, args->rows, 1, resident < 1 ? 1 : resident);
  const int packs = shape.packs, threads = shape.threads;
  float *sums = NULL;
  if (args->dweight != NULL || args->dbias != NULL) {
    const int64_t bytes = (int64_t)sizeof(float) * 2 * blocks * args->columns;
    if (const int32_t status = qm_cuda_scratch(cuda, bytes, (void **)&sums)) return status;
  }
  switch (shape.per_thread) {
    case 0: norm_backward_any<CENTER, T><<<blocks, threads, 0, cuda->compute>>>(*args, sums); break;
    case 1:
      norm_backward<CENTER, T, WIDTH, 1><<<blocks, threads, 0, cuda->compute>>>(*args, packs, sums);
      break;
    default:
      norm_backward<CENTER, T, WIDTH, 2><<<blocks, threads, 0, cuda->compute>>>(*args, packs, sums);
  }
  const int32_t status = qm_cuda_launched(cuda, args->name);
  if (status != QM_OK || sums == NULL || args->columns == 0) return status;
  const dim3 grid((unsigned)qm_ceil_div(args->columns, COLUMNS), CENTER ? 2 : 1);
  column_sums<<<grid, dim3(COLUMNS, STRIPES), 0, cuda->compute>>>(sums, (int)blocks, args->columns,
                                                                  args->dweight, args->dbias);
  return qm_cuda_launched(cuda, args->name);
}

int32_t qm_cuda_norm_backward_run(qm_cuda *cuda, const qm_cuda_norm_backward *args) {
  if (args->rows == 0) return QM_OK;
  return qm_with_float(args->dtype, [&](auto element) {
    using T = decltype(element);
    return args->mean != NULL ? launch<true, T>(cuda, args) : launch<false, T>(cuda, args);
  });
}
