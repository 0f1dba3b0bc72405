/* vector.h - loading, storing and exp for loops that the compiler vectorizes.
**
** A kernel works through rows in blocks of f32 on the stack: expand a block, compute, narrow it. */
#ifndef QM_CPU_VECTOR_H
#define QM_CPU_VECTOR_H

#include "cpu/cpu.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

/* Elements a block holds: 2 KiB of f32, so that a handful stays in the first-level cache. */
enum { QM_BLOCK = 512 };
/* Below so many elements, waking the other threads costs more than they bring. */
enum { QM_PARALLEL_MIN = 1 << 14 };
#define QM_MIN(a, b) ((a) < (b) ? (a) : (b))

/* n elements of a float type from data + i to f32, and back. */
static inline void qm_expand(float *restrict out, const void *data, int32_t dtype, int64_t i,
                             int64_t n) {
  if (dtype == QM_F32) {
    memcpy(out, (const float *)data + i, (size_t)n * sizeof *out);
  } else if (dtype == QM_BF16) {
    const uint16_t *restrict x = (const uint16_t *)data + i;
    for (int64_t j = 0; j < n; j++) out[j] = qm_from_bf16(x[j]);
  } else {
    const uint16_t *restrict x = (const uint16_t *)data + i;
    for (int64_t j = 0; j < n; j++) out[j] = qm_from_f16(x[j]);
  }
}
#if defined(__AVX512BW__)
/* qm_to_bf16 of 16 elements, each in the high half of its word. */
static inline __m512i qm_narrow_16(const float *x) {
  const __m512i bits = _mm512_loadu_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __mmask16 nan =
      _mm512_cmp_ps_mask(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(bits), _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(_mm512_add_epi32(bits, half), nan, bits, _mm512_set1_epi32(0x400000));
}
#endif
static inline void qm_narrow_bf16(const float *restrict x, uint16_t *restrict out, int64_t n) {
  int64_t j = 0;
#if defined(__AVX512BW__)
  /* The high halves of two vectors in one instruction, where gcc packs with five. */
  static const uint16_t high[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i order = _mm512_loadu_si512(high);
  for (; j + 32 <= n; j += 32) {
    const __m512i first = qm_narrow_16(x + j), second = qm_narrow_16(x + j + 16);
    _mm512_storeu_si512(out + j, _mm512_permutex2var_epi16(first, order, second));
  }
#endif
  for (; j < n; j++) out[j] = qm_to_bf16(x[j]);
}
static inline void qm_narrow(const float *restrict x, void *data, int32_t dtype, int64_t i,
                             int64_t n) {
  if (dtype == QM_F32) {
    memcpy((float *)data + i, x, (size_t)n * sizeof *x);
  } else if (dtype == QM_BF16) {
    qm_narrow_bf16(x, (uint16_t *)data + i, n);
  } else {
    uint16_t *restrict out = (uint16_t *)data + i;
    for (int64_t j = 0; j < n; j++) out[j] = qm_to_f16(x[j]);
  }
}

/* The elements of a float array as f32: where they lie, or expanded into the buffer. */
static inline const float *qm_floats(const qm_array *x, int64_t i, int64_t n, float *buffer) {
  if (x->dtype == QM_F32) return (const float *)x->data + i;
  qm_expand(buffer, x->data, x->dtype, i, n);
  return buffer;
}
/* Where to put f32 results for a float array: in place, or the buffer, which qm_stored narrows. */
static inline float *qm_target(const qm_array *out, int64_t i, float *buffer) {
  return out->dtype == QM_F32 ? (float *)out->data + i : buffer;
}
static inline void qm_stored(const qm_array *out, int64_t i, int64_t n, const float *buffer) {
  if (out->dtype != QM_F32) qm_narrow(buffer, out->data, out->dtype, i, n);
}

/* The largest of n, -infinity for none; NaN is passed over. In lanes, for clang will not vectorize
** a maximum that must heed NaN. */
static inline float qm_largest(const float *x, int64_t n) {
  enum { LANES = 32 };
  const int64_t whole = n / LANES * LANES;
  float lanes[LANES];
  for (int32_t lane = 0; lane < LANES; lane++) lanes[lane] = -__builtin_inff();
  for (int64_t i = 0; i < whole; i += LANES)
    for (int32_t lane = 0; lane < LANES; lane++)
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  for (int64_t i = whole; i < n; i++)
    lanes[i - whole] = x[i] > lanes[i - whole] ? x[i] : lanes[i - whole];
  for (int32_t width = LANES / 2; width > 0; width /= 2)
    for (int32_t lane = 0; lane < width; lane++)
      lanes[lane] = lanes[lane + width] > lanes[lane] ? lanes[lane + width] : lanes[lane];
  return lanes[0];
}

/* exp to 2 ulp over the range where it is a normal number, 0 below and infinity above it.
** exp(x) = 2^n exp(r), |r| <= ln 2 / 2, by a degree-6 polynomial (Cephes' expf). */
static inline float qm_expf(float x) {
  const float low = -87.3f, high = 88.7f;
  const float clamped = x < low ? low : x > high ? high : x;
  const float n = __builtin_rintf(clamped * 1.44269504088896341f);
  float r = QM_FMA(n, -0.693359375f, clamped);
  r = QM_FMA(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = QM_FMA(p, r, 1.3981999507e-3f);
  p = QM_FMA(p, r, 8.3334519073e-3f);
  p = QM_FMA(p, r, 4.1665795894e-2f);
  p = QM_FMA(p, r, 1.6666665459e-1f);
  p = QM_FMA(p, r, 5.0000001201e-1f);
  p = QM_FMA(p, r * r, r + 1.0f);
  const float scaled = p * qm_bits_float((uint32_t)((int32_t)n + 127) << 23);
  const float finite = x < low ? 0.0f : scaled;
  return x > high ? __builtin_inff() : x == x ? finite : x;
}

#endif
