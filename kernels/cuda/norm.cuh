/* norm.cuh - RMSNorm and LayerNorm are one kernel: LayerNorm also takes the mean away and adds a
** bias. rms_norm.cu and layer_norm.cu describe their call as below. */
#ifndef QM_NORM_CUH
#define QM_NORM_CUH

#include "device.cuh"

typedef struct qm_cuda_norm {
  const char *name;          /* of the operation, for errors */
  const void *x, *residual;  /* residual, sum: NULL, or sum = x + residual is normalised */
  void *sum, *out;           /* [rows, columns], of dtype like x */
  const void *weight, *bias; /* [columns], of weight_dtype; bias NULL: none */
  float *mean, *rstd;        /* [rows]; mean NULL: not centred */
  int64_t rows, columns;
  int32_t dtype, weight_dtype;
  float eps;
} qm_cuda_norm;

typedef struct qm_cuda_norm_backward {
  const char *name;
  const void *dout, *x, *dsum; /* x: what was normalised; dsum may be NULL */
  void *dx;
  const void *weight;
  const float *mean, *rstd; /* mean NULL: not centred */
  float *dweight, *dbias;   /* accumulate; each may be NULL */
  int64_t rows, columns;
  int32_t dtype, weight_dtype;
} qm_cuda_norm_backward;

int32_t qm_cuda_norm_run(qm_cuda *cuda, const qm_cuda_norm *args);
int32_t qm_cuda_norm_backward_run(qm_cuda *cuda, const qm_cuda_norm_backward *args);

/* ---- what the two directions share ---- */

/* The block's sums of N values each, in every thread; one barrier. Successive calls must use
** different `partial`s by turns, for the one before may still be read. */
template <int N>
__device__ __forceinline__ void qm_block_sums(float (&x)[N], float (*partial)[32]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int n = 0; n < N; n++) x[n] = qm_warp_sum(x[n]);
  if (warps == 1) return;
  if (lane == 0)
    for (int n = 0; n < N; n++) partial[n][warp] = x[n];
  __syncthreads();
  for (int n = 0; n < N; n++) x[n] = qm_warp_sum(lane < warps ? partial[n][lane] : 0.0f);
}

/* Element i of an array of any float type. */
__device__ __forceinline__ float qm_any_float(const void *data, int32_t dtype, int64_t i) {
  if (dtype == QM_F32) return ((const float *)data)[i];
  if (dtype == QM_BF16) return qm_float(((const __nv_bfloat16 *)data)[i]);
  return qm_float(((const __half *)data)[i]);
}

/* How a block holds its rows, `rows` of them at a time: each as `packs` of one access, `per_thread`
** (1 to 4) of them in each of `threads` threads. Narrow rows have a warp each, which needs no
** barrier; a wide row has the block. per_thread 0: the row is too long or not aligned, and is read
** again each time it is needed. */
typedef struct qm_norm_shape {
  int32_t packs, per_thread, threads, rows;
} qm_norm_shape;

enum { QM_NORM_NARROW = 4 * 32, QM_NORM_THREADS = 128, QM_NORM_THREADS_WIDE = 512 };

static inline qm_norm_shape qm_norm_shape_of(int64_t columns, int64_t width, bool aligned,
                                             int32_t narrow_rows, int64_t threads_wanted,
                                             int32_t per_thread_max) {
  const int64_t packs = columns / width;
  if (!aligned || columns % width != 0 || packs == 0) return {0, 0, 256, 1};
  if (packs <= QM_NORM_NARROW)
    return {(int32_t)packs, (int32_t)qm_ceil_div(packs, 32), 32, narrow_rows};
  int32_t per_thread = 1;
  while (per_thread < per_thread_max && packs > per_thread * threads_wanted) per_thread *= 2;
  const int64_t threads = qm_ceil_div(qm_ceil_div(packs, per_thread), 32) * 32;
  if (threads > QM_NORM_THREADS_WIDE) return {0, 0, 256, 1};
  return {(int32_t)packs, per_thread, (int32_t)threads, 1};
}

/* Blocks that walk all rows and are resident at once. */
template <typename Kernel>
static inline unsigned qm_norm_blocks(const qm_cuda *cuda, Kernel kernel, int64_t rows,
                                      const qm_norm_shape &shape) {
  int resident = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &resident, kernel, shape.threads * shape.rows, 0);
  if (error != cudaSuccess || resident < 1) resident = 1;
  return qm_blocks(cuda, rows, shape.rows, resident);
}

#endif
