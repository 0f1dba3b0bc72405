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

/* One of the things that a product writes, as the first algorithm has it and as another one. */
typedef struct part {
  char *first, *other;
  int64_t size_bytes; /* 0: not written */
} part;
enum { OUT, AUX, VECTOR, PARTS };

/* Memory and events of one tuning. */
typedef struct bench {
  char *memory;
  part parts[PARTS];
  qm_gemm_operands first, other; /* the product, with these results */
  comparison *found;
  cudaEvent_t start, stop;
} bench;

static bool open_bench(bench *b, const qm_gemm_key *key, const qm_gemm_operands *operands) {
  const int64_t size = key->out_type == QM_F32 ? 4 : 2, elements = key->batch * key->m * key->n;
  b->parts[OUT].size_bytes = elements * size;
  b->parts[AUX].size_bytes = qm_gemm_writes_aux(key->epilogue) ? elements * size : 0;
  b->parts[VECTOR].size_bytes = qm_gemm_writes_vector(key->epilogue) ? key->n * size : 0;
  int64_t total = 0, places[PARTS];
  for (int i = 0; i < PARTS; i++) {
    places[i] = total;
    total += qm_ceil_div(b->parts[i].size_bytes, 256) * 256;
  }
  if (cudaMalloc((void **)&b->memory, (size_t)(2 * total) + 256) != cudaSuccess ||
      cudaEventCreate(&b->start) != cudaSuccess || cudaEventCreate(&b->stop) != cudaSuccess)
    return false;
  for (int i = 0; i < PARTS; i++) {
    b->parts[i].first = b->memory + places[i];
    b->parts[i].other = b->memory + total + places[i];
  }
  b->found = (comparison *)(b->memory + 2 * total);
  b->first = b->other = *operands;
  b->first.out = b->parts[OUT].first;
  b->other.out = b->parts[OUT].other;
  if (b->parts[AUX].size_bytes > 0) {
    b->first.aux = b->parts[AUX].first;
    b->other.aux = b->parts[AUX].other;
  }
  if (b->parts[VECTOR].size_bytes > 0) {
    b->first.vector = b->parts[VECTOR].first;
    b->other.vector = b->parts[VECTOR].other;
  }
  return true;
}

static void close_bench(bench *b) {
  cudaFree(b->memory);
  if (b->start != NULL) cudaEventDestroy(b->start);
  if (b->stop != NULL) cudaEventDestroy(b->stop);
  cudaGetLastError(); /* what went wrong here costs speed only */
}

/* Has the part the first one's bits, which are not all 0? */
static bool is_same(qm_cuda *cuda, const bench *b, const part *x) {
  comparison seen = {1, 0};
  const int64_t count = x->size_bytes / 2;
  if (cudaMemsetAsync(b->found, 0, sizeof *b->found, cuda->compute) != cudaSuccess) return false;
  compare<<<qm_blocks(cuda, count, THREADS), THREADS, 0, cuda->compute>>>(
      (const uint16_t *)x->first, (const uint16_t *)x->other, count, b->found);
  cudaMemcpyAsync(&seen, b->found, sizeof seen, cudaMemcpyDeviceToHost, cuda->compute);
  return cudaStreamSynchronize(cuda->compute) == cudaSuccess && !seen.differs && seen.nonzero;
}

/* Does algorithm `index` run, and give what the first one does? */
static bool agrees(qm_cuda *cuda, const qm_gemm_plan *p, int index, const bench *b) {
  if (qm_cuda_gemm_run(cuda, p, index, &b->other) != CUBLAS_STATUS_SUCCESS) return false;
  for (const part &x : b->parts)
    if (x.size_bytes > 0 && !is_same(cuda, b, &x)) return false;
  return true;
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
