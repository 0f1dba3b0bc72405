/* mpq_linear.cuh - products with packed 4-bit codes on tensor cores: what both directions share.
**
** mma.m16n8k16 multiplies a 16 x 16 piece of W (or W^T), decoded in registers, with 8 rows of x. A
** lane's four operand registers hold pairs along the summed dimension, and which elements those are
** is free as long as x's registers agree; so every lane decodes whole words that it loaded itself.
**
** Of a block's warps, `wide` stand side by side over the output and the others, `deep` of them,
** split the sum; grid.y splits it further. Operands come through a ring of stages that cp.async
** fills: each lane's own words, and x for the whole block. At the end the warps' sums meet in
** shared memory, and those of splits in scratch, where the block that comes last adds them in
** order: the same bits every time.
*/
#ifndef QM_MPQ_LINEAR_CUH
#define QM_MPQ_LINEAR_CUH

#include <type_traits>

#include "mma.cuh"

namespace mpq_linear {

constexpr int TICKETS = 4096;

struct task {
  const void *x, *scales, *zeros;
  const uint32_t *words;
  void *out;
  float *partial;                      /* [splits, rows, outputs] where splits > 1 */
  int64_t rows, k, n, length, outputs; /* of the sum and of a row of out: k and n, or n and k */
  int32_t group_size, asym, zero_offset, bf16_scales;
  float zero_top;     /* 2^23 - zero_offset */
  int32_t first_tile; /* the grid's first block column that is this product's, see task_group */
  int32_t spans; /* stages of a warp: each takes so many steps of `span` elements along the sum */
};

/* Products of the same x, side by side in one grid. */
struct task_group {
  task part[QM_MPQ_GROUP_MAX];
  int32_t count;
};

/* How many blocks of a tile have left their sums; 0 between launches. */
static __device__ uint32_t tickets[TICKETS];

/* How a product is cut. A warp has `chunks` pieces of OUTPUTS outputs; a stage holds `vectors` of
** 16 bytes of codes a lane, vectors / chunks of them along the sum, STEP elements each. */
template <typename T_, int TILES, int WARPS, int WIDE, int CHUNKS, int VECTORS, int STAGES,
          int BLOCKS>
struct shape {
  using T = T_;
  static constexpr int tiles = TILES, rows = 8 * TILES, warps = WARPS, threads = 32 * WARPS;
  static constexpr int wide = WIDE, deep = WARPS / WIDE, chunks = CHUNKS, vectors = VECTORS;
  static constexpr int units = VECTORS / CHUNKS, stages = STAGES, blocks = BLOCKS;
};

template <typename S, int OUTPUTS, int STEP>
struct layout {
  static constexpr int tile = S::chunks * OUTPUTS, columns = S::wide * tile;
  static constexpr int span = S::units * STEP, parts = span / 8;
  /* Bytes from a row of x to the next: a lane reads STEP / 2 bytes, four lanes a row side by side,
  ** and the rows that one access takes must not share banks. */
  static constexpr int pad = STEP * 2;
  static constexpr int x_row = S::deep * span * 2;
  static constexpr int x_stride = x_row + (pad + 128 - x_row % 128) % 128;
  static constexpr int words_bytes = S::vectors * S::threads * 16;
  static constexpr int stage_bytes = words_bytes + S::rows * x_stride;
  static constexpr int sums_stride = S::rows * columns; /* from a warp's to the next */
  static constexpr int sums_bytes = S::deep * sums_stride * 4;
  static constexpr int bytes =
      S::stages * stage_bytes > sums_bytes ? S::stages *stage_bytes : sums_bytes;
};

/* ---- 16-bit pairs in registers ---- */

template <typename T>
struct pair_of;
template <>
struct pair_of<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static constexpr uint32_t magic = 0x43004300u; /* 128: its last place is 1 */
  static constexpr float bias = 128.0f;
};
template <>
struct pair_of<__half> {
  using type = __half2;
  static constexpr uint32_t magic = 0x64006400u; /* 1024 */
  static constexpr float bias = 1024.0f;
};

template <typename T>
__device__ __forceinline__ typename pair_of<T>::type as_pair(uint32_t x) {
  return *reinterpret_cast<typename pair_of<T>::type *>(&x);
}
template <typename P>
__device__ __forceinline__ uint32_t as_bits(P x) {
  return *reinterpret_cast<uint32_t *>(&x);
}

/* (bits & mask) | magic: one instruction with both constants in registers */
__device__ __forceinline__ uint32_t masked(uint32_t bits, uint32_t mask, uint32_t magic) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(bits), "r"(mask), "r"(magic));
  return out;
}
/* The codes in bits 0..3 and 16..19, each more by `bias`. */
template <typename T>
__device__ __forceinline__ uint32_t biased(uint32_t codes) {
  return masked(codes, 0x000F000Fu, pair_of<T>::magic);
}

/* A scale, or a zero, of 16 bits, the lower ones. */
__device__ __forceinline__ float scale_of(uint32_t bits, int32_t is_bf16) {
  return is_bf16 ? __uint_as_float(bits << 16)
                 : __half2float(__ushort_as_half((unsigned short)bits));
}

/* Keep x in its register: the compiler would rather compute thread indices again and again. */
__device__ __forceinline__ int32_t kept(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

/* ---- stages, by addresses of shared memory in 32 bits ---- */

/* Through the first cache: past it (.cg), one row took a third longer on an H200. */
__device__ __forceinline__ void copy_async(int32_t to, const void *from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
template <int BYTES>
__device__ __forceinline__ void copy_async(int32_t to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(to), "l"(from), "n"(BYTES)
               : "memory");
}
__device__ __forceinline__ uint4 read_16(int32_t from) {
  uint4 out;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "r"(from)
               : "memory");
  return out;
}
__device__ __forceinline__ uint32_t read_4(uint32_t from) {
  uint32_t out;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(out) : "r"(from) : "memory");
  return out;
}
__device__ __forceinline__ uint32_t read_1(uint32_t from) {
  uint32_t out;
  asm volatile("ld.shared.u8 %0, [%1];\n" : "=r"(out) : "r"(from) : "memory");
  return out;
}
__device__ __forceinline__ uint2 read_8(int32_t from) {
  uint2 out;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n"
               : "=r"(out.x), "=r"(out.y)
               : "r"(from)
               : "memory");
  return out;
}

/* A thread's share of x: the same 8 elements of a span, of one warp of the sum, in some rows. */
template <typename S, typename L>
struct x_loader {
  static constexpr int row_step = S::threads / (L::parts * S::deep), pieces = S::rows / row_step;
  static_assert(row_step > 0 && S::rows % row_step == 0 && pieces > 0, "x fills whole threads");
  const uint16_t *from;
  int64_t stride;
  int32_t count, left, to; /* rows of x among the pieces; stages before the elements end */

  __device__ __forceinline__ x_loader(const task &p, int64_t length, char *memory) {
    const int part = threadIdx.x % L::parts, warp = threadIdx.x / L::parts % S::deep;
    const int first_row = threadIdx.x / (L::parts * S::deep);
    const int64_t first = ((int64_t)blockIdx.y * S::deep + warp) * p.spans * L::span + part * 8;
    const int64_t stages = (length - first + L::span - 1) / L::span;
    left = first >= length ? 0 : stages < p.spans ? (int32_t)stages : p.spans;
    count = kept(((int32_t)p.rows - first_row + row_step - 1) / row_step);
    stride = row_step * length;
    from = (const uint16_t *)p.x + first_row * length + first;
    to = kept(L::words_bytes + first_row * L::x_stride + (warp * L::parts + part) * 16);
    for (int i = 0; i < pieces; i++) /* rows that x lacks stay zeros */
      for (int stage = 0; stage < S::stages && i >= count; stage++)
        *(uint4 *)(memory + stage * L::stage_bytes + to + i * row_step * L::x_stride) =
            make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void load(int32_t stage) {
#pragma unroll
    for (int i = 0; i < pieces; i++)
      if (i < count)
        copy_async(stage + to + i * row_step * L::x_stride, from + i * stride, left > 0);
    left--;
    from += L::span;
  }
};

/* ---- the end ---- */

/* A lane's sums of x W, to `out` at its four columns. sums: [piece of 32 columns][columns 2 j and
** 2 j + 1][8 rows]. */
template <typename L, int CHUNKS, int TILES>
__device__ __forceinline__ void put_sums(float *out, int t,
                                         const float (&sums)[CHUNKS][2][TILES][4]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int b = 0; b < TILES; b++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        *(float4 *)(out + (8 * b + 2 * t + i) * L::columns + 32 * c) = make_float4(
            sums[c][0][b][i], sums[c][0][b][i + 2], sums[c][1][b][i], sums[c][1][b][i + 2]);
}

/* Add the sums of the block's warps, [rows][columns] of each in shared memory, and of the
** splits. */
template <typename S, typename L>
__device__ __forceinline__ void finish(const float *sums, const task &p, int64_t outputs) {
  using T = typename S::T;
  const int64_t first = ((int64_t)blockIdx.x - p.first_tile) * L::columns;
  const bool split = gridDim.y > 1;
  const int32_t rows = (int32_t)p.rows;
  for (int i = threadIdx.x; i < rows * L::columns; i += S::threads) {
    const int64_t row = i / L::columns, column = first + i % L::columns;
    if (column >= outputs) continue;
    float sum = sums[i];
#pragma unroll
    for (int j = 1; j < S::deep; j++) sum += sums[j * L::sums_stride + i];
    if (split)
      __stcg(p.partial + (blockIdx.y * p.rows + row) * outputs + column, sum);
    else
      ((T *)p.out)[row * outputs + column] = qm_as<T>(sum);
  }
  if (!split) return;
  __shared__ uint32_t ticket;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ticket = atomicAdd(tickets + blockIdx.x, 1u);
  __syncthreads();
  if (ticket + 1 != gridDim.y) return;
  __threadfence();
  if (threadIdx.x == 0) tickets[blockIdx.x] = 0;
  for (int i = threadIdx.x; i < rows * L::columns; i += S::threads) {
    const int64_t row = i / L::columns, column = first + i % L::columns;
    if (column >= outputs) continue;
    float sum = 0.0f;
    for (unsigned j = 0; j < gridDim.y; j++)
      sum += __ldcg(p.partial + (j * p.rows + row) * outputs + column);
    ((T *)p.out)[row * outputs + column] = qm_as<T>(sum);
  }
}

/* Let a kernel have so much shared memory; QM_E_UNSUPPORTED where the device has less. */
template <typename Kernel>
static int32_t prepare(const qm_cuda *cuda, Kernel kernel, int32_t bytes, bool (&prepared)[64]) {
  if (prepared[cuda->index % 64]) return QM_OK;
  int most = 0;
  int32_t status = qm_cuda_check(
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda->index),
      "mpq_linear");
  if (status == QM_OK && bytes > most) return QM_E_UNSUPPORTED;
  if (status == QM_OK)
    status = qm_cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "mpq_linear");
  prepared[cuda->index % 64] = status == QM_OK;
  return status;
}

} /* namespace mpq_linear */

#endif
