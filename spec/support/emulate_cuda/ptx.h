/* ptx.h - the PTX instructions that the kernels contain, one function each, operands in their order
** there. Source: PTX ISA 8.5. */
#ifndef QM_EMULATE_PTX_H
#define QM_EMULATE_PTX_H

#include "intrinsics.h"

struct CUtensorMap;

namespace emulate::ptx {

/* ---- arithmetic ---- */

template <typename T>
void lop3_b32(T &out, uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t all = 0;
  for (int i = 0; i < 32; i++) {
    const uint32_t row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
    all |= (table >> row & 1) << i;
  }
  out = (T)all;
}
inline void rsqrt_approx_ftz_f32(float &out, float x) { out = rsqrtf(flush(x)); }
inline void rcp_approx_ftz_f32(float &out, float x) {
  out = flush(approximate(1.0f / flush(x), x));
}
inline void ex2_approx_ftz_f32(float &out, float x) {
  x = flush(x); /* 2^0 is 1 by definition */
  out = x == 0.0f ? 1.0f : flush(approximate((float)exp2((double)x), x));
}
inline void setp_ne_b32(bool &out, int32_t a, int32_t b) { out = a != b; }
inline void selp_u32(uint32_t &out, uint32_t a, uint32_t b, bool which) { out = which ? a : b; }
inline void elect_sync(bool &elected, uint32_t lanes) {
  __syncwarp(lanes);
  elected = threadIdx.x % 32 == 0;
}

/* ---- shared memory ---- */

template <typename T>
void ld_shared_u8(T &x, uint32_t from) {
  x = *(const uint8_t *)shared_memory(from, 1, 1);
}
template <typename T>
void ld_shared_u32(T &x, uint32_t from) {
  x = *(const uint32_t *)shared_memory(from, 4, 4);
}
template <typename T>
void ld_shared_v2_u32(T &x, T &y, uint32_t from) {
  const uint32_t *at = (const uint32_t *)shared_memory(from, 8, 8);
  x = at[0], y = at[1];
}
template <typename T>
void ld_shared_v4_u32(T &x, T &y, T &z, T &w, uint32_t from) {
  const uint32_t *at = (const uint32_t *)shared_memory(from, 16, 16);
  x = at[0], y = at[1], z = at[2], w = at[3];
}
void cp_async_cg_shared_global(uint32_t to, const void *from, int bytes, int there);
void cp_async_ca_shared_global(uint32_t to, const void *from, int bytes, int there);
inline void cp_async_cg_shared_global(uint32_t to, const void *from, int bytes) {
  cp_async_cg_shared_global(to, from, bytes, bytes);
}
inline void cp_async_ca_shared_global(uint32_t to, const void *from, int bytes) {
  cp_async_ca_shared_global(to, from, bytes, bytes);
}
void cp_async_commit_group();
void cp_async_wait_group(int pending);
void load_tiles(uint32_t *(&out)[4], uint32_t row, bool transposed);
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t &a, uint32_t &b, uint32_t &c,
                                                     uint32_t &d, uint32_t row) {
  uint32_t *out[4] = {&a, &b, &c, &d};
  load_tiles(out, row, false);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t &a, uint32_t &b, uint32_t &c,
                                                           uint32_t &d, uint32_t row) {
  uint32_t *out[4] = {&a, &b, &c, &d};
  load_tiles(out, row, true);
}

/* ---- products of a warp ---- */

/* d = a b + c, fragments as m16n8k16 has them. */
void multiply(bool bf16, float *(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const float (&c)[4]);
#define QM_EMULATE_MMA(name, bf16)                                                                 \
  inline void name(float &d0, float &d1, float &d2, float &d3, uint32_t a0, uint32_t a1,           \
                   uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,         \
                   float c2, float c3) {                                                           \
    float *d[4] = {&d0, &d1, &d2, &d3};                                                            \
    multiply(bf16, d, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3});                               \
  }
QM_EMULATE_MMA(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, true)
QM_EMULATE_MMA(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, false)
#undef QM_EMULATE_MMA
/* The same of bytes, unsigned in a and signed in b, fragments as m16n8k32 has them. */
void mma_sync_aligned_m16n8k32_row_col_s32_u8_s8_s32(int32_t &d0, int32_t &d1, int32_t &d2,
                                                     int32_t &d3, uint32_t a0, uint32_t a1,
                                                     uint32_t a2, uint32_t a3, uint32_t b0,
                                                     uint32_t b1, int32_t c0, int32_t c1,
                                                     int32_t c2, int32_t c3);

/* ---- products of a warpgroup ---- */

void wgmma_fence_sync_aligned();
void wgmma_commit_group_sync_aligned();
void wgmma_wait_group_sync_aligned(int pending);
/* Those of the operands that follow the sums: a in registers (four) or shared memory (one). */
void begin_product(bool bf16, int columns, float *const *sums, const uint32_t *fragment, uint64_t a,
                   uint64_t b, bool fresh, bool along);
template <int COLUMNS, typename... Operands>
void begin_product(bool bf16, Operands &&...operands) {
  auto all = std::forward_as_tuple(operands...);
  constexpr size_t SUMS = COLUMNS / 2, REST = sizeof...(Operands) - SUMS;
  float *sums[SUMS];
  [&]<size_t... I>(std::index_sequence<I...>) { ((sums[I] = &std::get<I>(all)), ...); }
  (std::make_index_sequence<SUMS>());
  if constexpr (REST == 9) { /* a0 .. a3, b, scale-d, imm-scale-a, imm-scale-b, imm-trans-b */
    const uint32_t fragment[4] = {std::get<SUMS>(all), std::get<SUMS + 1>(all),
                                  std::get<SUMS + 2>(all), std::get<SUMS + 3>(all)};
    if (std::get<SUMS + 6>(all) != 1 || std::get<SUMS + 7>(all) != 1) die("a wgmma negates");
    begin_product(bf16, COLUMNS, sums, fragment, 0, std::get<SUMS + 4>(all),
                  !std::get<SUMS + 5>(all), std::get<SUMS + 8>(all));
  } else { /* a, b, scale-d, imm-scale-a, imm-scale-b, imm-trans-a, imm-trans-b */
    static_assert(REST == 7, "operands of a wgmma");
    if (std::get<SUMS + 3>(all) != 1 || std::get<SUMS + 4>(all) != 1 ||
        std::get<SUMS + 5>(all) != 0)
      die("a wgmma negates, or transposes a");
    begin_product(bf16, COLUMNS, sums, nullptr, std::get<SUMS>(all), std::get<SUMS + 1>(all),
                  !std::get<SUMS + 2>(all), std::get<SUMS + 6>(all));
  }
}
#define QM_EMULATE_WGMMA(name, columns, bf16)                                                      \
  template <typename... Operands>                                                                  \
  void name(Operands &&...operands) {                                                              \
    begin_product<columns>(bf16, operands...);                                                     \
  }
QM_EMULATE_WGMMA(wgmma_mma_async_sync_aligned_m64n64k16_f32_f16_f16, 64, false)
QM_EMULATE_WGMMA(wgmma_mma_async_sync_aligned_m64n64k16_f32_bf16_bf16, 64, true)
QM_EMULATE_WGMMA(wgmma_mma_async_sync_aligned_m64n128k16_f32_f16_f16, 128, false)
QM_EMULATE_WGMMA(wgmma_mma_async_sync_aligned_m64n128k16_f32_bf16_bf16, 128, true)
#undef QM_EMULATE_WGMMA

/* ---- barriers in shared memory, and tensor copies ---- */

void mbarrier_init_shared__cta_b64(uint32_t barrier, uint32_t arrivals);
void mbarrier_arrive_shared__cta_b64(uint32_t barrier);
void mbarrier_arrive_expect_tx_shared__cta_b64(uint32_t barrier, uint32_t bytes);
void mbarrier_try_wait_parity_shared__cta_b64(bool &done, uint32_t barrier, uint32_t parity);
void cp_async_bulk_tensor_3d_shared__cluster_global_mbarrier__complete_tx__bytes(
    uint32_t to, const CUtensorMap *map, int32_t column, int32_t head, int32_t row,
    uint32_t barrier);
inline void
cp_async_bulk_tensor_3d_shared__cluster_global_mbarrier__complete_tx__bytes_L2__cache_hint(
    uint32_t to, const CUtensorMap *map, int32_t column, int32_t head, int32_t row,
    uint32_t barrier, uint64_t) {
  cp_async_bulk_tensor_3d_shared__cluster_global_mbarrier__complete_tx__bytes(to, map, column, head,
                                                                              row, barrier);
}
void cp_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(uint32_t to,
                                                                       const void *from,
                                                                       uint32_t bytes,
                                                                       uint32_t barrier);
inline void fence_mbarrier_init_release_cluster() {}
inline void fence_proxy_async() {}
inline void griddepcontrol_launch_dependents() {} /* launches come one after another */
inline void griddepcontrol_wait() {}
inline void setmaxnreg_inc_sync_aligned_u32(int) {}
inline void setmaxnreg_dec_sync_aligned_u32(int) {}

/* ---- clusters, of which the device holds none ---- */

inline void bar_sync(int, int) { die("warps meet apart from their block"); }
inline void barrier_cluster_arrive_aligned() { die("a cluster meets"); }
inline void barrier_cluster_wait_aligned() {}
inline void mapa_shared__cluster_u32(uint32_t &, uint32_t, uint32_t) { die("a cluster's memory"); }
inline void ld_shared__cluster_v4_f32(float &, float &, float &, float &, uint32_t) {}

}  // namespace emulate::ptx

#endif
