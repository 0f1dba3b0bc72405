/* attention_softmax.cuh - the online softmax of 16 rows as the tensor cores' accumulators hold
** them: thread l of a warp has rows l / 4 and l / 4 + 8, and of 8 columns the two from 2 (l % 4).
** Source: Dao, FlashAttention-2, arXiv 2307.08691.
*/
#ifndef QM_ATTENTION_SOFTMAX_CUH
#define QM_ATTENTION_SOFTMAX_CUH

#include "attention.cuh"
#include "mma.cuh"

constexpr float QM_LOG2E = 1.44269504088896340736f, QM_LN2 = 0.69314718055994530942f;

/* 2^x to two units in the last place, 0 below 2^-126: what exp2f spends on those smallest numbers
** is more than the exponential itself. */
static __device__ __forceinline__ float qm_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct qm_row_softmax {
  float most[2] = {-INFINITY, -INFINITY}; /* of scale * score * log2 e */
  float sum[2] = {0.0f, 0.0f};            /* over this thread's columns */
};

/* The keys that a row sees: low .. high, moved by slope from row to row. */
typedef struct qm_limits {
  int32_t low, high, low_slope, high_slope;
} qm_limits;

static __device__ __forceinline__ qm_limits qm_limits_of(const qm_attention_shape &shape,
                                                         const qm_attention_span &span,
                                                         int32_t row) {
  const int32_t self = span.k_end - (span.q_end - row); /* the key at the row's position */
  return {shape.window > 0 ? self - shape.window + 1 : span.k_first,
          shape.causal ? self : span.k_end - 1, shape.window > 0, shape.causal};
}
static __device__ __forceinline__ qm_limits qm_limits_at(qm_limits limits, int32_t rows_on) {
  limits.low += rows_on * limits.low_slope;
  limits.high += rows_on * limits.high_slope;
  return limits;
}

/* Hide the scores of those keys, `key` and up, that a thread's rows do not see. */
template <int COLUMNS>
static __device__ __forceinline__ void qm_hide(float (&scores)[COLUMNS][4], int32_t key,
                                               qm_limits seen) {
  const int32_t t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const qm_limits limits = qm_limits_at(seen, 8 * half);
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int32_t at = key + n * 8 + 2 * t + i;
        if (at < limits.low || at > limits.high) scores[n][2 * half + i] = -INFINITY;
      }
  }
}

/* Scores become weights; what was gathered before is to be scaled by `keep`. */
template <int COLUMNS>
static __device__ __forceinline__ void qm_weigh(qm_row_softmax &rows, float (&scores)[COLUMNS][4],
                                                float (&keep)[2], float scale) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
      most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
    most = fmaxf(rows.most[half], most * scale);
    const float base = most == -INFINITY ? 0.0f : most; /* a row that has seen no key yet */
    keep[half] = qm_exp2(rows.most[half] - base);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float &score = scores[n][2 * half + i];
        score = qm_exp2(fmaf(score, scale, -base));
        sum += score;
      }
    rows.sum[half] = fmaf(rows.sum[half], keep[half], sum);
    rows.most[half] = most;
  }
}

template <int COLUMNS>
static __device__ __forceinline__ void qm_scale_rows(float (&acc)[COLUMNS][4],
                                                     const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < COLUMNS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[n][i] *= factor[i / 2];
}

/* All keys are in: the factor that makes weights of the sums, and each row's lse. `row` is the
** first of the thread's two. */
static __device__ __forceinline__ void qm_finish_rows(const qm_row_softmax &rows,
                                                      float (&factor)[2], float *lse,
                                                      const qm_attention_shape &shape, int32_t row,
                                                      int32_t row_end, int32_t head) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    factor[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int32_t query = row + half * 8;
    if (query < row_end && threadIdx.x % 4 == 0)
      lse[(int64_t)query * shape.heads + head] =
          sum == 0.0f ? -INFINITY : (rows.most[half] + log2f(sum)) * QM_LN2;
  }
}

/* A query's lse as qm_differentiate takes it; its weights are all 0 where it saw no key. */
static __device__ __forceinline__ float qm_minus_lse(float lse) {
  return lse == -INFINITY ? -INFINITY : -lse * QM_LOG2E;
}
/* P of a score, whose scale has log2 e in it. */
static __device__ __forceinline__ float qm_weight(float score, float scale, float minus_lse) {
  return qm_exp2(fmaf(score, scale, minus_lse));
}
/* Scores to P, and dP to dS without its scale. lse and delta are those of the query. Negating lse
** here and exp2f keep the registers of attention_mma_backward.cu within what there is. */
static __device__ __forceinline__ void qm_differentiate(float &score, float &slope, float scale,
                                                        float lse, float delta, bool seen) {
  const float p = seen ? exp2f(fmaf(score, scale, -lse * QM_LOG2E)) : 0.0f;
  score = p;
  slope = seen ? p * (slope - delta) : 0.0f;
}

/* Fragment A of 16 columns from 16 step of an accumulator. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void qm_weights_fragment(uint32_t (&a)[4],
                                                           const float (&acc)[COLUMNS][4],
                                                           int step) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = qm_pair<T>(acc[2 * step + i / 2][i % 2 * 2], acc[2 * step + i / 2][i % 2 * 2 + 1]);
}

/* Of 4 lanes side by side, lane t gets word t of each, in the lanes' order. */
static __device__ __forceinline__ void qm_transpose_4(uint32_t (&word)[4]) {
  const int32_t lane = threadIdx.x % 4;
#pragma unroll
  for (int apart = 1; apart <= 2; apart *= 2) {
    const bool upper = (lane & apart) != 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & apart) continue;
      const uint32_t sent = upper ? word[i] : word[i + apart];
      const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, sent, apart);
      if (upper)
        word[i] = got;
      else
        word[i + apart] = got;
    }
  }
}

/* Store an accumulator's 16 rows times factor; rows from `there` on are left out. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void qm_store_rows(T *out, int64_t stride, int32_t there,
                                                     const float (&acc)[COLUMNS][4],
                                                     const float (&factor)[2]) {
  const int32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (g + 8 * half < there)
#pragma unroll
      for (int n = 0; n < COLUMNS; n++)
        *(uint32_t *)(out + (g + 8 * half) * stride + n * 8 + 2 * t) =
            qm_pair<T>(acc[n][2 * half] * factor[half], acc[n][2 * half + 1] * factor[half]);
}

/* The same 16 bytes at a time, for which four lanes exchange words; it takes some registers.
** COLUMNS is a multiple of 4; all lanes must call. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void qm_store_rows_wide(T *out, int64_t stride, int32_t there,
                                                          const float (&acc)[COLUMNS][4],
                                                          const float (&factor)[2]) {
  static_assert(COLUMNS % 4 == 0, "a lane to each of four columns");
  const int32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    T *const row = out + (g + 8 * half) * stride;
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        word[i] = qm_pair<T>(acc[n + i][2 * half] * factor[half],
                             acc[n + i][2 * half + 1] * factor[half]);
      qm_transpose_4(word);
      if (g + 8 * half < there)
        *(uint4 *)(row + (n + t) * 8) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

#endif
