/* attention_few_sums.cuh - attention of few queries: how warps, and blocks that split the keys, add
** up what they have gathered. */
#ifndef QM_ATTENTION_FEW_SUMS_CUH
#define QM_ATTENTION_FEW_SUMS_CUH

#include "attention_softmax.cuh"

enum {
  WARPS = 8,
  THREADS = 32 * WARPS,
  WARP_KEYS = 16,
  TILE = WARPS * WARP_KEYS,
  ROWS_MAX = 64,
  GROUP_MAX = 16, /* query heads to a key head */
  TICKETS = 1024
};

/* One head's sums over some keys. */
template <int D>
struct head_sums {
  float values[D];
  float most, sum; /* of scores times log2 e; of weights */
  float unused[2]; /* so that four values lie side by side where 16 bytes do */
};

/* Splits at most: add_splits keeps two numbers of each in the place of the warps' parts. */
template <int D>
constexpr int64_t splits_most = WARPS * sizeof(head_sums<D>) / (2 * sizeof(float));

/* What a part's sums count for among others, the largest score of all being `most`. */
static __device__ __forceinline__ float share(float part_most, float most) {
  return qm_exp2(part_most - (most == -INFINITY ? 0.0f : most)); /* no key was seen */
}
static __device__ __forceinline__ float lse_of(float most, float sum) {
  return sum == 0.0f ? -INFINITY : (most + log2f(sum)) * QM_LN2;
}

/* The warps' parts, [WARPS][group], added in order: to `whole`, or, where that is NULL, to the end:
** the heads' out and lse. */
template <typename T, int D>
static __device__ __forceinline__ void add_warps(const head_sums<D> *parts, int32_t group,
                                                 head_sums<D> *whole, T *out, float *lse) {
  for (int32_t i = (int32_t)threadIdx.x; i < group * D; i += THREADS) {
    const int32_t head = i / D, d = i % D;
    const head_sums<D> *const mine = parts + head;
    float most = -INFINITY, sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int p = 0; p < WARPS; p++) most = fmaxf(most, mine[p * group].most);
#pragma unroll
    for (int p = 0; p < WARPS; p++) {
      const float keep = share(mine[p * group].most, most);
      sum = fmaf(mine[p * group].sum, keep, sum);
      value = fmaf(mine[p * group].values[d], keep, value);
    }
    if (whole == NULL) {
      out[i] = qm_as<T>(sum == 0.0f ? 0.0f : value / sum);
      if (d == 0) lse[head] = lse_of(most, sum);
      continue;
    }
    __stcg(&whole[head].values[d], value);
    if (d != 0) continue;
    __stcg(&whole[head].most, most);
    __stcg(&whole[head].sum, sum);
  }
}

/* The splits' parts, [count][group] in scratch, added in order. Waiting for them is all that takes
** time, so everything is asked for at once: what they count for by a thread for each, kept in
** `shares`, [group][count] for the largest scores and again for the sums, and four elements of a
** head by several threads, some of the parts each. */
template <typename T, int D>
static __device__ __forceinline__ void add_splits(const head_sums<D> *parts, int32_t count,
                                                  int32_t group, float *shares, T *out,
                                                  float *lse) {
  constexpr int QUADS = D / 4, BATCH = 8;
  __shared__ float4 meeting[THREADS];
  __shared__ float by[GROUP_MAX]; /* 1 / sum of a head's weights */
  const int32_t me = (int32_t)threadIdx.x, lane = me % 32;
  const int32_t quads = group * QUADS, at_once = min(quads, THREADS), slices = THREADS / at_once;
  const int32_t each = (count + slices - 1) / slices, slice = me / at_once;
  const int32_t begin = min(slice * each, count), end = min(begin + each, count);
  float4 part[BATCH];
  const auto ask = [&](int32_t quad, int32_t from) {
    const float *const at = parts[quad / QUADS].values + quad % QUADS * 4;
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (from + i < end)
        part[i] = __ldcg((const float4 *)(at + (from + i) * group * (sizeof *parts / 4)));
  };
  ask(min(me % at_once, quads - 1), begin);

  for (int32_t i = me; i < group * count; i += THREADS) {
    const float2 both = __ldcg((const float2 *)&parts[i % count * group + i / count].most);
    shares[i] = both.x;
    shares[group * count + i] = both.y;
  }
  __syncthreads();
  for (int32_t head = me / 32; head < group; head += WARPS) { /* a warp for each head */
    float *const mine = shares + head * count;
    float most = -INFINITY, sum = 0.0f;
    for (int32_t p = lane; p < count; p += 32) most = fmaxf(most, mine[p]);
    most = qm_warp_max(most);
    for (int32_t p = lane; p < count; p += 32) {
      mine[p] = share(mine[p], most);
      sum = fmaf(mine[group * count + p], mine[p], sum);
    }
    sum = qm_warp_sum(sum);
    if (lane != 0) continue;
    by[head] = sum == 0.0f ? 0.0f : 1.0f / sum;
    lse[head] = lse_of(most, sum);
  }
  __syncthreads();
  for (int32_t first = 0; first < quads; first += at_once) {
    const int32_t quad = min(first + me % at_once, quads - 1), head = quad / QUADS;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int32_t p = begin; p < end; p += BATCH) {
      if (p > begin || first > 0) ask(quad, p);
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (p + i >= end) break;
        const float keep = shares[head * count + p + i];
        sum.x = fmaf(part[i].x, keep, sum.x);
        sum.y = fmaf(part[i].y, keep, sum.y);
        sum.z = fmaf(part[i].z, keep, sum.z);
        sum.w = fmaf(part[i].w, keep, sum.w);
      }
    }
    meeting[me] = sum;
    __syncthreads();
    if (slice == 0 && first + me < quads) {
      for (int32_t j = 1; j < slices; j++) {
        const float4 more = meeting[j * at_once + me];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      *(uint2 *)(out + 4 * quad) = make_uint2(qm_pair<T>(sum.x * by[head], sum.y * by[head]),
                                              qm_pair<T>(sum.z * by[head], sum.w * by[head]));
    }
    __syncthreads();
  }
}

#endif
