/* wgmma.cuh - Hopper's warpgroup products, its tensor copies and barriers (sm_90a only).
**
** Shared tiles are ROWS x 64 elements of 16 bits, 128 bytes to a row, in the 128-byte swizzle that
** the tensor copy writes: the 16-byte piece c of row r lies at c ^ (r % 8). A wider tile is several
** of them, one after the other; each begins at a multiple of 1024 bytes. The accumulator of 64 x N
** belongs to four warps, 16 rows each, every one as mma.m16n8k16 holds it.
** Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
*/
#ifndef QM_WGMMA_CUH
#define QM_WGMMA_CUH

#include <cuda.h>

#include <type_traits>

#include "device.cuh"

/* ---- shared tiles as products see them ---- */

/* Rows of the tile are rows of the operand (or columns of a transposed one). */
static __device__ __forceinline__ uint64_t qm_tile(uint32_t at) {
  return (at & 0x3FFFF) >> 4 | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
static __device__ __forceinline__ uint64_t qm_tile(const void *tile) {
  return qm_tile((uint32_t)__cvta_generic_to_shared(tile));
}
/* Rows of the tile run along the sum: B as it lies. half_bytes: from 64 columns to the next 64. */
static __device__ __forceinline__ uint64_t qm_tile_along(const void *tile, uint32_t half_bytes) {
  const uint64_t at = (uint32_t)__cvta_generic_to_shared(tile);
  return (at & 0x3FFFF) >> 4 | (uint64_t)(half_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}
/* A descriptor some bytes further on. */
static __device__ __forceinline__ uint64_t qm_tile_at(uint64_t tile, uint32_t bytes) {
  return tile + (bytes >> 4);
}

/* ---- products: 64 x N += 64 x 16 times 16 x N ---- */

static __device__ __forceinline__ void qm_products_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
static __device__ __forceinline__ void qm_products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int PENDING>
static __device__ __forceinline__ void qm_products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}
/* Keep the compiler from moving an accumulator while products are under way. */
template <int N>
static __device__ __forceinline__ void qm_pin(float (&acc)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) asm volatile("" : "+f"(acc[i][j])::"memory");
}

#define QM_ACC4(i) "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])
#define QM_ACC32(i)                                                                                \
  QM_ACC4(i), QM_ACC4(i + 1), QM_ACC4(i + 2), QM_ACC4(i + 3), QM_ACC4(i + 4), QM_ACC4(i + 5),      \
      QM_ACC4(i + 6), QM_ACC4(i + 7)
#define QM_REGISTERS_64                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "         \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define QM_REGISTERS_128                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "         \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "          \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "          \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "

/* acc (= where fresh, else +=) a b. ALONG is 1 for a b by qm_tile_along, 0 for one by qm_tile; a is
** a tile in shared memory, or the fragment that qm_mma takes. */
template <typename T, int ALONG>
static __device__ __forceinline__ void qm_product(float (&acc)[8][4], uint64_t a, uint64_t b,
                                                  bool fresh) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " QM_REGISTERS_64
        "%32, %33, p, 1, 1, 0, %35;\n}\n"
        : QM_ACC32(0)
        : "l"(a), "l"(b), "r"((int32_t)!fresh), "n"(ALONG));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " QM_REGISTERS_64
        "%32, %33, p, 1, 1, 0, %35;\n}\n"
        : QM_ACC32(0)
        : "l"(a), "l"(b), "r"((int32_t)!fresh), "n"(ALONG));
}
template <typename T, int ALONG>
static __device__ __forceinline__ void qm_product(float (&acc)[8][4], const uint32_t (&a)[4],
                                                  uint64_t b, bool fresh) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " QM_REGISTERS_64
        "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
        : QM_ACC32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int32_t)!fresh), "n"(ALONG));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " QM_REGISTERS_64
        "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
        : QM_ACC32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int32_t)!fresh), "n"(ALONG));
}
template <typename T, int ALONG>
static __device__ __forceinline__ void qm_product(float (&acc)[16][4], uint64_t a, uint64_t b,
                                                  bool fresh) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " QM_REGISTERS_128
        "%64, %65, p, 1, 1, 0, %67;\n}\n"
        : QM_ACC32(0), QM_ACC32(8)
        : "l"(a), "l"(b), "r"((int32_t)!fresh), "n"(ALONG));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " QM_REGISTERS_128
        "%64, %65, p, 1, 1, 0, %67;\n}\n"
        : QM_ACC32(0), QM_ACC32(8)
        : "l"(a), "l"(b), "r"((int32_t)!fresh), "n"(ALONG));
}
template <typename T, int ALONG>
static __device__ __forceinline__ void qm_product(float (&acc)[16][4], const uint32_t (&a)[4],
                                                  uint64_t b, bool fresh) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " QM_REGISTERS_128
        "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"
        : QM_ACC32(0), QM_ACC32(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int32_t)!fresh), "n"(ALONG));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " QM_REGISTERS_128
        "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"
        : QM_ACC32(0), QM_ACC32(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int32_t)!fresh), "n"(ALONG));
}

/* ---- barriers in shared memory, and copies that report to them ---- */

/* An address of shared memory in 32 bits, which loops count on with less than by pointers. */
static __device__ __forceinline__ uint32_t qm_shared(const void *at) {
  return (uint32_t)__cvta_generic_to_shared(at);
}

static __device__ __forceinline__ void qm_barrier_open(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}
static __device__ __forceinline__ void qm_barrier_open(uint64_t *barrier, uint32_t arrivals) {
  qm_barrier_open(qm_shared(barrier), arrivals);
}
static __device__ __forceinline__ void qm_barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
static __device__ __forceinline__ void qm_barrier_arrive(uint64_t *barrier) {
  qm_barrier_arrive(qm_shared(barrier));
}
/* Arrive for a warp whose products are done with what they read. What lanes read with loads of
** their own, each says itself that it has read: compute-sanitizer's racecheck follows no lane
** through __syncwarp. */
static __device__ __forceinline__ void qm_barrier_arrive_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) qm_barrier_arrive(barrier);
}
static __device__ __forceinline__ void qm_barrier_arrive_warp(uint64_t *barrier) {
  qm_barrier_arrive_warp(qm_shared(barrier));
}
/* Arrive, and let the barrier wait for so many bytes of copies too. */
static __device__ __forceinline__ void qm_barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/* Not by the former: attention's loops then unroll less. */
static __device__ __forceinline__ void qm_barrier_expect(uint64_t *barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                   (uint32_t)__cvta_generic_to_shared(barrier)),
               "r"(bytes)
               : "memory");
}
/* Wait until the phase of this parity is over. */
static __device__ __forceinline__ void qm_barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
static __device__ __forceinline__ void qm_barrier_wait(uint64_t *barrier, uint32_t parity) {
  qm_barrier_wait(qm_shared(barrier), parity);
}
/* Copy the box at (column, head, row) of a tensor of three dimensions into a shared tile. */
static __device__ __forceinline__ void qm_copy_tile(void *tile, const CUtensorMap *map,
                                                    int32_t column, int32_t head, int32_t row,
                                                    uint64_t *barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];\n" ::"r"((uint32_t)__cvta_generic_to_shared(tile)),
      "l"(map), "r"((uint32_t)__cvta_generic_to_shared(barrier)), "r"(column), "r"(head), "r"(row)
      : "memory");
}
/* The same for what nobody reads again soon: it leaves the L2 first. */
static __device__ __forceinline__ void qm_copy_tile_once(uint32_t tile, const CUtensorMap *map,
                                                         int32_t column, int32_t head, int32_t row,
                                                         uint32_t barrier) {
  constexpr uint64_t EVICT_FIRST = 0x12F0000000000000u; /* as createpolicy makes it */
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;\n" ::"r"(tile),
      "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(row), "l"(EVICT_FIRST)
      : "memory");
}

/* Copy bytes that lie side by side; all three are multiples of 16. */
static __device__ __forceinline__ void qm_copy_bulk(uint32_t to, const void *from, uint32_t bytes,
                                                    uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
static __device__ __forceinline__ void qm_copy_bulk(void *to, const void *from, uint32_t bytes,
                                                    uint64_t *barrier) {
  qm_copy_bulk(qm_shared(to), from, bytes, qm_shared(barrier));
}

/* Barriers just opened may be used, by copies too. */
static __device__ __forceinline__ void qm_barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;\n" ::: "memory");
}

/* What this thread stored in shared memory may be read by products of others, once they know. */
static __device__ __forceinline__ void qm_stores_ready() {
  asm volatile("fence.proxy.async;\n" ::: "memory");
}

/* ---- threads that meet ---- */

/* The block's first THREADS, whole warps. Barrier 0 is __syncthreads's. */
template <int THREADS>
static __device__ __forceinline__ void qm_consumers_meet() {
  asm volatile("bar.sync 1, %0;\n" ::"n"(THREADS) : "memory");
}

/* Whether this is the lane that acts for its warp: where the compiler sees that all lanes agree on
** addresses, a copy then needs no loop over them. */
static __device__ __forceinline__ bool qm_elected() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(elected)::"memory");
  return elected != 0;
}

/* All threads of a cluster that have not ended; shared memory written before is seen behind. */
static __device__ __forceinline__ void qm_cluster_meet() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}
/* What lies there in block `rank` of the cluster. */
static __device__ __forceinline__ float4 qm_cluster_read(const float *own, uint32_t rank) {
  float4 out;
  asm volatile(
      "{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at];\n}\n"
      : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
      : "r"((uint32_t)__cvta_generic_to_shared(own)), "r"(rank)
      : "memory");
  return out;
}

/* Registers change hands between the warpgroup that copies and those that compute. */
template <int COUNT>
static __device__ __forceinline__ void qm_registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}
template <int COUNT>
static __device__ __forceinline__ void qm_registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

#endif
