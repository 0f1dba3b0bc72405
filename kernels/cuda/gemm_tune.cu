/* gemm_tune.cu - the fastest of cuBLASLt's algorithms for a product, among those with the same
** bits.
**
** cuBLASLt's first choice is up to a quarter slower than its best one; whole training steps gain 1
** to 2 % (H200, bf16, GPT-2 124M and a Llama of 1.1B). A timed choice differs from run to run, so
** only those algorithms compete whose result equals that of the first choice, bit for bit: on
** Hopper nearly all that add along k in one piece. Numbers thus never depend on the clock. Each
** shape is timed once, outside graphs, in memory that is then returned. With QM_CUDA_TUNE=0 the
** first choice runs.
*/
#include "device.cuh"
#include "gemm.cuh"

enum { THREADS = 256, ROUNDS = 4, TUNED_MAX = 64 /* more shapes than a model has: rows vary */ };

static const double WORTH_TUNING = 1e10; /* operations: some 15 us */
static const float GAIN_MIN = 0.98f;     /* of the first choice's time, above the noise */

/* What two results were found to have. */
typedef struct comparison {
  uint32_t differs, nonzero;
} comparison;

static __global__ void compare(const uint16_t *x, const uint16_t *y, int64_t count,
                               comparison *found) {
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  bool differs = false, nonzero = false;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) {
    differs |= x[i] != y[i];
    nonzero |= x[i] != 0;
  }
  if (differs) found->differs = 1;
  if (nonzero) found->nonzero = 1;
}

/* Memory and events of one tuning. */
typedef struct bench {
  char *first, *other; /* results */
  comparison *found;
  cudaEvent_t start, stop;
} bench;

static bool open_bench(bench *b, int64_t size_bytes) {
  const int64_t padded = qm_ceil_div(size_bytes, 256) * 256;
  const bool made = cudaMalloc((void **)&b->first, (size_t)(2 * padded) + 256) == cudaSuccess &&
                    cudaEventCreate(&b->start) == cudaSuccess &&
                    cudaEventCreate(&b->stop) == cudaSuccess;
  b->other = b->first + padded;
  b->found = (comparison *)(b->other + padded);
  return made;
}

static void close_bench(bench *b) {
  cudaFree(b->first);
  if (b->start != NULL) cudaEventDestroy(b->start);
  if (b->stop != NULL) cudaEventDestroy(b->stop);
  cudaGetLastError(); /* what went wrong here costs speed only */
}

/* Does algorithm `index` run, with the first one's bits, which are not all 0? */
static bool agrees(qm_cuda *cuda, const qm_gemm_plan *p, int index,
                   const qm_gemm_operands *operands, bench *b, int64_t size_bytes) {
  comparison seen = {1, 0};
  if (qm_cuda_gemm_run(cuda, p, index, operands, b->other) != CUBLAS_STATUS_SUCCESS) return false;
  if (cudaMemsetAsync(b->found, 0, sizeof *b->found, cuda->compute) != cudaSuccess) return false;
  compare<<<qm_blocks(cuda, size_bytes / 2, THREADS), THREADS, 0, cuda->compute>>>(
      (const uint16_t *)b->first, (const uint16_t *)b->other, size_bytes / 2, b->found);
  cudaMemcpyAsync(&seen, b->found, sizeof seen, cudaMemcpyDeviceToHost, cuda->compute);
  return cudaStreamSynchronize(cuda->compute) == cudaSuccess && !seen.differs && seen.nonzero;
}

static float time_once(qm_cuda *cuda, const qm_gemm_plan *p, int index,
                       const qm_gemm_operands *operands, bench *b) {
  float elapsed_ms = 0.0f;
  cudaEventRecord(b->start, cuda->compute);
  const cublasStatus_t code = qm_cuda_gemm_run(cuda, p, index, operands, b->other);
  cudaEventRecord(b->stop, cuda->compute);
  if (code != CUBLAS_STATUS_SUCCESS || cudaEventSynchronize(b->stop) != cudaSuccess ||
      cudaEventElapsedTime(&elapsed_ms, b->start, b->stop) != cudaSuccess)
    return INFINITY;
  return elapsed_ms;
}

/* The algorithms left in p->algorithms, the fastest first; in turns, so that all meet the same
** clock rates. */
static void rank(qm_cuda *cuda, qm_gemm_plan *p, const qm_gemm_operands *operands, bench *b) {
  float best_ms[QM_GEMM_CANDIDATES];
  for (int round = 0; round < ROUNDS; round++)
    for (int i = 0; i < p->count; i++) {
      const float elapsed_ms = time_once(cuda, p, i, operands, b);
      if (round == 0 || elapsed_ms < best_ms[i]) best_ms[i] = elapsed_ms;
    }
  int best = 0;
  for (int i = 1; i < p->count; i++)
    if (best_ms[i] < best_ms[best] && best_ms[i] < GAIN_MIN * best_ms[0]) best = i;
  p->algorithms[0] = p->algorithms[best];
}

void qm_cuda_gemm_tune(qm_cuda *cuda, const qm_gemm_key *key, qm_gemm_plan *p,
                       const qm_gemm_operands *operands) {
  const int64_t elements = key->batch * key->m * key->n;
  const int64_t size_bytes = elements * (key->out_type == QM_F32 ? 4 : 2);
  if (cuda->recording) return; /* the next call outside settles it */
  const bool worth = 2.0 * (double)elements * (double)key->k >= WORTH_TUNING;
  bench b = {};
  if (worth && cuda->blas->tuned < TUNED_MAX && open_bench(&b, size_bytes) &&
      qm_cuda_gemm_run(cuda, p, 0, operands, b.first) == CUBLAS_STATUS_SUCCESS) {
    int kept = 1;
    for (int i = 1; i < p->count; i++)
      if (agrees(cuda, p, i, operands, &b, size_bytes)) p->algorithms[kept++] = p->algorithms[i];
    p->count = kept;
    rank(cuda, p, operands, &b);
    cuda->blas->tuned++;
  }
  close_bench(&b);
  p->count = 1;
}
