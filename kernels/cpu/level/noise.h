/* noise.h - Philox words for a run of elements, a batch of blocks at a time: the bits of qm_bits.
**
** Measured on one Sapphire Rapids core, words per ns: v4 2.9, v3 1.2, base 0.8; one by one 0.5. */
#ifndef QM_CPU_NOISE_H
#define QM_CPU_NOISE_H

#include "cpu/cpu.h"

/* The multiplication of 32-bit numbers to 64 bits wants each number in a 64-bit lane of its own,
** and gcc 12 does not come upon that by itself. What a round leaves in a lane's upper half is never
** looked at. Four vectors at once hide the multiplier's latency. */
#if defined(__AVX512F__)
#include <immintrin.h>
enum { QM_NOISE_LANES = 8, QM_NOISE_VECTORS = 4 };
typedef __m512i qm_noise_vector;
static inline qm_noise_vector qm_noise_splat(uint32_t x) { return _mm512_set1_epi64(x); }
static inline qm_noise_vector qm_noise_first(uint64_t block) {
  return _mm512_add_epi64(_mm512_set1_epi64((int64_t)block),
                          _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline qm_noise_vector qm_noise_multiply(qm_noise_vector a, qm_noise_vector b) {
  return _mm512_mul_epu32(a, b);
}
static inline qm_noise_vector qm_noise_high(qm_noise_vector a) { return _mm512_srli_epi64(a, 32); }
/* low, then high, in the halves of each lane */
static inline qm_noise_vector qm_noise_join(qm_noise_vector low, qm_noise_vector high) {
  return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}
static inline void qm_noise_interleave(uint32_t *out, qm_noise_vector even, qm_noise_vector odd) {
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(even, first, odd));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(even, second, odd));
}
#elif defined(__AVX2__)
#include <immintrin.h>
enum { QM_NOISE_LANES = 4, QM_NOISE_VECTORS = 4 };
typedef __m256i qm_noise_vector;
static inline qm_noise_vector qm_noise_splat(uint32_t x) { return _mm256_set1_epi64x(x); }
static inline qm_noise_vector qm_noise_first(uint64_t block) {
  return _mm256_add_epi64(_mm256_set1_epi64x((int64_t)block), _mm256_setr_epi64x(0, 1, 2, 3));
}
static inline qm_noise_vector qm_noise_multiply(qm_noise_vector a, qm_noise_vector b) {
  return _mm256_mul_epu32(a, b);
}
static inline qm_noise_vector qm_noise_high(qm_noise_vector a) { return _mm256_srli_epi64(a, 32); }
/* low, then high, in the halves of each lane */
static inline qm_noise_vector qm_noise_join(qm_noise_vector low, qm_noise_vector high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
static inline void qm_noise_interleave(uint32_t *out, qm_noise_vector even, qm_noise_vector odd) {
  const __m256i low = _mm256_unpacklo_epi64(even, odd), high = _mm256_unpackhi_epi64(even, odd);
  _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256((__m256i *)(out + 8), _mm256_permute2x128_si256(low, high, 0x31));
}
#else
enum { QM_NOISE_LANES = 32, QM_NOISE_VECTORS = 1 };
#endif

/* Blocks, and words of four to a block, that one batch makes. */
enum { QM_NOISE_BLOCKS = QM_NOISE_LANES * QM_NOISE_VECTORS, QM_NOISE_WORDS = 4 * QM_NOISE_BLOCKS };

/* The words of QM_NOISE_BLOCKS blocks from `block` on. */
static inline void qm_noise_batch(uint32_t *out, const qm_noise *noise, uint64_t block) {
  uint32_t key0 = noise->seed, key1 = noise->parameter;
#if defined(__AVX2__)
  qm_noise_vector c0[QM_NOISE_VECTORS], c1[QM_NOISE_VECTORS];
  qm_noise_vector c2[QM_NOISE_VECTORS], c3[QM_NOISE_VECTORS];
  const qm_noise_vector m0 = qm_noise_splat(0xD2511F53u), m1 = qm_noise_splat(0xCD9E8D57u);
#pragma GCC unroll 4
  for (int32_t i = 0; i < QM_NOISE_VECTORS; i++) {
    c0[i] = qm_noise_first(block + (uint64_t)(i * QM_NOISE_LANES));
    c1[i] = qm_noise_high(c0[i]);
    c2[i] = qm_noise_splat(noise->step);
    c3[i] = qm_noise_splat(noise->stream);
  }
#pragma GCC unroll 10
  for (int32_t round = 0; round < 10; round++) {
    const qm_noise_vector k0 = qm_noise_splat(key0), k1 = qm_noise_splat(key1);
#pragma GCC unroll 4
    for (int32_t i = 0; i < QM_NOISE_VECTORS; i++) {
      const qm_noise_vector p0 = qm_noise_multiply(c0[i], m0), p1 = qm_noise_multiply(c2[i], m1);
      c0[i] = qm_noise_high(p1) ^ c1[i] ^ k0;
      c1[i] = p1;
      c2[i] = qm_noise_high(p0) ^ c3[i] ^ k1;
      c3[i] = p0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
#pragma GCC unroll 4
  for (int32_t i = 0; i < QM_NOISE_VECTORS; i++)
    qm_noise_interleave(out + 4 * i * QM_NOISE_LANES, qm_noise_join(c0[i], c1[i]),
                        qm_noise_join(c2[i], c3[i]));
#else
  uint32_t c0[QM_NOISE_LANES], c1[QM_NOISE_LANES], c2[QM_NOISE_LANES], c3[QM_NOISE_LANES];
  for (int32_t i = 0; i < QM_NOISE_LANES; i++) {
    const uint64_t at = block + (uint64_t)i;
    c0[i] = (uint32_t)at;
    c1[i] = (uint32_t)(at >> 32);
    c2[i] = noise->step;
    c3[i] = noise->stream;
  }
  for (int32_t round = 0; round < 10; round++) {
    for (int32_t i = 0; i < QM_NOISE_LANES; i++) {
      const uint64_t p0 = (uint64_t)0xD2511F53u * c0[i], p1 = (uint64_t)0xCD9E8D57u * c2[i];
      c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ key0;
      c1[i] = (uint32_t)p1;
      c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ key1;
      c3[i] = (uint32_t)p0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int32_t i = 0; i < QM_NOISE_LANES; i++) {
    out[4 * i] = c0[i];
    out[4 * i + 1] = c1[i];
    out[4 * i + 2] = c2[i];
    out[4 * i + 3] = c3[i];
  }
#endif
}

/* out[i] = qm_bits(noise, start + i) for i < count. Any start will do; multiples of 4, and counts
** of QM_NOISE_WORDS (at most 128) at a time, are fastest. */
static inline void qm_noise_words(uint32_t *restrict out, const qm_noise *noise, uint64_t start,
                                  int64_t count) {
  const qm_noise key = *noise;
  for (int64_t i = 0; i < count;) {
    const uint64_t element = start + (uint64_t)i;
    const int64_t skip = (int64_t)(element & 3), left = count - i;
    if (skip == 0 && left >= QM_NOISE_WORDS) {
      qm_noise_batch(out + i, &key, element >> 2);
      i += QM_NOISE_WORDS;
    } else {
      uint32_t words[QM_NOISE_WORDS];
      const int64_t room = QM_NOISE_WORDS - skip, n = left < room ? left : room;
      qm_noise_batch(words, &key, element >> 2);
      memcpy(out + i, words + skip, (size_t)n * sizeof *words);
      i += n;
    }
  }
}

#endif
