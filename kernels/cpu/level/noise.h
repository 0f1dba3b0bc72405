/* noise.h - Philox words for a run of elements, a batch of blocks at a time: the bits of qm_bits.
**
** Measured on one Sapphire Rapids core, words per ns: v4 3.4, v3 1.6, base 0.8; one by one 0.5. */
#ifndef QM_CPU_NOISE_H
#define QM_CPU_NOISE_H

#include "cpu/cpu.h"

/* The multiplication of 32-bit numbers to 64 bits wants each number in a 64-bit lane of its own,
** and gcc 12 does not come upon that by itself. What a round leaves in a lane's upper half is never
** looked at. */
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
enum { QM_NOISE_LANES = 8, QM_NOISE_VECTORS = 4 };
typedef __m512i qm_noise_vector;
static inline qm_noise_vector qm_noise_splat(uint64_t x) { return _mm512_set1_epi64((int64_t)x); }
static inline qm_noise_vector qm_noise_add(qm_noise_vector a, uint64_t b) {
  return _mm512_add_epi64(a, qm_noise_splat(b));
}
static inline qm_noise_vector qm_noise_first(uint64_t block) {
  return qm_noise_add(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), block);
}
static inline qm_noise_vector qm_noise_multiply(qm_noise_vector a, qm_noise_vector b) {
  return _mm512_mul_epu32(a, b);
}
static inline qm_noise_vector qm_noise_high(qm_noise_vector a) { return _mm512_srli_epi64(a, 32); }
/* In each lane the high half of `product`, xor a, xor b; above it the low half. */
static inline qm_noise_vector qm_noise_last(qm_noise_vector product, qm_noise_vector a,
                                            qm_noise_vector b) {
  const __m512i turned = _mm512_shuffle_epi32(product, _MM_PERM_CDAB);
  return _mm512_mask_ternarylogic_epi32(turned, 0x5555, a, b, 0x96);
}
/* Blocks of four words from their halves. */
static inline void qm_noise_interleave(qm_noise_vector out[2], qm_noise_vector even,
                                       qm_noise_vector odd) {
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  out[0] = _mm512_permutex2var_epi64(even, first, odd);
  out[1] = _mm512_permutex2var_epi64(even, second, odd);
}
#elif defined(__AVX2__)
enum { QM_NOISE_LANES = 4, QM_NOISE_VECTORS = 4 };
typedef __m256i qm_noise_vector;
static inline qm_noise_vector qm_noise_splat(uint64_t x) { return _mm256_set1_epi64x((int64_t)x); }
static inline qm_noise_vector qm_noise_add(qm_noise_vector a, uint64_t b) {
  return _mm256_add_epi64(a, qm_noise_splat(b));
}
static inline qm_noise_vector qm_noise_first(uint64_t block) {
  return qm_noise_add(_mm256_setr_epi64x(0, 1, 2, 3), block);
}
static inline qm_noise_vector qm_noise_multiply(qm_noise_vector a, qm_noise_vector b) {
  return _mm256_mul_epu32(a, b);
}
static inline qm_noise_vector qm_noise_high(qm_noise_vector a) { return _mm256_srli_epi64(a, 32); }
/* In each lane the high half of `product`, xor a, xor b; above it the low half. */
static inline qm_noise_vector qm_noise_last(qm_noise_vector product, qm_noise_vector a,
                                            qm_noise_vector b) {
  const __m256i turned = _mm256_shuffle_epi32(product, 0xB1);
  return turned ^ _mm256_blend_epi32(_mm256_setzero_si256(), a ^ b, 0x55);
}
/* Blocks of four words from their halves. */
static inline void qm_noise_interleave(qm_noise_vector out[2], qm_noise_vector even,
                                       qm_noise_vector odd) {
  const __m256i low = _mm256_unpacklo_epi64(even, odd), high = _mm256_unpackhi_epi64(even, odd);
  out[0] = _mm256_permute2x128_si256(low, high, 0x20);
  out[1] = _mm256_permute2x128_si256(low, high, 0x31);
}
#else
enum { QM_NOISE_LANES = 32, QM_NOISE_VECTORS = 1 };
#endif

/* Blocks, and words of four to a block, that one batch makes. */
enum { QM_NOISE_BLOCKS = QM_NOISE_LANES * QM_NOISE_VECTORS, QM_NOISE_WORDS = 4 * QM_NOISE_BLOCKS };

/* What is the same for all blocks whose numbers share the upper 32 bits: the rounds' keys, and what
** the first three rounds make of the counter's other words. */
typedef struct qm_noise_keys {
  uint64_t key0[10], key1[10];
  uint64_t round1, round2[2], round3;
  uint32_t high, step, stream;
} qm_noise_keys;

static inline qm_noise_keys qm_noise_prepare(const qm_noise *noise, uint64_t block) {
  qm_noise_keys keys = {
      .high = (uint32_t)(block >> 32), .step = noise->step, .stream = noise->stream};
  uint32_t key0 = noise->seed, key1 = noise->parameter;
  for (int32_t round = 0; round < 10; round++) {
    keys.key0[round] = key0;
    keys.key1[round] = key1;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const uint64_t p1 = (uint64_t)0xCD9E8D57u * noise->step;                          /* of round 1 */
  const uint64_t p0 = 0xD2511F53u * (p1 >> 32 ^ keys.high ^ (uint64_t)noise->seed); /* of round 2 */
  keys.round1 = noise->stream ^ keys.key1[0];
  keys.round2[0] = (uint32_t)p1 ^ keys.key0[1];
  keys.round2[1] = p0 >> 32 ^ keys.key1[1];
  keys.round3 = (uint32_t)p0 ^ keys.key1[2];
  return keys;
}

#if defined(__AVX2__)
/* One batch under way, for kernels that have other work to put between its rounds. Its vectors take
** turns within a round, which hides the multiplier's latency: left to itself, the processor does
** not look far enough ahead. */
typedef struct qm_noise_state {
  qm_noise_vector c0[QM_NOISE_VECTORS], c1[QM_NOISE_VECTORS];
  qm_noise_vector c2[QM_NOISE_VECTORS], c3[QM_NOISE_VECTORS];
} qm_noise_state;
#define QM_NOISE_INLINE static inline __attribute__((always_inline))
/* QM_NOISE_EACH(i) statement: for every vector. */
#define QM_NOISE_EACH(i) _Pragma("GCC unroll 4") for (int32_t i = 0; i < QM_NOISE_VECTORS; i++)

/* Rounds 0 to 2. The first multiplies one word only and the second one other, for the rest of the
** counter is the same in every block. */
QM_NOISE_INLINE void qm_noise_begin(qm_noise_state *s, const qm_noise_keys *keys, uint64_t block) {
  const qm_noise_vector m0 = qm_noise_splat(0xD2511F53u), m1 = qm_noise_splat(0xCD9E8D57u);
  const qm_noise_vector first = qm_noise_first(block);
  QM_NOISE_EACH(i) {
    s->c3[i] = qm_noise_multiply(qm_noise_add(first, (uint64_t)(i * QM_NOISE_LANES)), m0);
    s->c2[i] = qm_noise_high(s->c3[i]) ^ qm_noise_splat(keys->round1);
  }
  QM_NOISE_EACH(i) {
    s->c1[i] = qm_noise_multiply(s->c2[i], m1);
    s->c0[i] = qm_noise_high(s->c1[i]) ^ qm_noise_splat(keys->round2[0]);
    s->c2[i] = s->c3[i] ^ qm_noise_splat(keys->round2[1]);
  }
  QM_NOISE_EACH(i) {
    const qm_noise_vector p0 = qm_noise_multiply(s->c0[i], m0);
    const qm_noise_vector p1 = qm_noise_multiply(s->c2[i], m1);
    s->c0[i] = qm_noise_high(p1) ^ s->c1[i] ^ qm_noise_splat(keys->key0[2]);
    s->c1[i] = p1;
    s->c2[i] = qm_noise_high(p0) ^ qm_noise_splat(keys->round3);
    s->c3[i] = p0;
  }
}
/* Rounds 3 to 8, one at a time. */
QM_NOISE_INLINE void qm_noise_round(qm_noise_state *s, const qm_noise_keys *keys, int32_t round) {
  const qm_noise_vector m0 = qm_noise_splat(0xD2511F53u), m1 = qm_noise_splat(0xCD9E8D57u);
  QM_NOISE_EACH(i) {
    const qm_noise_vector p0 = qm_noise_multiply(s->c0[i], m0);
    const qm_noise_vector p1 = qm_noise_multiply(s->c2[i], m1);
    s->c0[i] = qm_noise_high(p1) ^ s->c1[i] ^ qm_noise_splat(keys->key0[round]);
    s->c1[i] = p1;
    s->c2[i] = qm_noise_high(p0) ^ s->c3[i] ^ qm_noise_splat(keys->key1[round]);
    s->c3[i] = p0;
  }
}
/* Round 9, and the words in order. */
QM_NOISE_INLINE void qm_noise_end(uint32_t *out, qm_noise_state *s, const qm_noise_keys *keys) {
  const qm_noise_vector m0 = qm_noise_splat(0xD2511F53u), m1 = qm_noise_splat(0xCD9E8D57u);
  QM_NOISE_EACH(i) {
    const qm_noise_vector p0 = qm_noise_multiply(s->c0[i], m0);
    const qm_noise_vector p1 = qm_noise_multiply(s->c2[i], m1);
    qm_noise_vector words[2];
    qm_noise_interleave(words, qm_noise_last(p1, s->c1[i], qm_noise_splat(keys->key0[9])),
                        qm_noise_last(p0, s->c3[i], qm_noise_splat(keys->key1[9])));
    memcpy(out + 4 * i * QM_NOISE_LANES, words, sizeof words);
  }
}
#endif

/* The words of QM_NOISE_BLOCKS blocks from `block` on. */
static inline void qm_noise_batch(uint32_t *out, const qm_noise_keys *keys, uint64_t block) {
#if defined(__AVX2__)
  qm_noise_state state;
  qm_noise_begin(&state, keys, block);
#pragma GCC unroll 6
  for (int32_t round = 3; round < 9; round++) qm_noise_round(&state, keys, round);
  qm_noise_end(out, &state, keys);
#else
  uint32_t c0[QM_NOISE_LANES], c1[QM_NOISE_LANES], c2[QM_NOISE_LANES], c3[QM_NOISE_LANES];
  for (int32_t i = 0; i < QM_NOISE_LANES; i++) {
    c0[i] = (uint32_t)block + (uint32_t)i;
    c1[i] = keys->high;
    c2[i] = keys->step;
    c3[i] = keys->stream;
  }
  for (int32_t round = 0; round < 10; round++) {
    const uint32_t key0 = (uint32_t)keys->key0[round], key1 = (uint32_t)keys->key1[round];
    for (int32_t i = 0; i < QM_NOISE_LANES; i++) {
      const uint64_t p0 = (uint64_t)0xD2511F53u * c0[i], p1 = (uint64_t)0xCD9E8D57u * c2[i];
      c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ key0;
      c1[i] = (uint32_t)p1;
      c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ key1;
      c3[i] = (uint32_t)p0;
    }
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
  qm_noise_keys keys = qm_noise_prepare(noise, start >> 2);
  for (int64_t i = 0; i < count;) {
    const uint64_t block = (start + (uint64_t)i) >> 2;
    const int64_t skip = (int64_t)((start + (uint64_t)i) & 3), left = count - i;
    if ((uint32_t)(block >> 32) != keys.high) keys = qm_noise_prepare(noise, block);
    const int64_t same_high = (int64_t)(0x100000000u - (block & 0xFFFFFFFFu)) * 4;
    const int64_t whole = QM_NOISE_WORDS < same_high ? QM_NOISE_WORDS : same_high;
    if (skip == 0 && left >= QM_NOISE_WORDS && whole == QM_NOISE_WORDS) {
      qm_noise_batch(out + i, &keys, block);
      i += QM_NOISE_WORDS;
    } else {
      uint32_t words[QM_NOISE_WORDS];
      const int64_t room = whole - skip, n = left < room ? left : room;
      qm_noise_batch(words, &keys, block);
      memcpy(out + i, words + skip, (size_t)n * sizeof *words);
      i += n;
    }
  }
}

#endif
