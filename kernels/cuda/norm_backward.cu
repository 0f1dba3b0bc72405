/* norm_backward.cu - gradients of norm.cu, a warp or a block to a row, the row in registers.
** y = (x - mean) rstd, g = dout weight: dx = rstd (g - mean(g) - y mean(g y)) + dsum, without
** mean(g) where the row is not centred. dweight += dout y and dbias += dout over the rows: every
** block sums its own rows in registers, then column_sums adds the blocks' sums in their order. */
#include "norm.cuh"

enum { NARROW_ROWS = 4, THREADS_WANTED = 128, COLUMNS = 32, STRIPES = 32 };

/* A warp's part of one row in shared memory, as it lies in memory. Each thread copies and reads its
** own packs and numbers alone, so that copies need no barrier. */
template <int PACKS>
struct row_part {
  qm_words<4> dout[PACKS][32], x[PACKS][32], dsum[PACKS][32];
  float rstd[32], mean[32];
};

/* Row r's part, from pack `from` of each tensor on. */
template <bool CENTER, int PACKS>
static __device__ __forceinline__ void fetch(const qm_cuda_norm_backward &args, int64_t r,
                                             int64_t from, int packs, row_part<PACKS> &to) {
  using pack = qm_words<4>;
  const int lane = threadIdx.x % 32;
  if (r < args.rows) {
    qm_copy_number(&to.rstd[lane], args.rstd + r);
    if (CENTER) qm_copy_number(&to.mean[lane], args.mean + r);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      if (threadIdx.x + p * blockDim.x >= packs) continue;
      qm_copy_async(&to.dout[p][lane], (const pack *)args.dout + from + p * blockDim.x);
      qm_copy_async(&to.x[p][lane], (const pack *)args.x + from + p * blockDim.x);
      if (args.dsum != NULL)
        qm_copy_async(&to.dsum[p][lane], (const pack *)args.dsum + from + p * blockDim.x);
    }
  }
  qm_copy_commit();
}

/* The block's sums of its rows' `x` go to sums[0 .. columns), 16 bytes at a time: a lone row's at
** once, several rows' through shared memory, in the rows' order. */
template <int PACKS, int WIDTH>
static __device__ __forceinline__ void put(const float (&x)[PACKS][WIDTH], int packs, float *shared,
                                           float *sums) {
  using four = qm_pack<float, 4>;
  const int fours = packs * (WIDTH / 4), rows = blockDim.y;
  four *place = (four *)(rows == 1 ? sums : shared) + threadIdx.y * fours;
  __syncthreads(); /* what was there may still be read */
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const int at = threadIdx.x + p * blockDim.x;
    if (at >= packs) continue;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4)
      place[at * (WIDTH / 4) + i / 4] = {{x[p][i], x[p][i + 1], x[p][i + 2], x[p][i + 3]}};
  }
  if (rows == 1) return;
  __syncthreads();
  const int first = threadIdx.y * blockDim.x + threadIdx.x, step = blockDim.x * rows;
  for (int c = first; c < fours; c += step) {
    four sum = ((four *)shared)[c];
    for (int y = 1; y < rows; y++)
      for (int k = 0; k < 4; k++) sum.at[k] += ((four *)shared)[y * fours + c].at[k];
    ((four *)sums)[c] = sum;
  }
}

/* Block b's sums are row b of `sums` [2, blocks, columns]: dweight's, then dbias's. NARROW: a warp
** to a row, blockDim.y rows in a block. */
template <bool CENTER, typename T, int WIDTH, int PACKS, bool NARROW>
static __global__ void __launch_bounds__(NARROW ? QM_NORM_THREADS : QM_NORM_THREADS_WIDE)
    norm_backward(qm_cuda_norm_backward args, int packs, int ahead, float *sums) {
  extern __shared__ uint4 shared[];
  __shared__ float partial[2][2][32];
  const int first = threadIdx.x, step = blockDim.x, lane = first % 32;
  const float columns = (float)args.columns;
  const auto get = [&](int64_t r, int64_t from, row_part<PACKS> &to) {
    fetch<CENTER>(args, r, from, packs, to);
  };
  qm_norm_walk<row_part<PACKS>> walk(shared, NARROW, packs, ahead);
  walk.begin(get);
  float weight[PACKS][WIDTH], dweight[PACKS][WIDTH] = {}, dbias[PACKS][WIDTH] = {};
  qm_read_packs(args.weight, args.weight_dtype, packs, weight);
  for (int turn = 0; walk.row < args.rows; walk.row += walk.step, turn ^= 1) {
    const row_part<PACKS> &in = walk.take(get);
    const float rstd = in.rstd[lane], mean = CENTER ? in.mean[lane] : 0.0f;
    float means[CENTER ? 2 : 1] = {}; /* of g y and of g */
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      if (first + p * step >= packs) continue;
      float dout[WIDTH], x[WIDTH];
      qm_unpack<T>(in.dout[p][lane], dout);
      qm_unpack<T>(in.x[p][lane], x);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        const float d = dout[i], g = d * weight[p][i], y = (x[i] - mean) * rstd;
        means[0] = fmaf(g, y, means[0]);
        dweight[p][i] = fmaf(d, y, dweight[p][i]);
        if constexpr (CENTER) {
          means[1] += g;
          dbias[p][i] += d;
        }
      }
    }
    qm_block_sums(means, partial[turn]);
    const float mean_gy = means[0] / columns;
    float mean_g = 0.0f;
    if constexpr (CENTER) mean_g = means[1] / columns;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      if (first + p * step >= packs) continue;
      float dout[WIDTH], x[WIDTH], dsum[WIDTH] = {};
      qm_unpack<T>(in.dout[p][lane], dout);
      qm_unpack<T>(in.x[p][lane], x);
      if (args.dsum != NULL) qm_unpack<T>(in.dsum[p][lane], dsum);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        const float g = dout[i] * weight[p][i], y = (x[i] - mean) * rstd;
        x[i] = rstd * (fmaf(-y, mean_gy, g) - mean_g) + dsum[i];
      }
      ((qm_words<4> *)args.dx)[walk.row * packs + first + p * step] = qm_repack<T, 4>(x);
    }
  }
  qm_let_next_begin();
  if (sums == NULL) return;
  qm_copy_wait<0>();
  sums += blockIdx.x * args.columns;
  put(dweight, packs, (float *)shared, sums);
  if (CENTER) put(dbias, packs, (float *)shared, sums + (int64_t)gridDim.x * args.columns);
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
  qm_await_previous();
  if (out == NULL) return;
  sums += (int64_t)blockIdx.y * rows * columns;
  const int64_t c = (int64_t)blockIdx.x * COLUMNS + threadIdx.x;
  float sum = 0.0f;
  if (c < columns)
#pragma unroll 8
    for (int r = threadIdx.y; r < rows; r += STRIPES) sum += sums[r * columns + c];
  stripes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= columns) return;
  for (int stripe = 1; stripe < STRIPES; stripe++) sum += stripes[stripe][threadIdx.x];
  out[c] += sum;
}

static int32_t take_sums(qm_cuda *cuda, const qm_cuda_norm_backward *args, unsigned blocks,
                         float **sums) {
  *sums = NULL;
  if (args->dweight == NULL && args->dbias == NULL) return QM_OK;
  return qm_cuda_scratch(cuda, (int64_t)sizeof(float) * 2 * blocks * args->columns, (void **)sums);
}

static int32_t add_sums(qm_cuda *cuda, const qm_cuda_norm_backward *args, unsigned blocks,
                        const float *sums) {
  const int32_t status = qm_cuda_launched(cuda, args->name);
  if (status != QM_OK || sums == NULL || args->columns == 0) return status;
  const dim3 grid((unsigned)qm_ceil_div(args->columns, COLUMNS), args->dbias != NULL ? 2 : 1);
  qm_launch_early(cuda, column_sums, grid, dim3(COLUMNS, STRIPES), 0, sums, (int)blocks,
                  args->columns, args->dweight, args->dbias);
  return qm_cuda_launched(cuda, args->name);
}

template <bool CENTER, typename T, int PACKS, bool NARROW>
static int32_t launch_shape(qm_cuda *cuda, const qm_cuda_norm_backward *args,
                            const qm_norm_shape &shape) {
  const auto kernel = norm_backward<CENTER, T, 16 / sizeof(T), PACKS, NARROW>;
  qm_norm_launch plan;
  if (const int32_t status = qm_norm_plan(cuda, args->name, kernel, args->rows, shape,
                                          (int32_t)sizeof(row_part<PACKS>), &plan))
    return status;
  float *sums;
  if (const int32_t status = take_sums(cuda, args, plan.blocks, &sums)) return status;
  kernel<<<plan.blocks, plan.block, (size_t)plan.bytes, cuda->compute>>>(*args, shape.packs,
                                                                         plan.ahead, sums);
  return add_sums(cuda, args, plan.blocks, sums);
}

template <bool CENTER, typename T>
static int32_t launch_any(qm_cuda *cuda, const qm_cuda_norm_backward *args) {
  const unsigned blocks = qm_blocks(cuda, args->rows, 1, 4);
  float *sums;
  if (const int32_t status = take_sums(cuda, args, blocks, &sums)) return status;
  norm_backward_any<CENTER, T><<<blocks, 256, 0, cuda->compute>>>(*args, sums);
  return add_sums(cuda, args, blocks, sums);
}

template <bool CENTER, typename T>
static int32_t launch(qm_cuda *cuda, const qm_cuda_norm_backward *args) {
  const bool aligned = qm_aligned(args->dout, 16) && qm_aligned(args->x, 16) &&
                       qm_aligned(args->dsum, 16) && qm_aligned(args->dx, 16) &&
                       qm_aligned(args->weight, 16);
  const qm_norm_shape shape =
      qm_norm_shape_of(args->columns, 16 / sizeof(T), aligned, NARROW_ROWS, THREADS_WANTED, 2);
  if (shape.per_thread == 0) return launch_any<CENTER, T>(cuda, args);
  if (shape.threads != 32)
    return shape.per_thread == 1 ? launch_shape<CENTER, T, 1, false>(cuda, args, shape)
                                 : launch_shape<CENTER, T, 2, false>(cuda, args, shape);
  switch (shape.per_thread) {
    case 1: return launch_shape<CENTER, T, 1, true>(cuda, args, shape);
    case 2: return launch_shape<CENTER, T, 2, true>(cuda, args, shape);
    case 3: return launch_shape<CENTER, T, 3, true>(cuda, args, shape);
    default: return launch_shape<CENTER, T, 4, true>(cuda, args, shape);
  }
}

int32_t qm_cuda_norm_backward_run(qm_cuda *cuda, const qm_cuda_norm_backward *args) {
  if (args->rows == 0) return QM_OK;
  return qm_with_float(args->dtype, [&](auto element) {
    using T = decltype(element);
    return args->mean != NULL ? launch<true, T>(cuda, args) : launch<false, T>(cuda, args);
  });
}
