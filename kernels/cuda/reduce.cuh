/* reduce.cuh - what a reduction gathers. Any order of the parts gives the same bits for the
** largest and
** its place; sums are f64 over short f32 sums of a pack, in an order that only shapes decide. */
#ifndef QM_REDUCE_CUH
#define QM_REDUCE_CUH

#include "pack.cuh"

struct qm_sum_state {
  double sum;
  __device__ __forceinline__ static qm_sum_state none() { return {0.0}; }
  __device__ __forceinline__ void one(float x, int64_t) { sum += (double)x; }
  template <int N>
  __device__ __forceinline__ void pack(const float (&v)[N], int64_t, int = 1) {
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) part += v[i];
    sum += (double)part;
  }
  __device__ __forceinline__ void join(const qm_sum_state &other) { sum += other.sum; }
  __device__ __forceinline__ qm_sum_state from_lane(int offset) const {
    qm_sum_state other;
    other.sum = __shfl_down_sync(0xFFFFFFFFu, sum, offset);
    return other;
  }
  __device__ __forceinline__ double value() const { return sum; }
};

/* The largest or smallest and where the first of them stands; a NaN wins, the first of them. */
template <int OP>
struct qm_best_state {
  float best;
  int64_t at; /* -1: nothing yet */
  __device__ __forceinline__ static qm_best_state none() { return {0.0f, -1}; }
  __device__ __forceinline__ static bool beats(float x, float y) {
    return x != x ? y == y : OP == QM_MIN ? x < y : x > y;
  }
  __device__ __forceinline__ void one(float x, int64_t i) {
    /* Elements come in ascending order. */
    if (at < 0 || beats(x, best)) {
      best = x;
      at = i;
    }
  }
  template <int N>
  __device__ __forceinline__ void pack(const float (&v)[N], int64_t i, int step = 1) {
#pragma unroll
    for (int j = 0; j < N; j++) one(v[j], i + j * step);
  }
  __device__ __forceinline__ void join(const qm_best_state &other) {
    if (other.at < 0) return;
    const bool equal = !beats(other.best, best) && !beats(best, other.best);
    if (at < 0 || beats(other.best, best) || (equal && other.at < at)) *this = other;
  }
  __device__ __forceinline__ qm_best_state from_lane(int offset) const {
    qm_best_state other;
    other.best = __shfl_down_sync(0xFFFFFFFFu, best, offset);
    other.at = __shfl_down_sync(0xFFFFFFFFu, at, offset);
    return other;
  }
  __device__ __forceinline__ double value() const { return (double)best; }
};

template <int OP>
struct qm_state_of {
  using type = qm_sum_state;
};
template <>
struct qm_state_of<QM_MAX> {
  using type = qm_best_state<QM_MAX>;
};
template <>
struct qm_state_of<QM_MIN> {
  using type = qm_best_state<QM_MIN>;
};
template <>
struct qm_state_of<QM_ARGMAX> {
  using type = qm_best_state<QM_ARGMAX>;
};

/* The first of every `lanes` neighbours gets what they have; all 32 call. */
template <typename State>
__device__ __forceinline__ void qm_warp_join(State &state, int lanes = 32) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) state.join(state.from_lane(offset));
}

#endif
