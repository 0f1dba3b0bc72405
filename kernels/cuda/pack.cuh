/* pack.cuh - N elements at a time as floats: one access of up to 16 bytes where they lie
** aligned. */
#ifndef QM_PACK_CUH
#define QM_PACK_CUH

#include "device.cuh"

/* Elements of an access of 16 bytes. */
template <typename T>
constexpr int qm_width = 16 / (int)sizeof(T);

template <typename T>
__device__ __forceinline__ void qm_unpack_word(uint32_t word, float *v);
template <>
__device__ __forceinline__ void qm_unpack_word<float>(uint32_t word, float *v) {
  v[0] = __uint_as_float(word);
}
template <>
__device__ __forceinline__ void qm_unpack_word<__nv_bfloat16>(uint32_t word, float *v) {
  v[0] = __uint_as_float(word << 16);
  v[1] = __uint_as_float(word & 0xFFFF0000u);
}
template <>
__device__ __forceinline__ void qm_unpack_word<__half>(uint32_t word, float *v) {
  const float2 pair = __half22float2(*(const __half2 *)&word);
  v[0] = pair.x;
  v[1] = pair.y;
}

template <typename T>
__device__ __forceinline__ uint32_t qm_pack_word(const float *v);
template <>
__device__ __forceinline__ uint32_t qm_pack_word<float>(const float *v) {
  return __float_as_uint(v[0]);
}
template <>
__device__ __forceinline__ uint32_t qm_pack_word<__nv_bfloat16>(const float *v) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v[0], v[1]);
  return *(const uint32_t *)&pair;
}
template <>
__device__ __forceinline__ uint32_t qm_pack_word<__half>(const float *v) {
  const __half2 pair = __floats2half2_rn(v[0], v[1]);
  return *(const uint32_t *)&pair;
}

/* Words that move as one access. */
template <int WORDS>
struct alignas(WORDS < 4 ? 4 * WORDS : 16) qm_words {
  uint32_t at[WORDS];
};

template <typename T, int WORDS>
__device__ __forceinline__ void qm_unpack(const qm_words<WORDS> &words, float *v) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) qm_unpack_word<T>(words.at[i], v + i * (4 / (int)sizeof(T)));
}
template <typename T, int WORDS>
__device__ __forceinline__ qm_words<WORDS> qm_repack(const float *v) {
  qm_words<WORDS> words;
#pragma unroll
  for (int i = 0; i < WORDS; i++) words.at[i] = qm_pack_word<T>(v + i * (4 / (int)sizeof(T)));
  return words;
}

/* v = x[0 .. N-1]. `whole`: all are there and x is aligned to the pack (to 16 bytes at most); else
** the first `left` are read one by one, and the rest is `missing`. */
template <int N, typename T>
__device__ __forceinline__ void qm_read(const T *x, bool whole, int64_t left, float (&v)[N],
                                        float missing = 0.0f) {
  constexpr int WORDS = N * sizeof(T) >= 4 ? N * (int)sizeof(T) / 4 : 1;
  if (whole && N * sizeof(T) >= 4) {
    const qm_words<WORDS> words = *(const qm_words<WORDS> *)x; /* by reference: a load a word */
    qm_unpack<T>(words, v);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = i < left ? qm_float(x[i]) : missing;
  }
}
template <int N, typename T>
__device__ __forceinline__ void qm_write(T *out, bool whole, int64_t left, const float (&v)[N]) {
  constexpr int WORDS = N * sizeof(T) >= 4 ? N * (int)sizeof(T) / 4 : 1;
  if (whole && N * sizeof(T) >= 4) {
    *(qm_words<WORDS> *)out = qm_repack<T, WORDS>(v);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < left) out[i] = qm_as<T>(v[i]);
  }
}

/* Can packs of N elements from x on be read at once, as qm_read wants? */
template <int N, typename T>
static inline bool qm_packs(const T *x) {
  const int64_t bytes = N * (int64_t)sizeof(T);
  return qm_aligned(x, bytes < 16 ? bytes : 16);
}

/* ---- maps: a block does MAP_TILES packs of N for each of its threads ---- */

enum { QM_MAP_THREADS = 256, QM_MAP_TILES = 2 };

/* out = op(x), element by element; x and out may be one. */
template <int N, typename From, typename To, typename Op>
__global__ void __launch_bounds__(QM_MAP_THREADS)
    qm_map_kernel(const From *x, To *out, int64_t count, bool packs, Op op) {
  const int64_t first = ((int64_t)blockIdx.x * (QM_MAP_TILES * QM_MAP_THREADS) + threadIdx.x) * N;
  float v[QM_MAP_TILES][N];
#pragma unroll
  for (int tile = 0; tile < QM_MAP_TILES; tile++) {
    const int64_t i = first + tile * (QM_MAP_THREADS * N);
    qm_read<N>(x + i, packs && i + N <= count, count - i, v[tile]);
  }
#pragma unroll
  for (int tile = 0; tile < QM_MAP_TILES; tile++) {
#pragma unroll
    for (int j = 0; j < N; j++) v[tile][j] = op(v[tile][j]);
    const int64_t i = first + tile * (QM_MAP_THREADS * N);
    qm_write<N>(out + i, packs && i + N <= count, count - i, v[tile]);
  }
}

template <typename From, typename To, typename Op>
int32_t qm_map(qm_cuda *cuda, const char *name, const void *x, void *out, int64_t count, Op op) {
  constexpr int N = sizeof(From) > sizeof(To) ? qm_width<From> : qm_width<To>;
  if (count == 0) return QM_OK;
  const bool packs = qm_packs<N>((const From *)x) && qm_packs<N>((To *)out);
  const int64_t blocks = qm_ceil_div(count, (int64_t)N * QM_MAP_THREADS * QM_MAP_TILES);
  qm_map_kernel<N><<<(unsigned)blocks, QM_MAP_THREADS, 0, cuda->compute>>>(
      (const From *)x, (To *)out, count, packs, op);
  return qm_cuda_launched(cuda, name);
}

#endif
