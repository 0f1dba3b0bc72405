/* ptx.cpp - a warp's instructions: background copies, tiles out of shared memory, products. */
#include "cuda_runtime.h"
#include "dtype.h"
#include "threads.h"

namespace emulate::ptx {

float number(bool bf16, uint32_t bits) {
  return bf16 ? qm_from_bf16((uint16_t)bits) : qm_from_f16((uint16_t)bits);
}

/* ---- cp.async ---- */

static void copy_later(uint32_t to, const void *from, int bytes, int there) {
  if (there != 0 && there != bytes) die("cp.async copies %d bytes or none here", bytes);
  if (there != 0 && (uintptr_t)from % bytes != 0) die("cp.async reads from a misaligned address");
  char *target = shared_memory(to, bytes, bytes);
  memset(target, 0xFF, bytes); /* whoever reads too early must notice */
  self().copies.push_back({target, there != 0 ? from : NULL, bytes, self().copy_group});
}
void cp_async_cg_shared_global(uint32_t to, const void *from, int bytes, int there) {
  if (bytes != 16) die("cp.async.cg copies 16 bytes");
  copy_later(to, from, bytes, there);
}
void cp_async_ca_shared_global(uint32_t to, const void *from, int bytes, int there) {
  if (bytes != 4 && bytes != 8 && bytes != 16) die("cp.async.ca copies 4, 8 or 16 bytes");
  copy_later(to, from, bytes, there);
}
void cp_async_commit_group() { self().copy_group++; }
void cp_async_wait_group(int pending) {
  fiber &mine = self();
  while (!mine.copies.empty() && mine.copies.front().group < mine.copy_group - pending) {
    const copy arrived = mine.copies.front();
    mine.copies.pop_front();
    if (arrived.from != NULL)
      memcpy(arrived.to, arrived.from, arrived.bytes);
    else
      memset(arrived.to, 0, arrived.bytes);
  }
}

/* ---- ldmatrix ---- */

struct tiles {
  uint32_t **out;
  uint32_t row;
  bool transposed;
};
/* Lane l gives row l % 8 of tile l / 8, and gets elements 2 (l % 4) and the next of its row l /
** 4. */
static void load(void *const *lanes) {
  for (int i = 0; i < 32; i++)
    if (lanes[i] == NULL) die("a lane is missing in ldmatrix");
  for (int tile = 0; tile < 4; tile++) {
    uint16_t at[8][8];
    for (int r = 0; r < 8; r++)
      memcpy(at[r], shared_memory(((tiles *)lanes[tile * 8 + r])->row, 16, 16), 16);
    for (int l = 0; l < 32; l++) {
      const tiles *to = (const tiles *)lanes[l];
      const int r = l / 4, c = l % 4 * 2;
      *to->out[tile] = to->transposed ? at[c][r] | (uint32_t)at[c + 1][r] << 16
                                      : at[r][c] | (uint32_t)at[r][c + 1] << 16;
    }
  }
}
void load_tiles(uint32_t *(&out)[4], uint32_t row, bool transposed) {
  tiles mine = {out, row, transposed};
  meet(0xFFFFFFFFu, &mine, load);
}

/* ---- mma ---- */

struct operands {
  float **d;
  const uint32_t *a, *b;
  const float *c;
};
/* With g = l / 4 and t = l % 4, lane l's words of a are rows g, g + 8 (the odd ones), columns 2t
** and 2t + 8 (the last two); of b rows 2t and 2t + 8 of column g; of c and d rows g and g + 8 of
** columns 2t and 2t + 1. Sums are rounded once: the hardware's are not better. */
template <bool BF16>
static void mma(void *const *lanes) {
  float a[16][16], b[8][16];
  for (int l = 0; l < 32; l++) {
    const operands *from = (const operands *)lanes[l];
    if (from == NULL) die("a lane is missing in mma");
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 8; i++)
      a[g + i / 2 % 2 * 8][t * 2 + i / 4 * 8 + i % 2] = number(BF16, from->a[i / 2] >> i % 2 * 16);
    for (int i = 0; i < 4; i++)
      b[g][t * 2 + i / 2 * 8 + i % 2] = number(BF16, from->b[i / 2] >> i % 2 * 16);
  }
  for (int l = 0; l < 32; l++) {
    const operands *to = (const operands *)lanes[l];
    float sums[4];
    for (int i = 0; i < 4; i++) {
      const float *row = a[l / 4 + i / 2 * 8], *column = b[l % 4 * 2 + i % 2];
      double sum = to->c[i];
      for (int k = 0; k < 16; k++) sum += (double)row[k] * column[k];
      sums[i] = (float)sum;
    }
    for (int i = 0; i < 4; i++) *to->d[i] = sums[i];
  }
}
void multiply(bool bf16, float *(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const float (&c)[4]) {
  operands mine = {d, a, b, c};
  meet(0xFFFFFFFFu, &mine, bf16 ? mma<true> : mma<false>);
}

struct byte_operands {
  int32_t *d[4];
  uint32_t a[4], b[2];
  int32_t c[4];
};
static void mma_bytes(void *const *lanes) {
  uint8_t a[16][32];
  int8_t b[8][32];
  for (int l = 0; l < 32; l++) {
    const byte_operands *from = (const byte_operands *)lanes[l];
    if (from == NULL) die("a lane is missing in mma");
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 16; i++)
      a[g + i / 4 % 2 * 8][t * 4 + i / 8 * 16 + i % 4] = (uint8_t)(from->a[i / 4] >> i % 4 * 8);
    for (int i = 0; i < 8; i++)
      b[g][t * 4 + i / 4 * 16 + i % 4] = (int8_t)(from->b[i / 4] >> i % 4 * 8);
  }
  for (int l = 0; l < 32; l++) {
    const byte_operands *to = (const byte_operands *)lanes[l];
    for (int i = 0; i < 4; i++) {
      int32_t sum = to->c[i];
      for (int k = 0; k < 32; k++) sum += a[l / 4 + i / 2 * 8][k] * b[l % 4 * 2 + i % 2][k];
      *to->d[i] = sum;
    }
  }
}
void mma_sync_aligned_m16n8k32_row_col_s32_u8_s8_s32(int32_t &d0, int32_t &d1, int32_t &d2,
                                                     int32_t &d3, uint32_t a0, uint32_t a1,
                                                     uint32_t a2, uint32_t a3, uint32_t b0,
                                                     uint32_t b1, int32_t c0, int32_t c1,
                                                     int32_t c2, int32_t c3) {
  byte_operands mine = {{&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  meet(0xFFFFFFFFu, &mine, mma_bytes);
}

}  // namespace emulate::ptx
