/* gemm_tune.cu - the fastest of cuBLASLt's algorithms for a product, among those with the same
** bits, also in what an epilogue writes beside the product.
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
  char *memory;
  int64_t size_bytes;            /* of each result: out and, where it is written, aux */
  qm_gemm_operands first, other; /* the product, with results of its own */
  bool writes_aux;
  comparison *found;
  cudaEvent_t start, stop;
} bench;

static bool open_bench(bench *b, const qm_gemm_key *key, const qm_gemm_operands *operands) {
  b->writes_aux = key->epilogue == CUBLASLT_EPILOGUE_GELU_AUX ||
                  key->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
  b->size_bytes = key->batch * key->m * key->n * (key->out_type == QM_F32 ? 4 : 2);
  const int64_t padded = qm_ceil_div(b->size_bytes, 256) * 256;
  const int64_t total = padded * (b->writes_aux ? 4 : 2);
  if (cudaMalloc((void **)&b->memory, (size_t)total + 256) != cudaSuccess ||
      cudaEventCreate(&b->start) != cudaSuccess || cudaEventCreate(&b->stop) != cudaSuccess)
    return false;
  b->first = b->other = *operands;
  b->first.out = b->memory;
  b->other.out = b->memory + padded;
  if (b->writes_aux) {
    b->first.aux = b->memory + 2 * padded;
    b->other.aux = b->memory + 3 * padded;
  }
  b->found = (comparison *)(b->memory + total);
  return true;
}

static void close_bench(bench *b) {
  cudaFree(b->memory);
  if (b->start != NULL) cudaEventDestroy(b->start);
  if (b->stop != NULL) cudaEventDestroy(b->stop);
  cudaGetLastError(); /* what went wrong here costs speed only */
}

/* Have the two results the same bits, which are not all 0? */
static bool is_same(qm_cuda *cuda, const bench *b, const void *x, const void *y) {
  comparison seen = {1, 0};
  const int64_t count = b->size_bytes / 2;
  if (cudaMemsetAsync(b->found, 0, sizeof *b->found, cuda->compute) != cudaSuccess) return false;
  compare<<<qm_blocks(cuda, count, THREADS), THREADS, 0, cuda->compute>>>(
      (const uint16_t *)x, (const uint16_t *)y, count, b->found);
  cudaMemcpyAsync(&seen, b->found, sizeof seen, cudaMemcpyDeviceToHost, cuda->compute);
  return cudaStreamSynchronize(cuda->compute) == cudaSuccess && !seen.differs && seen.nonzero;
}

/* Does algorithm `index` run, and give what the first one does? */
static bool agrees(qm_cuda *cuda, const qm_gemm_plan *p, int index, const bench *b) {
  if (qm_cuda_gemm_run(cuda, p, index, &b->other) != CUBLAS_STATUS_SUCCESS) return false;
  if (!is_same(cuda, b, b->first.out, b->other.out)) return false;
  return !b->writes_aux || is_same(cuda, b, b->first.aux, b->other.aux);
}

static float time_once(qm_cuda *cuda, const qm_gemm_plan *p, int index, const bench *b) {
  float elapsed_ms = 0.0f;
  cudaEventRecord(b->start, cuda->compute);
  const cublasStatus_t code = qm_cuda_gemm_run(cuda, p, index, &b->other);
  cudaEventRecord(b->stop, cuda->compute);
  if (code != CUBLAS_STATUS_SUCCESS || cudaEventSynchronize(b->stop) != cudaSuccess ||
      cudaEventElapsedTime(&elapsed_ms, b->start, b->stop) != cudaSuccess)
    return INFINITY;
  return elapsed_ms;
}

/* The algorithms left in p->algorithms, the fastest first; in turns, so that all meet the same
** clock rates. */
static void rank(qm_cuda *cuda, qm_gemm_plan *p, const bench *b) {
  float best_ms[QM_GEMM_CANDIDATES];
  for (int round = 0; round < ROUNDS; round++)
    for (int i = 0; i < p->count; i++) {
      const float elapsed_ms = time_once(cuda, p, i, b);
      if (round == 0 || elapsed_ms < best_ms[i]) best_ms[i] = elapsed_ms;
    }
  int best = 0;
  for (int i = 1; i < p->count; i++)
    if (best_ms[i] < best_ms[best] && best_ms[i] < GAIN_MIN * best_ms[0]) best = i;
  p->algorithms[0] = p->algorithms[best];
}

void qm_cuda_gemm_tune(qm_cuda *cuda, const qm_gemm_key *key, qm_gemm_plan *p,
                       const qm_gemm_operands *operands) {
  const double operations = 2.0 * (double)(key->batch * key->m * key->n) * (double)key->k;
  if (cuda->recording) return; /* the next call outside settles it */
  bench b = {};
  if (operations >= WORTH_TUNING && cuda->blas->tuned < TUNED_MAX &&
      open_bench(&b, key, operands) &&
      qm_cuda_gemm_run(cuda, p, 0, &b.first) == CUBLAS_STATUS_SUCCESS) {
    int kept = 1;
    for (int i = 1; i < p->count; i++)
      if (agrees(cuda, p, i, &b)) p->algorithms[kept++] = p->algorithms[i];
    p->count = kept;
    rank(cuda, p, &b);
    cuda->blas->tuned++;
  }
  close_bench(&b);
  p->count = 1;
}
