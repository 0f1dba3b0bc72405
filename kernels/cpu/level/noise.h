/* noise.h - Philox words for a run of elements, many blocks at a time: the same bits as qm_bits. */
#ifndef QM_CPU_NOISE_H
#define QM_CPU_NOISE_H

#include "cpu/cpu.h"

/* Words of the whole Philox blocks first, first + 1, ...: four each. */
static inline void qm_noise_blocks(uint32_t *restrict out, const qm_noise *noise, uint64_t first,
                                   int64_t block_count) {
  const qm_noise key = *noise;
  for (int64_t i = 0; i < block_count; i++) {
    uint32_t words[4];
    qm_philox(&key, first + (uint64_t)i, words);
    out[4 * i] = words[0];
    out[4 * i + 1] = words[1];
    out[4 * i + 2] = words[2];
    out[4 * i + 3] = words[3];
  }
}

/* out[i] = qm_bits(noise, start + i) for i < count. Any start will do; multiples of 4 are fastest.
** */
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
