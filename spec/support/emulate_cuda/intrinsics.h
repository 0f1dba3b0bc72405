/* intrinsics.h - CUDA's built-in functions, as far as the kernels use them. Those that a GPU only
** approximates are off by an ulp here, lest somebody rely on the last bit. */
#ifndef QM_EMULATE_INTRINSICS_H
#define QM_EMULATE_INTRINSICS_H

#include "emulate.h"

/* ---- bits ---- */

static inline int32_t __dp4a(int32_t a, int32_t b, int32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (int8_t)(a >> i) * (int8_t)(b >> i);
  return sum;
}
static inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline float __int_as_float(int32_t x) { return __uint_as_float((uint32_t)x); }
static inline int32_t __float_as_int(float x) { return (int32_t)__float_as_uint(x); }
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x != 0 ? __builtin_clz((unsigned)x) : 32; }
static inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return (uint32_t)((uint64_t)a * b >> 32);
}
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return (uint32_t)(((uint64_t)high << 32 | low) >> (shift & 31));
}
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++)
    out |= (uint32_t)(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return out;
}

/* ---- arithmetic ---- */

namespace emulate {
/* One ulp up or down, or neither, as the operand's bits have it. */
static inline float approximate(float exact, float operand) {
  if (!isfinite(exact) || exact == 0.0f) return exact;
  const int32_t off = (int32_t)(__float_as_uint(operand) * 2654435761u >> 30) % 3 - 1;
  return __uint_as_float(__float_as_uint(exact) + (uint32_t)off);
}
/* Subnormals are zeros. */
static inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
}  // namespace emulate

static inline float rsqrtf(float x) {
  return emulate::approximate((float)(1.0 / sqrt((double)x)), x);
}
#define __expf emulated_expf /* the C library has the name */
static inline float __expf(float x) {
  return emulate::flush(emulate::approximate((float)exp((double)x), x));
}
static inline float __fdividef(float a, float b) {
  return fabsf(b) > 0x1p126f && isfinite(b) ? 0.0f : emulate::approximate(a / b, b);
}
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
namespace emulate {
/* What `work` makes of its operands when every operation rounds up. */
template <typename Work>
static inline float rounding_up(Work work) {
  const int before = fegetround();
  fesetround(FE_UPWARD);
  const float result = work();
  fesetround(before);
  return result;
}
}  // namespace emulate
static inline float __fadd_ru(float a, float b) {
  volatile float x = a, y = b;
  return emulate::rounding_up([&] {
    volatile float z = x + y;
    return (float)z;
  });
}
static inline float __fmaf_ru(float a, float b, float c) {
  volatile float x = a, y = b, z = c;
  return emulate::rounding_up([&] {
    volatile float w = fmaf(x, y, z);
    return (float)w;
  });
}

template <typename A, typename B>
static inline std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <typename A, typename B>
static inline std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}

/* ---- memory ---- */

template <typename T>
static inline T __ldg(const T *x) {
  return *x;
}
template <typename T>
static inline T __ldcs(const T *x) {
  return *x;
}
template <typename T>
static inline T __ldcg(const T *x) {
  return *x;
}
template <typename T>
static inline void __stcs(T *x, T value) {
  *x = value;
}
template <typename T>
static inline void __stcg(T *x, T value) {
  *x = value;
}
static inline uint32_t atomicCAS(uint32_t *at, uint32_t expected, uint32_t wanted) {
  const uint32_t was = *at;
  if (was == expected) *at = wanted;
  return was;
}
template <typename T, typename U>
static inline T atomicAdd(T *at, U x) {
  const T was = *at;
  *at += (T)x;
  return was;
}
template <typename T>
static inline T atomicMin(T *at, T x) {
  const T was = *at;
  if (x < was) *at = x;
  return was;
}
static inline void __threadfence() {}
static inline void __threadfence_system() {}
static inline uint32_t __cvta_generic_to_shared(const void *at) {
  return emulate::shared_address(at);
}

/* ---- the block and the warp ---- */

static inline void __syncthreads() { emulate::sync_block(); }

namespace emulate {
/* Value of lane `from`; rubbish where that lane is not there. */
template <typename T>
T exchange(uint32_t mask, T value, int from) {
  struct part {
    T value, out;
    int from;
  } mine = {value, value, from};
  meet(mask, &mine, [](void *const *lanes) {
    for (int i = 0; i < 32; i++) {
      part *to = (part *)lanes[i];
      if (to == nullptr) continue;
      const part *other = (const part *)lanes[to->from];
      if (other != nullptr)
        to->out = other->value;
      else
        memset((void *)&to->out, 0xFF, sizeof to->out);
    }
  });
  return mine.out;
}
template <typename Join>
uint32_t reduce(uint32_t mask, uint32_t value, Join) {
  meet(mask, &value, [](void *const *lanes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; i++)
      if (lanes[i] != nullptr) all = Join()(all, *(uint32_t *)lanes[i], i);
    for (int i = 0; i < 32; i++)
      if (lanes[i] != nullptr) *(uint32_t *)lanes[i] = all;
  });
  return value;
}
}  // namespace emulate

template <typename T>
static inline T __shfl_sync(uint32_t mask, T x, int from) {
  return emulate::exchange(mask, x, from & 31);
}
template <typename T>
static inline T __shfl_xor_sync(uint32_t mask, T x, int with) {
  return emulate::exchange(mask, x, emulate::lane() ^ with);
}
template <typename T>
static inline T __shfl_down_sync(uint32_t mask, T x, int by) {
  const int lane = emulate::lane();
  return emulate::exchange(mask, x, lane + by < 32 ? lane + by : lane);
}
template <typename T>
static inline T __shfl_up_sync(uint32_t mask, T x, int by) {
  const int lane = emulate::lane();
  return emulate::exchange(mask, x, lane >= by ? lane - by : lane);
}
static inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t x) {
  return emulate::reduce(mask, x, [](uint32_t all, uint32_t one, int) { return all + one; });
}
static inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t x) {
  return emulate::reduce(mask, x, [](uint32_t all, uint32_t one, int) { return all | one; });
}
static inline uint32_t __ballot_sync(uint32_t mask, bool x) {
  return emulate::reduce(mask, x, [](uint32_t all, uint32_t one, int i) { return all | one << i; });
}
static inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { __ballot_sync(mask, true); }

#endif
