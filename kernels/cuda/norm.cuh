/* norm.cuh - RMSNorm and LayerNorm are one kernel: LayerNorm also takes the mean away and adds a
** bias. rms_norm.cu and layer_norm.cu describe their call as below. */
#ifndef QM_NORM_CUH
#define QM_NORM_CUH

#include "copy_async.cuh"
#include "pack.cuh"

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

/* A row's elements in this thread's packs, which are threadIdx.x + p blockDim.x of the row's; data
** is aligned to 16 bytes. Zeros beyond the row's end, and where there is no row. */
template <typename T, int PACKS, int WIDTH>
__device__ __forceinline__ void qm_read_packs(const T *data, int packs, float (&v)[PACKS][WIDTH]) {
  using pack = qm_words<WIDTH *(int)sizeof(T) / 4>;
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const int at = threadIdx.x + p * blockDim.x;
    pack words = {};
    if (data != NULL && at < packs) words = ((const pack *)data)[at];
    qm_unpack<T>(words, v[p]);
  }
}
template <int PACKS, int WIDTH>
__device__ __forceinline__ void qm_read_packs(const void *data, int32_t dtype, int packs,
                                              float (&v)[PACKS][WIDTH]) {
  if (dtype == QM_F32) return qm_read_packs((const float *)data, packs, v);
  if (dtype == QM_BF16) return qm_read_packs((const __nv_bfloat16 *)data, packs, v);
  qm_read_packs((const __half *)data, packs, v);
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

/* Blocks that walk all rows and are resident at once, and what each keeps in shared memory: beside
** the row worked on, `ahead` rows on their way. */
typedef struct qm_norm_launch {
  unsigned blocks;
  dim3 block;
  int32_t ahead, bytes;
} qm_norm_launch;

/* Rows under way behind the one at work: with two, an H200 took up to 7 % longer. */
enum { QM_NORM_AHEAD = 1 };

/* part_bytes: a warp's part of a row. Rows so long that a block has memory for one come one by
** one. */
template <typename Kernel>
static inline int32_t qm_norm_plan(const qm_cuda *cuda, const char *name, Kernel kernel,
                                   int64_t rows, const qm_norm_shape &shape, int32_t part_bytes,
                                   qm_norm_launch *out) {
  int most = 0, resident = 0;
  const int32_t status = qm_cuda_check(
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda->index), name);
  if (status != QM_OK) return status;
  const int32_t threads = shape.threads * shape.rows, row = threads / 32 * part_bytes;
  out->ahead = (QM_NORM_AHEAD + 1) * row <= most - 1024 ? QM_NORM_AHEAD : 0; /* 1024: its sums */
  out->bytes = (out->ahead + 1) * row;
  out->block = dim3((unsigned)shape.threads, (unsigned)shape.rows);
  const cudaError_t errors[] = {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, out->bytes),
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads,
                                                    (size_t)out->bytes)};
  for (const cudaError_t error : errors)
    if (const int32_t failed = qm_cuda_check(error, name)) return failed;
  if (resident < 1) resident = 1;
  out->blocks = qm_blocks(cuda, rows, shape.rows, resident);
  return QM_OK;
}

/* The rows that a warp or a block takes, one after the other, and their parts in shared memory: of
** the row at work, and of `ahead` more that are on their way. Fetch(row, from, part) begins to copy
** a row's part, from pack `from` of each tensor on, or nothing where there is no such row. */
template <typename Part>
struct qm_norm_walk {
  int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t step = (int64_t)gridDim.x * blockDim.y;
  const int packs, ahead;
  Part *const ring;
  int64_t next = row, from; /* to fetch: the row, this thread's first pack of it */
  int slot = 0, free;       /* of the row at work; of the one before it */

  __device__ __forceinline__ qm_norm_walk(void *shared, bool narrow, int packs_, int ahead_)
      : packs(packs_),
        ahead(ahead_),
        ring((Part *)shared + (narrow ? threadIdx.y : threadIdx.x / 32) * (ahead + 1)),
        from(row * packs + threadIdx.x),
        free(ahead) {}
  template <typename Fetch>
  __device__ __forceinline__ void fetch_into(const Fetch &fetch, int to) {
    fetch(next, from, ring[to]);
    next += step;
    from += step * packs;
  }
  template <typename Fetch>
  __device__ __forceinline__ void begin(const Fetch &fetch) {
    for (int a = 0; a < ahead; a++) fetch_into(fetch, a);
  }
  /* The part of the row at work, once it is there. */
  template <typename Fetch>
  __device__ __forceinline__ const Part &take(const Fetch &fetch) {
    fetch_into(fetch, free);
    if (ahead == QM_NORM_AHEAD)
      qm_copy_wait<QM_NORM_AHEAD>();
    else
      qm_copy_wait<0>();
    const Part &part = ring[slot];
    free = slot;
    slot = slot == ahead ? 0 : slot + 1;
    return part;
  }
};

#endif
