/* cross_entropy.cu - loss and gradient of softmax and the negative log-likelihood.
**
** Reference: kernels/reference/cross_entropy.c. A class out of range counts as ignored, and the
** next call that waits says so.
** Method:  blocks stay and take row after row. A row is read once: while one is worked on in shared
**          memory, each thread copies its packs of the next. Rows that do not fit are read twice.
** Cost:    reads and writes the logits once: memory bound. 14 operations an element for both
** passes.
*/
#include "mma.cuh"
#include "row.cuh"

/* One row of the job as all threads of the block see it. */
template <typename T>
struct cross_entropy_row {
  int32_t target; /* -1: ignored */
  float edge;     /* this thread's edge element */
};

template <typename T>
struct cross_entropy_job {
  const T *logits;
  const int32_t *targets;
  const float *factor;
  float *loss;
  T *dlogits;
  int64_t rows, columns, classes;
  float scale;
  int32_t ignore_index;
  qm_cuda_late *late;
};

/* CACHED: a row lies in shared memory. Pack i of a row is always thread i mod blockDim.x's. */
template <bool CACHED, typename T>
static __global__ void __launch_bounds__(1024)
    cross_entropy(const cross_entropy_job<T> job, int32_t slots) {
  constexpr int N = qm_width<T>;
  extern __shared__ uint4 buffers[]; /* [2, slots] */
  __shared__ qm_row_sum partial[2][32];
  __shared__ float chosen[2];
  const int thread = (int)threadIdx.x, threads = (int)blockDim.x;
  const float scale = job.factor == nullptr ? job.scale : job.scale * *job.factor;
  int turn = 0;

  /* Begin to fetch a row into a buffer. */
  const auto fetch = [&](int64_t row, int into) {
    const T *x = job.logits + row * job.columns;
    const qm_row_parts<T> parts(x, job.columns);
    if (CACHED) {
      const T *body = x + parts.head;
      for (int i = thread; i < parts.packs; i += threads)
        qm_copy_async(buffers + into * slots + i, body + (int64_t)i * N, true);
    }
    const int32_t target = job.targets[row];
    bool counts = target != job.ignore_index;
    if (counts && (target < 0 || target >= job.classes)) {
      if (thread == 0) qm_index_fits(job.late, QM_CUDA_OP_cross_entropy, target, job.classes);
      counts = false;
    }
    return cross_entropy_row<T>{counts ? target : -1,
                                thread < parts.edges ? qm_float(x[parts.edge(thread)]) : 0.0f};
  };

  cross_entropy_row<T> now = {}, next = {};
  if (blockIdx.x < job.rows) next = fetch(blockIdx.x, 0);
  qm_copy_commit();
  for (int64_t r = blockIdx.x; r < job.rows; r += gridDim.x, turn ^= 1) {
    now = next;
    if (r + gridDim.x < job.rows) next = fetch(r + gridDim.x, turn ^ 1);
    qm_copy_commit();
    qm_copy_wait<1>();

    const T *x = job.logits + r * job.columns;
    T *out = job.dlogits + r * job.columns;
    const qm_row_parts<T> parts(x, job.columns);
    const bool together = ((uintptr_t)x - (uintptr_t)out) % 16 == 0;
    const uint4 *packs = CACHED ? buffers + turn * slots : (const uint4 *)(x + parts.head);
    const bool counts = now.target >= 0;
    /* The target is an edge, or in the pack of one thread. */
    const int inside = now.target - parts.head;
    const bool in_packs = counts && inside >= 0 && inside < parts.packs * N;
    const bool mine = in_packs ? inside / N % threads == thread
                               : counts && thread < parts.edges && parts.edge(thread) == now.target;

    qm_row_sum row = qm_row_nothing();
    for (int i = thread; i < parts.packs; i += threads) {
      float v[N];
      qm_read<N>((const T *)(packs + i), true, N, v);
      qm_row_add(row, v);
    }
    if (thread < parts.edges) {
      const float v[1] = {now.edge};
      qm_row_add(row, v);
    }
    if (mine) chosen[turn] = in_packs ? qm_float(((const T *)packs)[inside]) : now.edge;
    row = qm_row_block_join(row, partial[turn]);
    if (thread == 0) job.loss[r] = counts ? logf(row.sum) + row.most - chosen[turn] : 0.0f;
    if (job.dlogits == nullptr) continue;

    const float each = counts ? scale / row.sum : 0.0f;
    for (int i = thread; i < parts.packs; i += threads) {
      float v[N] = {};
      if (counts) {
        qm_read<N>((const T *)(packs + i), true, N, v);
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = row.term(v[j]) * each;
      }
      qm_write<N>(out + parts.head + (int64_t)i * N, together, N, v);
    }
    if (thread < parts.edges)
      out[parts.edge(thread)] = qm_as<T>(counts ? row.term(now.edge) * each : 0.0f);
    if (mine) out[now.target] = qm_as<T>(row.term(chosen[turn]) * each - scale);
  }
}

template <bool CACHED, typename T>
static int32_t launch(qm_cuda *cuda, const cross_entropy_job<T> &job, int64_t slots,
                      int32_t threads, int32_t blocks_each) {
  const int64_t most = (int64_t)cuda->multiprocessors * blocks_each;
  const unsigned blocks = (unsigned)(job.rows < most ? job.rows : most);
  const int32_t bytes = CACHED ? (int32_t)(2 * slots * 16) : 0;
  const auto kernel = cross_entropy<CACHED, T>;
  const int32_t status = qm_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "cross_entropy");
  if (status != QM_OK) return status;
  kernel<<<blocks, (unsigned)threads, (size_t)bytes, cuda->compute>>>(job, (int32_t)slots);
  return qm_cuda_launched(cuda, "cross_entropy");
}

int32_t qm_cuda_cross_entropy(void *context, const qm_cross_entropy_args *args) {
  QM_CUDA_ENTER(context);
  if (args->rows == 0) return QM_OK;
  int shared_bytes = 0; /* what a block may have, less what it has statically */
  const int32_t status = qm_cuda_check(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda->index),
      "cross_entropy");
  if (status != QM_OK) return status;
  shared_bytes -= 1024;
  return qm_with_float(args->logits.dtype, [&](auto element) {
    using T = decltype(element);
    const cross_entropy_job<T> job = {(const T *)args->logits.data,
                                      (const int32_t *)args->targets.data,
                                      (const float *)args->factor.data,
                                      (float *)args->loss.data,
                                      (T *)args->dlogits.data,
                                      args->rows,
                                      args->columns,
                                      args->classes,
                                      (float)args->scale,
                                      args->ignore_index,
                                      cuda->late_device};
    const int64_t slots = args->columns / qm_width<T>, bytes = 2 * slots * 16;
    if (bytes > shared_bytes) return launch<false>(cuda, job, slots, 1024, 2);
    const int64_t fit = bytes == 0 ? 4 : shared_bytes / bytes;
    return fit == 1 ? launch<true>(cuda, job, slots, 1024, 1)
                    : launch<true>(cuda, job, slots, 512, fit > 4 ? 4 : (int32_t)fit);
  });
}
