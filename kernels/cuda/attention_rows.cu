/* attention_rows.cu - attention for any element type and head size, a warp to a row: the way where
** the tensor cores' kernels do not go (f32, odd head sizes), and their oracle.
**
** Lanes take keys for the scores and elements of the head for the sums. Online softmax over chunks
** of 32 keys (Dao, arXiv 2307.08691); the gradients of keys gather over queries in order, so that
** nothing depends on timing.
*/
#include "attention.cuh"
#include "attention_rows.h"

enum { WARPS = 4, HEAD_MAX = 1024 };

template <typename T>
static __device__ float dot(const float *a, const T *b, int32_t size) {
  float sum = 0.0f;
  for (int32_t d = 0; d < size; d++) sum = fmaf(a[d], qm_float(b[d]), sum);
  return sum;
}

/* PER_LANE elements of the head to a lane: lane, lane + 32, ... */
template <typename T, int PER_LANE>
static __global__ void attend(qm_attention_shape shape, const T *q, const T *k, const T *v, T *out,
                              float *lse) {
  __shared__ float queries[WARPS][PER_LANE * 32];
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = shape.head_size;
  const int64_t row = (int64_t)blockIdx.x * WARPS + warp;
  if (row >= (int64_t)shape.rows_q * shape.heads) return;
  const int32_t query = (int32_t)(row / shape.heads), head = (int32_t)(row % shape.heads);
  const int32_t kv_head = (int32_t)((int64_t)head * shape.kv_heads / shape.heads);
  const qm_attention_span span =
      qm_attention_span_of(shape, qm_attention_sequence(shape.cu_q, shape.sequences, query));
  int32_t first, end;
  qm_attention_keys(shape, span, query, &first, &end);
  for (int32_t d = lane; d < size; d += 32)
    queries[warp][d] = qm_float(q[query * shape.stride_q + (int64_t)head * size + d]);
  __syncwarp();

  float most = -INFINITY, sum = 0.0f, gathered[PER_LANE] = {};
  for (int32_t chunk = first; chunk < end; chunk += 32) {
    const int32_t key = chunk + lane;
    float score = -INFINITY;
    if (key < end)
      score = shape.scale *
              dot(queries[warp], k + key * shape.stride_k + (int64_t)kv_head * size, size);
    float next = most;
    for (int32_t i = 0; i < 32; i++) { /* not fmaxf, which would lose a NaN */
      const float other = __shfl_sync(0xFFFFFFFFu, score, i);
      if (!(other <= next)) next = other;
    }
    const float keep = next == most ? 1.0f : expf(most - next);
    const float p = key < end ? expf(score - next) : 0.0f;
    sum = fmaf(sum, keep, qm_warp_sum(p));
    for (int32_t i = 0; i < PER_LANE; i++) gathered[i] *= keep;
    for (int32_t j = 0; j < min(32, end - chunk); j++) {
      const float weight = __shfl_sync(0xFFFFFFFFu, p, j);
      const T *value = v + (chunk + j) * shape.stride_v + (int64_t)kv_head * size;
      for (int32_t i = 0; i < PER_LANE; i++)
        if (lane + 32 * i < size)
          gathered[i] = fmaf(weight, qm_float(value[lane + 32 * i]), gathered[i]);
    }
    most = next;
  }
  for (int32_t i = 0; i < PER_LANE; i++)
    if (lane + 32 * i < size)
      out[row * size + lane + 32 * i] = qm_as<T>(first == end ? 0.0f : gathered[i] / sum);
  if (lane == 0) lse[row] = first == end ? -INFINITY : most + logf(sum);
}

/* delta [RQ, H] = dout . out */
template <typename T>
static __global__ void products(const T *dout, const T *out, float *delta, int64_t rows,
                                int32_t size) {
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int32_t d = threadIdx.x % 32; d < size; d += 32)
    sum = fmaf(qm_float(dout[row * size + d]), qm_float(out[row * size + d]), sum);
  sum = qm_warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

template <typename T>
struct gradients {
  const T *dout, *q, *k, *v;
  const float *lse, *delta;
  T *dq, *dk, *dv;
};

/* dq of one query row: dS = P (dP - delta), dq = scale dS k. */
template <typename T, int PER_LANE>
static __global__ void gather_dq(qm_attention_shape shape, gradients<T> g) {
  __shared__ float queries[WARPS][PER_LANE * 32], douts[WARPS][PER_LANE * 32];
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = shape.head_size;
  const int64_t row = (int64_t)blockIdx.x * WARPS + warp;
  if (row >= (int64_t)shape.rows_q * shape.heads) return;
  const int32_t query = (int32_t)(row / shape.heads), head = (int32_t)(row % shape.heads);
  const int64_t kv = (int64_t)head * shape.kv_heads / shape.heads * size;
  const int64_t at = query * shape.stride_q + (int64_t)head * size;
  const qm_attention_span span =
      qm_attention_span_of(shape, qm_attention_sequence(shape.cu_q, shape.sequences, query));
  int32_t first, end;
  qm_attention_keys(shape, span, query, &first, &end);
  for (int32_t d = lane; d < size; d += 32) {
    queries[warp][d] = qm_float(g.q[at + d]);
    douts[warp][d] = qm_float(g.dout[row * size + d]);
  }
  __syncwarp();
  float gathered[PER_LANE] = {};
  for (int32_t chunk = first; chunk < end; chunk += 32) {
    const int32_t key = chunk + lane;
    float ds = 0.0f;
    if (key < end) {
      const float s = shape.scale * dot(queries[warp], g.k + key * shape.stride_k + kv, size);
      const float dp = dot(douts[warp], g.v + key * shape.stride_v + kv, size);
      ds = expf(s - g.lse[row]) * (dp - g.delta[row]) * shape.scale;
    }
    for (int32_t j = 0; j < min(32, end - chunk); j++) {
      const float weight = __shfl_sync(0xFFFFFFFFu, ds, j);
      const T *value = g.k + (chunk + j) * shape.stride_k + kv;
      for (int32_t i = 0; i < PER_LANE; i++)
        if (lane + 32 * i < size)
          gathered[i] = fmaf(weight, qm_float(value[lane + 32 * i]), gathered[i]);
    }
  }
  for (int32_t i = 0; i < PER_LANE; i++)
    if (lane + 32 * i < size) g.dq[at + lane + 32 * i] = qm_as<T>(gathered[i]);
}

/* dk and dv of one key row, over the query heads that share it and the queries that see it. */
template <typename T, int PER_LANE>
static __global__ void gather_dkv(qm_attention_shape shape, gradients<T> g) {
  __shared__ float keys[WARPS][PER_LANE * 32], values[WARPS][PER_LANE * 32];
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = shape.head_size;
  const int64_t row = (int64_t)blockIdx.x * WARPS + warp;
  if (row >= (int64_t)shape.rows_k * shape.kv_heads) return;
  const int32_t key = (int32_t)(row / shape.kv_heads), kv_head = (int32_t)(row % shape.kv_heads);
  const int32_t shared_by = shape.heads / shape.kv_heads;
  const qm_attention_span span =
      qm_attention_span_of(shape, qm_attention_sequence(shape.cu_k, shape.sequences, key));
  const int64_t at_k = key * shape.stride_k + (int64_t)kv_head * size;
  const int64_t at_v = key * shape.stride_v + (int64_t)kv_head * size;
  int32_t first, end;
  qm_attention_queries(shape, span, key, &first, &end);
  for (int32_t d = lane; d < size; d += 32) {
    keys[warp][d] = qm_float(g.k[at_k + d]);
    values[warp][d] = qm_float(g.v[at_v + d]);
  }
  __syncwarp();
  float dk[PER_LANE] = {}, dv[PER_LANE] = {};
  for (int32_t head = kv_head * shared_by; head < (kv_head + 1) * shared_by; head++) {
    for (int32_t chunk = first; chunk < end; chunk += 32) {
      const int32_t query = chunk + lane;
      float p = 0.0f, ds = 0.0f;
      if (query < end) {
        const int64_t of = (int64_t)query * shape.heads + head;
        const T *q = g.q + query * shape.stride_q + (int64_t)head * size;
        p = expf(shape.scale * dot(keys[warp], q, size) - g.lse[of]);
        ds = p * (dot(values[warp], g.dout + of * size, size) - g.delta[of]) * shape.scale;
      }
      for (int32_t j = 0; j < min(32, end - chunk); j++) {
        const float weight = __shfl_sync(0xFFFFFFFFu, p, j),
                    slope = __shfl_sync(0xFFFFFFFFu, ds, j);
        const T *q = g.q + (chunk + j) * shape.stride_q + (int64_t)head * size;
        const T *dout = g.dout + ((int64_t)(chunk + j) * shape.heads + head) * size;
        for (int32_t i = 0; i < PER_LANE; i++)
          if (lane + 32 * i < size) {
            dv[i] = fmaf(weight, qm_float(dout[lane + 32 * i]), dv[i]);
            dk[i] = fmaf(slope, qm_float(q[lane + 32 * i]), dk[i]);
          }
      }
    }
  }
  for (int32_t i = 0; i < PER_LANE; i++)
    if (lane + 32 * i < size) {
      g.dk[at_k + lane + 32 * i] = qm_as<T>(dk[i]);
      g.dv[at_v + lane + 32 * i] = qm_as<T>(dv[i]);
    }
}

/* Call body with the elements of a head that a lane takes, a constant. */
template <typename Body>
static int32_t with_head(int64_t head_size, Body body) {
  if (head_size > HEAD_MAX)
    return qm_cuda_host->fail(QM_E_UNSUPPORTED, "cuda: attention: heads of up to %d, got %lld",
                              (int)HEAD_MAX, (long long)head_size);
  if (head_size <= 64) return body(std::integral_constant<int, 2>{});
  if (head_size <= 128) return body(std::integral_constant<int, 4>{});
  if (head_size <= 256) return body(std::integral_constant<int, 8>{});
  return body(std::integral_constant<int, 32>{});
}

int32_t qm_cuda_attention_rows(qm_cuda *cuda, const qm_attention_args *args) {
  const qm_attention_shape shape = qm_attention_shape_of(args);
  const int64_t blocks = qm_ceil_div(args->rows_q * args->heads, WARPS);
  if (blocks == 0) return QM_OK;
  return qm_with_float(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    return with_head(args->head_size, [&](auto per_lane) {
      attend<T, per_lane.value><<<(unsigned)blocks, WARPS * 32, 0, cuda->compute>>>(
          shape, (const T *)args->q.data, (const T *)args->k.data, (const T *)args->v.data,
          (T *)args->out.data, (float *)args->lse.data);
      return qm_cuda_launched(cuda, "attention");
    });
  });
}

int32_t qm_cuda_attention_delta(qm_cuda *cuda, const qm_attention_backward_args *args,
                                float **delta) {
  const int64_t rows = args->rows_q * args->heads;
  const int32_t status = qm_cuda_scratch(cuda, rows * (int64_t)sizeof **delta, (void **)delta);
  if (status != QM_OK || rows == 0) return status;
  return qm_with_float(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    products<T><<<(unsigned)qm_ceil_div(rows, WARPS), WARPS * 32, 0, cuda->compute>>>(
        (const T *)args->dout.data, (const T *)args->out.data, *delta, rows,
        (int32_t)args->head_size);
    return qm_cuda_launched(cuda, "attention_backward");
  });
}

int32_t qm_cuda_attention_backward_rows(qm_cuda *cuda, const qm_attention_backward_args *args) {
  const qm_attention_shape shape = qm_attention_shape_of(args);
  const int64_t rows_q = args->rows_q * args->heads, rows_k = args->rows_k * args->kv_heads;
  float *delta;
  if (const int32_t status = qm_cuda_attention_delta(cuda, args, &delta)) return status;
  return qm_with_float(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    const gradients<T> g = {(const T *)args->dout.data,
                            (const T *)args->q.data,
                            (const T *)args->k.data,
                            (const T *)args->v.data,
                            (const float *)args->lse.data,
                            delta,
                            (T *)args->dq.data,
                            (T *)args->dk.data,
                            (T *)args->dv.data};
    return with_head(args->head_size, [&](auto per_lane) {
      const unsigned blocks_q = (unsigned)qm_ceil_div(rows_q, WARPS);
      const unsigned blocks_k = (unsigned)qm_ceil_div(rows_k, WARPS);
      if (blocks_q > 0) {
        products<T><<<blocks_q, WARPS * 32, 0, cuda->compute>>>(g.dout, (const T *)args->out.data,
                                                                delta, rows_q, shape.head_size);
        gather_dq<T, per_lane.value><<<blocks_q, WARPS * 32, 0, cuda->compute>>>(shape, g);
      }
      if (blocks_k > 0)
        gather_dkv<T, per_lane.value><<<blocks_k, WARPS * 32, 0, cuda->compute>>>(shape, g);
      return qm_cuda_launched(cuda, "attention_backward");
    });
  });
}
