/* noise.cuh - Philox words for many threads: the bits of kernels/philox.h, block by block. */
#ifndef QM_NOISE_CUH
#define QM_NOISE_CUH

#include "device.cuh"
#include "philox.h"

/* What blocks of one noise, numbered below 2^32, have in common: the rounds' keys, and what the
** first three rounds make of the counter's other words, which saves two products of twenty. Lies in
** registers that a warp shares, for the others are dear. */
struct qm_philox_keys {
  uint32_t words[19]; /* in the order of their use */

  /* All lanes must call. */
  __device__ __forceinline__ explicit qm_philox_keys(const qm_noise &noise) {
    uint32_t key0 = noise.seed, key1 = noise.parameter;
    const uint64_t p1 = (uint64_t)0xCD9E8D57u * noise.step;
    const uint64_t p0 = (uint64_t)0xD2511F53u * ((uint32_t)(p1 >> 32) ^ key0);
    words[0] = noise.stream ^ key1;
#pragma unroll
    for (int round = 1; round < 10; round++) {
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
      words[2 * round - 1] = key0, words[2 * round] = key1;
    }
    words[1] ^= (uint32_t)p1;
    words[2] ^= (uint32_t)(p0 >> 32);
    words[4] ^= (uint32_t)p0;
#pragma unroll
    for (uint32_t &word : words) word = __reduce_or_sync(0xFFFFFFFFu, word);
  }

  __device__ __forceinline__ void draw(uint32_t block, uint32_t out[4]) const {
    uint64_t p0 = (uint64_t)0xD2511F53u * block;
    uint64_t p1 = (uint64_t)0xCD9E8D57u * ((uint32_t)(p0 >> 32) ^ words[0]);
    uint32_t c0 = (uint32_t)(p1 >> 32) ^ words[1], c1 = (uint32_t)p1;
    uint32_t c2 = (uint32_t)p0 ^ words[2], c3 = 0;
#pragma unroll
    for (int round = 2; round < 10; round++) {
      p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
      c0 = (uint32_t)(p1 >> 32) ^ c1 ^ words[2 * round - 1], c1 = (uint32_t)p1;
      c2 = (uint32_t)(p0 >> 32) ^ c3 ^ words[2 * round], c3 = (uint32_t)p0;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }
};

#endif
