/* hopper.cpp - the instructions of sm_90a: products of warpgroups, barriers, tensor copies. */
#include <cuda.h>

#include <vector>

#include "cuda_runtime.h"
#include "dtype.h"
#include "threads.h"

namespace emulate::ptx {

float number(bool bf16, uint32_t bits);

/* ---- wgmma ---- */

void wgmma_fence_sync_aligned() { __syncwarp(); }
void wgmma_commit_group_sync_aligned() { self().product_group++; }

void begin_product(bool bf16, int columns, float *const *sums, const uint32_t *fragment, uint64_t a,
                   uint64_t b, bool fresh, bool along) {
  fiber &mine = self();
  product next = {};
  next.columns = columns;
  next.bf16 = bf16;
  next.in_registers = fragment != NULL;
  next.fresh = fresh;
  next.along = along;
  next.a = a;
  next.b = b;
  next.group = mine.product_group;
  for (int i = 0; i < columns / 2; i++) next.sums[i] = sums[i];
  for (int i = 0; i < 4 && fragment != NULL; i++) next.fragment[i] = fragment[i];
  mine.products.push_back(next);
}

/* Element (line, k) of an operand that a descriptor of a 128-byte swizzle shows; `along`: k counts
** lines of memory and `line` elements in them. Its bits: 0 .. 13 the address, 16 .. 29 the leading
** and 32 .. 45 the stride dimension's step, each in 16 bytes; 62 and 63 the swizzle. */
static float element(bool bf16, uint64_t descriptor, bool along, uint32_t line, uint32_t k) {
  if (descriptor >> 62 != 1) die("a wgmma descriptor without the 128-byte swizzle");
  const uint32_t begin = (uint32_t)(descriptor & 0x3FFF) << 4;
  const uint32_t leading = (uint32_t)(descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = (uint32_t)(descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t plain =
      along ? begin + line / 64 * leading + k / 8 * stride + k % 8 * 128 + line % 64 * 2
            : begin + line / 8 * stride + line % 8 * 128 + k * 2;
  const uint32_t at = plain ^ (plain >> 7 & 7) << 4;
  uint16_t bits;
  memcpy(&bits, shared_memory(at, 2, 2), 2);
  return number(bf16, bits);
}

/* A warp's 16 rows of one product. All lanes have begun the same ones. */
static void finish(void *const *lanes) {
  const product *first = (const product *)lanes[0];
  const int warp_row = thread() / 32 % 4 * 16;
  float a[16][16];
  static float b[256][16];
  for (int l = 0; l < 32; l++) {
    const product *p = (const product *)lanes[l];
    if (p == NULL) die("a lane is missing in wgmma");
    if (p->a != first->a || p->b != first->b || p->fresh != first->fresh)
      die("lanes begin different products");
    for (int i = 0; i < 8; i++) {
      const int r = l / 4 + i / 2 % 2 * 8, k = l % 4 * 2 + i / 4 * 8 + i % 2;
      a[r][k] = p->in_registers
                    ? number(p->bf16, p->fragment[i / 2] >> i % 2 * 16)
                    : element(p->bf16, p->a, false, (uint32_t)(warp_row + r), (uint32_t)k);
    }
  }
  for (int n = 0; n < first->columns; n++)
    for (int k = 0; k < 16; k++)
      b[n][k] = element(first->bf16, first->b, first->along, (uint32_t)n, (uint32_t)k);
  for (int l = 0; l < 32; l++) {
    const product *p = (const product *)lanes[l];
    for (int i = 0; i < first->columns / 2; i++) {
      const float *row = a[l / 4 + i / 2 % 2 * 8], *column = b[i / 4 * 8 + l % 4 * 2 + i % 2];
      double sum = p->fresh ? 0.0 : *p->sums[i];
      for (int k = 0; k < 16; k++) sum += (double)row[k] * column[k];
      *p->sums[i] = (float)sum;
    }
  }
}

void wgmma_wait_group_sync_aligned(int pending) {
  fiber &mine = self();
  while (!mine.products.empty() && mine.products.front().group < mine.product_group - pending) {
    product oldest = mine.products.front();
    mine.products.pop_front();
    meet(0xFFFFFFFFu, &oldest, finish);
  }
}

/* ---- mbarrier ---- */

struct barrier {
  uint16_t expected, pending;
  int32_t bytes : 24; /* of copies that have not arrived */
  uint32_t phase : 8;
};
static_assert(sizeof(barrier) == 8, "an mbarrier has 64 bits");

struct background_copy {
  char *to;
  const CUtensorMap *map; /* of a tensor copy; without it `bytes` from `from` */
  int64_t column, head, row;
  uint32_t swizzle_from; /* the target's shared address */
  const void *from;
  uint32_t bytes;
  barrier *report;
};
static std::vector<background_copy> copies; /* under way */

static barrier *at(uint32_t address) { return (barrier *)shared_memory(address, 8, 8); }

static void turn_if_all(barrier *b) {
  if (b->pending != 0 || b->bytes != 0) return;
  b->pending = b->expected;
  b->phase ^= 1;
  note_progress();
}

void mbarrier_init_shared__cta_b64(uint32_t address, uint32_t arrivals) {
  *at(address) = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 0};
}
void mbarrier_arrive_shared__cta_b64(uint32_t address) {
  barrier *b = at(address);
  if (b->pending == 0) die("more arrive at a barrier than it was opened for");
  b->pending--;
  turn_if_all(b);
}
void mbarrier_arrive_expect_tx_shared__cta_b64(uint32_t address, uint32_t bytes) {
  barrier *b = at(address);
  b->bytes += (int32_t)bytes;
  mbarrier_arrive_shared__cta_b64(address);
}

/* ---- bulk copies ---- */

static const int SWIZZLED_ROW_BYTES = 128;

static void copy_box(const background_copy &copy) {
  const CUtensorMap &map = *copy.map;
  for (uint32_t r = 0; r < map.box[2]; r++)
    for (uint32_t c = 0; c < map.box[0]; c++) {
      const int64_t row = copy.row + r, column = copy.column + c;
      const bool inside = row >= 0 && row < (int64_t)map.extents[2] && copy.head >= 0 &&
                          copy.head < (int64_t)map.extents[1] && column >= 0 &&
                          column < (int64_t)map.extents[0];
      uint16_t value = 0;
      if (inside)
        memcpy(&value,
               (const char *)map.data + row * (int64_t)map.strides_bytes[1] +
                   copy.head * (int64_t)map.strides_bytes[0] + column * 2,
               2);
      const uint32_t plain = copy.swizzle_from + (r * map.box[0] + c) * 2;
      const uint32_t place = map.swizzled ? plain ^ (plain >> 7 & 7) << 4 : plain;
      memcpy(copy.to + (place - copy.swizzle_from), &value, 2);
    }
}

static void arrive(const background_copy &copy) {
  if (copy.map != nullptr)
    copy_box(copy);
  else
    memcpy(copy.to, copy.from, copy.bytes);
  copy.report->bytes -= (int32_t)copy.bytes;
  turn_if_all(copy.report);
}

/* Copies arrive when somebody waits for them, not before. */
void mbarrier_try_wait_parity_shared__cta_b64(bool &done, uint32_t address, uint32_t parity) {
  barrier *b = at(address);
  for (size_t i = 0; i < copies.size();) {
    const background_copy copy = copies[i];
    if (copy.report != b) {
      i++;
      continue;
    }
    copies.erase(copies.begin() + (ptrdiff_t)i);
    arrive(copy);
  }
  done = b->phase != parity;
  if (!done) pause();
}

void cp_async_bulk_tensor_3d_shared__cluster_global_mbarrier__complete_tx__bytes(
    uint32_t to, const CUtensorMap *map, int32_t column, int32_t head, int32_t row,
    uint32_t barrier) {
  const uint32_t bytes = map->box[2] * map->box[0] * 2;
  if (map->swizzled && to % 1024 != 0) die("a swizzled tile begins at %#x", to);
  char *target = shared_memory(to, bytes, 128);
  memset(target, 0xFF, bytes);
  copies.push_back({target, map, column, head, row, to, nullptr, bytes, at(barrier)});
}

void cp_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(uint32_t to,
                                                                       const void *from,
                                                                       uint32_t bytes,
                                                                       uint32_t barrier) {
  if ((uintptr_t)from % 16 != 0 || bytes % 16 != 0) die("a bulk copy of no whole 16 bytes");
  char *target = shared_memory(to, bytes, 16);
  memset(target, 0xFF, bytes);
  copies.push_back({target, nullptr, 0, 0, 0, 0, from, bytes, at(barrier)});
}

static CUresult encode(CUtensorMap *out, int, uint32_t, void *data, const uint64_t *extents,
                       const uint64_t *strides_bytes, const uint32_t *box, const uint32_t *, int,
                       int swizzle, int, int) {
  const bool aligned =
      (uintptr_t)data % 16 == 0 && strides_bytes[0] % 16 == 0 && strides_bytes[1] % 16 == 0;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const bool fits = box[0] % 8 == 0 && box[0] <= 256 && box[1] == 1 && box[2] <= 256 &&
                    extents[0] > 0 && extents[1] > 0 && extents[2] > 0;
  if (!aligned || !fits) return CUDA_ERROR_INVALID_VALUE;
  if (swizzled && box[0] * 2 != SWIZZLED_ROW_BYTES) return CUDA_ERROR_INVALID_VALUE;
  *out = {data,
          {extents[0], extents[1], extents[2]},
          {strides_bytes[0], strides_bytes[1]},
          {box[0], box[1], box[2]},
          swizzled};
  return CUDA_SUCCESS;
}

}  // namespace emulate::ptx

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult *found) {
  *function = (void *)emulate::ptx::encode;
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
