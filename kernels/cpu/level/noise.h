/* noise.h - Philox words for a run of elements, many blocks at a time: the same bits as qm_bits.
**
** A 64-bit lane holds one counter word of one block, so that the 32 x 32 -> 64 bit product is one
** instruction; it ignores the upper half of a lane, which may hold anything.
*/
#ifndef QM_CPU_NOISE_H
#define QM_CPU_NOISE_H

#include "cpu/cpu.h"

#if defined(__AVX512F__)
#include <immintrin.h>
enum { QM_NOISE_LANES = 8 };
typedef __m512i qm_noise_vec;
#define QM_NOISE_SPLAT(x) _mm512_set1_epi64((int64_t)(x))
#define QM_NOISE_COUNT _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)
#define QM_NOISE_ADD(a, b) _mm512_add_epi64(a, b)
#define QM_NOISE_MUL(a, b) _mm512_mul_epu32(a, b)
#define QM_NOISE_HIGH(a) _mm512_shuffle_epi32(a, (_MM_PERM_ENUM)0xF5)
#define QM_NOISE_XOR3(a, b, c) _mm512_ternarylogic_epi64(a, b, c, 0x96)
#elif defined(__AVX2__)
#include <immintrin.h>
enum { QM_NOISE_LANES = 4 };
typedef __m256i qm_noise_vec;
#define QM_NOISE_SPLAT(x) _mm256_set1_epi64x((int64_t)(x))
#define QM_NOISE_COUNT _mm256_set_epi64x(3, 2, 1, 0)
#define QM_NOISE_ADD(a, b) _mm256_add_epi64(a, b)
#define QM_NOISE_MUL(a, b) _mm256_mul_epu32(a, b)
#define QM_NOISE_HIGH(a) _mm256_shuffle_epi32(a, 0xF5)
#define QM_NOISE_XOR3(a, b, c) _mm256_xor_si256(_mm256_xor_si256(a, b), c)
#elif defined(__SSE2__)
#include <emmintrin.h>
enum { QM_NOISE_LANES = 2 };
typedef __m128i qm_noise_vec;
#define QM_NOISE_SPLAT(x) _mm_set1_epi64x((int64_t)(x))
#define QM_NOISE_COUNT _mm_set_epi64x(1, 0)
#define QM_NOISE_ADD(a, b) _mm_add_epi64(a, b)
#define QM_NOISE_MUL(a, b) _mm_mul_epu32(a, b)
#define QM_NOISE_HIGH(a) _mm_shuffle_epi32(a, 0xF5)
#define QM_NOISE_XOR3(a, b, c) _mm_xor_si128(_mm_xor_si128(a, b), c)
#else
enum { QM_NOISE_LANES = 1 };
#endif

#ifdef QM_NOISE_MUL
/* Words 0 .. 3 of each block, in the low halves of a .. d, to memory in order. */
static inline void qm_noise_store(uint32_t *out, qm_noise_vec a, qm_noise_vec b, qm_noise_vec c,
                                  qm_noise_vec d) {
#if defined(__AVX512F__)
  const __m512i ab = _mm512_mask_shuffle_epi32(a, 0xAAAA, b, (_MM_PERM_ENUM)0xA0);
  const __m512i cd = _mm512_mask_shuffle_epi32(c, 0xAAAA, d, (_MM_PERM_ENUM)0xA0);
  const __m512i low = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const __m512i high = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(ab, low, cd));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(ab, high, cd));
#elif defined(__AVX2__)
  const __m256i ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA);
  const __m256i cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xAA);
  const __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
  _mm256_storeu_si256((__m256i *)(void *)out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256((__m256i *)(void *)(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
#else
  const __m128i low = _mm_set1_epi64x(0xFFFFFFFF);
  const __m128i ab = _mm_or_si128(_mm_and_si128(a, low), _mm_slli_epi64(b, 32));
  const __m128i cd = _mm_or_si128(_mm_and_si128(c, low), _mm_slli_epi64(d, 32));
  _mm_storeu_si128((__m128i *)(void *)out, _mm_unpacklo_epi64(ab, cd));
  _mm_storeu_si128((__m128i *)(void *)(out + 4), _mm_unpackhi_epi64(ab, cd));
#endif
}

/* QM_NOISE_LANES whole blocks from `first` on. The rounds are philox.h's. */
static inline void qm_noise_vector(uint32_t *out, const qm_noise *noise, uint64_t first) {
  const qm_noise_vec m0 = QM_NOISE_SPLAT(0xD2511F53u), m1 = QM_NOISE_SPLAT(0xCD9E8D57u);
  const qm_noise_vec block = QM_NOISE_ADD(QM_NOISE_SPLAT(first), QM_NOISE_COUNT);
  qm_noise_vec a = block, b = QM_NOISE_HIGH(block);
  qm_noise_vec c = QM_NOISE_SPLAT(noise->step), d = QM_NOISE_SPLAT(noise->stream);
  uint32_t key0 = noise->seed, key1 = noise->parameter;
  for (int round = 0; round < 10; round++) {
    const qm_noise_vec p0 = QM_NOISE_MUL(m0, a), p1 = QM_NOISE_MUL(m1, c);
    a = QM_NOISE_XOR3(QM_NOISE_HIGH(p1), b, QM_NOISE_SPLAT(key0));
    b = p1;
    c = QM_NOISE_XOR3(QM_NOISE_HIGH(p0), d, QM_NOISE_SPLAT(key1));
    d = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  qm_noise_store(out, a, b, c, d);
}
#endif

/* Words of the whole Philox blocks first, first + 1, ...: four each. */
static inline void qm_noise_blocks(uint32_t *restrict out, const qm_noise *noise, uint64_t first,
                                   int64_t block_count) {
  const qm_noise key = *noise;
  int64_t i = 0;
#ifdef QM_NOISE_MUL
  for (; i + QM_NOISE_LANES <= block_count; i += QM_NOISE_LANES)
    qm_noise_vector(out + 4 * i, &key, first + (uint64_t)i);
#endif
  for (; i < block_count; i++) {
    uint32_t words[4];
    qm_philox(&key, first + (uint64_t)i, words);
    memcpy(out + 4 * i, words, sizeof words);
  }
}

/* out[i] = qm_bits(noise, start + i) for i < count. Any start will do; multiples of 4 are fastest. */
static inline void qm_noise_words(uint32_t *restrict out, const qm_noise *noise, uint64_t start,
                                  int64_t count) {
  int64_t i = 0;
  for (; i < count && ((start + (uint64_t)i) & 3) != 0; i++)
    out[i] = qm_bits(noise, start + (uint64_t)i);
  const int64_t block_count = (count - i) / 4;
  qm_noise_blocks(out + i, noise, (start + (uint64_t)i) >> 2, block_count);
  for (i += 4 * block_count; i < count; i++) out[i] = qm_bits(noise, start + (uint64_t)i);
}

#endif
