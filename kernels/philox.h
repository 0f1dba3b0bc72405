/* philox.h - Philox4x32-10, the random bits that C and CUDA must agree on to the bit.
**
** Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
** Key (seed, parameter), counter (block lo, block hi, step, stream); element e of a consumer takes
** word e mod 4 of block e / 4, so that no launch shape can change a result.
*/
#ifndef QM_PHILOX_H
#define QM_PHILOX_H

#include "inline.h"
#include "quartermoon.h"

QM_INLINE void qm_philox(const qm_noise *noise, uint64_t block, uint32_t out[4]) {
  uint32_t key0 = noise->seed, key1 = noise->parameter;
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = noise->step, c3 = noise->stream;
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

/* The 32 random bits of one element. */
QM_INLINE uint32_t qm_bits(const qm_noise *noise, uint64_t element) {
  uint32_t words[4];
  qm_philox(noise, element >> 2, words);
  return words[element & 3];
}

/* Uniform in [0, 1), a multiple of 2^-24. */
QM_INLINE float qm_uniform_of(uint32_t bits) { return (float)(bits >> 8) * 0x1p-24f; }
QM_INLINE float qm_uniform(const qm_noise *noise, uint64_t element) {
  return qm_uniform_of(qm_bits(noise, element));
}

#endif
