/* simd.h - one vector of f32 as the level has them, for kernels whose registers must be planned.
**
** Compiler vectors (gcc 12, clang 14) where they do; intrinsics for what C cannot say.
*/
#ifndef QM_CPU_SIMD_H
#define QM_CPU_SIMD_H

#include "vector.h"

#if defined(__AVX512F__)
#include <immintrin.h>
enum { QM_LANES = 16 };
#define QM_INTERLEAVE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define QM_INTERLEAVE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
enum { QM_LANES = 8 };
#define QM_INTERLEAVE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define QM_INTERLEAVE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { QM_LANES = 4 };
#define QM_INTERLEAVE_LOW 0, 4, 1, 5
#define QM_INTERLEAVE_HIGH 2, 6, 3, 7
#endif

#define QM_ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float qm_vec __attribute__((vector_size(4 * QM_LANES)));
typedef int32_t qm_ivec __attribute__((vector_size(4 * QM_LANES)));
typedef float qm_vec_anywhere __attribute__((vector_size(4 * QM_LANES), aligned(4), may_alias));

QM_ALWAYS_INLINE qm_vec qm_vec_load(const float *x) { return *(const qm_vec_anywhere *)x; }
QM_ALWAYS_INLINE void qm_vec_store(float *out, qm_vec x) { *(qm_vec_anywhere *)out = x; }
QM_ALWAYS_INLINE qm_vec qm_vec_splat(float x) { return x - (qm_vec){0}; }

/* a * b + c, rounded once where the level can. */
QM_ALWAYS_INLINE qm_vec qm_vec_fma(qm_vec a, qm_vec b, qm_vec c) {
#if defined(__AVX512F__)
  return (qm_vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (qm_vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

QM_ALWAYS_INLINE qm_vec qm_vec_select(qm_ivec mask, qm_vec yes, qm_vec no) {
  return (qm_vec)((mask & (qm_ivec)yes) | (~mask & (qm_ivec)no));
}

/* The larger, and b where one of them is NaN. */
QM_ALWAYS_INLINE qm_vec qm_vec_max(qm_vec a, qm_vec b) {
#if defined(__AVX512F__)
  return (qm_vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
  return (qm_vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return qm_vec_select((qm_ivec)(a > b), a, b);
#endif
}

QM_ALWAYS_INLINE float qm_vec_largest(qm_vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float largest = x[0];
  for (int32_t i = 1; i < QM_LANES; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

QM_ALWAYS_INLINE float qm_vec_sum(qm_vec x) {
  float sum = 0.0f;
  for (int32_t i = 0; i < QM_LANES; i++) sum += x[i];
  return sum;
}

/* 2^x to 2 ulp for x <= 127; 0 below -127; NaN stays. 2^x = 2^n 2^r, |r| <= 1/2: adding 1.5 * 2^23
** rounds x to n and leaves n in the low bits, and 2^r is a Taylor polynomial in r ln 2 of degree 7
** (remainder below 2^-28). */
QM_ALWAYS_INLINE qm_vec qm_vec_exp2(qm_vec x) {
  const float magic = 12582912.0f;
  x = qm_vec_max(qm_vec_splat(-127.0f), x);
  const qm_vec shifted = x + magic, r = x - (shifted - magic);
  qm_vec p = qm_vec_splat(1.5252734e-5f);
  p = qm_vec_fma(p, r, qm_vec_splat(1.5403530e-4f));
  p = qm_vec_fma(p, r, qm_vec_splat(1.3333558e-3f));
  p = qm_vec_fma(p, r, qm_vec_splat(9.6181291e-3f));
  p = qm_vec_fma(p, r, qm_vec_splat(5.5504109e-2f));
  p = qm_vec_fma(p, r, qm_vec_splat(2.4022651e-1f));
  p = qm_vec_fma(p, r, qm_vec_splat(6.9314718e-1f));
  p = qm_vec_fma(p, r, qm_vec_splat(1.0f));
  return (qm_vec)((qm_ivec)p + ((qm_ivec)shifted << 23));
}

/* 1 / x to 1 ulp for normal x with a normal inverse. A division of 16 lanes takes 16 cycles, so
** there an estimate of 14 bits and one step of Newton's take its place. */
QM_ALWAYS_INLINE qm_vec qm_vec_reciprocal(qm_vec x) {
#if defined(__AVX512F__)
  const qm_vec estimate = (qm_vec)_mm512_rcp14_ps((__m512)x);
  return qm_vec_fma(estimate, qm_vec_fma(-x, estimate, qm_vec_splat(1.0f)), estimate);
#else
  return 1.0f / x;
#endif
}

/* 1 / (1 + e^-x); not below 2^-126, NaN stays. */
QM_ALWAYS_INLINE qm_vec qm_vec_sigmoid(qm_vec x) {
  const qm_vec power = qm_vec_max(qm_vec_splat(-126.0f), x * 1.44269504f);
  return qm_vec_reciprocal(1.0f + qm_vec_exp2(-power));
}

/* out's row i = x's column i, QM_LANES of each: log2(QM_LANES) rounds of interleaving row i with
** row i + QM_LANES / 2. */
QM_ALWAYS_INLINE void qm_vec_transpose(const float *x, int64_t x_stride, float *out,
                                       int64_t out_stride) {
  qm_vec rows[QM_LANES], mixed[QM_LANES];
#pragma GCC unroll 16
  for (int32_t i = 0; i < QM_LANES; i++) rows[i] = qm_vec_load(x + i * x_stride);
#pragma GCC unroll 4
  for (int32_t width = QM_LANES; width > 1; width /= 2) {
#pragma GCC unroll 16
    for (int32_t i = 0; i < QM_LANES / 2; i++) {
      mixed[2 * i] = __builtin_shufflevector(rows[i], rows[i + QM_LANES / 2], QM_INTERLEAVE_LOW);
      mixed[2 * i + 1] =
          __builtin_shufflevector(rows[i], rows[i + QM_LANES / 2], QM_INTERLEAVE_HIGH);
    }
#pragma GCC unroll 16
    for (int32_t i = 0; i < QM_LANES; i++) rows[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int32_t i = 0; i < QM_LANES; i++) qm_vec_store(out + i * out_stride, rows[i]);
}

#endif
