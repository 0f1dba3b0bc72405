/* mpq_linear_row.cuh - x W for one row, W of 4-bit codes, on Hopper: the codes come ahead of x.
**
** What one row's product must not do is wait. So a block asks for as many codes as shared memory
** holds before the kernels that make x have ended, in tensor copies of 32 KB; but for no more than
** two such stages at a time: memory is kept busy by them, and what asks for little in the meantime,
** as those kernels do, need not wait in line behind all of it.
**
** A stage is 2048 features of a tile of 32 columns: 128 features, a unit, for each warp. A block
** takes every gridDim.x-th tile; a last warp asks for their stages, the others add theirs up, and
** at the end their sums meet.
**
** Nor must it work much for a code. Tensor cores multiply bytes: operand A is a word's even
** nibbles, or its odd ones where they lie, 16 times as much; operand B is x in fixed point, of 20
** bits and a sign by a group's largest, as three digits of 7 bits in three columns. So sums of
** codes times x are exact until a group's scale comes to them, and x, which has 8 or 11 bits,
** loses less than 2^-20 of the group's largest.
*/
#ifndef QM_MPQ_LINEAR_ROW_CUH
#define QM_MPQ_LINEAR_ROW_CUH

#include "mpq_linear_row_x.cuh"

namespace mpq_linear {

#ifdef QM_HAS_WGMMA_HERE
/* acc += W x for 16 columns and two steps: the words' bytes `mask` lets through times a digit. */
static __device__ __forceinline__ void multiply_nibbles(int32_t (&acc)[4], uint32_t mask,
                                                        const uint32_t (&w)[4], uint32_t b0,
                                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(w[0] & mask), "r"(w[1] & mask), "r"(w[2] & mask), "r"(w[3] & mask), "r"(b0), "r"(b1));
}

/* 16 W x of a group, in two of the lane's columns. Lane (g, t) has word row t of a step's four, of
** four columns, and of x a digit: the one that g % 4 counts, or the last. It gets from the tensor
** cores digits 0 and 1 where t is even, or the last and one that nobody needs, of the first two
** columns (t < 2) or the others. words: of both halves of eight rows, whose pieces lie swizzled. */
template <int STEPS>
static __device__ __forceinline__ void multiply_group(int32_t (&sums)[2], int step,
                                                      const uint32_t (&words)[2], uint32_t x) {
  const int t = threadIdx.x % 4;
  int32_t even[2][4] = {}, odd[2][4] = {}; /* [columns 2 j and 2 j + 1], by nibbles */
#pragma unroll
  for (int s = step; s < step + STEPS; s += 2) {
    const uint4 first = read_16((int32_t)(words[s % 2] + s / 2 * 1024));
    uint4 second = make_uint4(0, 0, 0, 0);
    if (STEPS > 1) second = read_16((int32_t)(words[1] + s / 2 * 1024));
    uint4 b = read_16((int32_t)(x + s / 2 * 192));
    if (STEPS == 1 && s % 2 == 1) b = make_uint4(b.y, 0, b.w, 0);
    const uint32_t w[2][4] = {{first.x, first.y, second.x, second.y},
                              {first.z, first.w, second.z, second.w}};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      multiply_nibbles(even[j], 0x0F0F0F0Fu, w[j], b.x, b.y);
      multiply_nibbles(odd[j], 0xF0F0F0F0u, w[j], b.z, b.w);
    }
  }
  const int32_t upper = t % 2 == 0 ? 128 : 1, lower = t % 2 == 0 ? 1 : 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int32_t both[2];
#pragma unroll
    for (int d = 0; d < 2; d++) {
      const int at = 2 * i + d;
      both[d] = 16 * (t < 2 ? even[0][at] : even[1][at]) + (t < 2 ? odd[0][at] : odd[1][at]);
    }
    sums[i] = both[0] * upper + both[1] * lower;
  }
}

/* What a group adds to the lane's two columns. x: of its digits. scales, zeros: where the two stand
** in shared memory. */
template <bool ASYM>
static __device__ __forceinline__ void add_group(const row_group &p, float (&sum)[2],
                                                 int32_t (&codes)[2], const row_sum &x,
                                                 uint32_t scales, uint32_t zeros) {
  const uint32_t scale_pair = read_4(scales), zero_pair = ASYM ? read_1(zeros) : read_4(zeros);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (ASYM) codes[i] -= 16 * ((int32_t)(zero_pair >> (4 * i) & 15u) + p.zero_offset) * x.sum;
    float of_group = scale_of(scale_pair >> (16 * i), p.bf16_scales) * (float)codes[i];
    if (!ASYM) {
      const float zero = scale_of(zero_pair >> (16 * i), p.bf16_scales);
      of_group = fmaf(-16.0f * zero, (float)x.sum, of_group);
    }
    sum[i] = fmaf(x.unit, of_group, sum[i]);
  }
}
#endif

template <typename T, bool ASYM, int GROUPS>
static __global__ __launch_bounds__(row_layout<ASYM, GROUPS>::threads) void multiply_row(
    const __grid_constant__ row_group p) {
#ifdef QM_HAS_WGMMA_HERE
  using L = row_layout<ASYM, GROUPS>;
  extern __shared__ __align__(16) char shared[];
  const row_memory<L> at(qm_align_tile(shared), p.slots);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int32_t x_stages = L::x_stages(p.stages);
  row_sum *const x_sums = (row_sum *)(at.x + x_stages * L::warps * L::x_bytes);
  float *const sums = (float *)(x_sums + x_stages * L::warps * GROUPS * 2); /* [tile][warp] */
  if (threadIdx.x == 32 * L::warps) {
    for (int32_t i = 0; i < p.slots; i++) {
      qm_barrier_open(at.full + i * 8, 1);
      qm_barrier_open(at.empty + i * 8, L::warps);
    }
    qm_barriers_ready();
  }
  __syncthreads();
  qm_let_next_begin();

  if (warp == L::warps) {
    if (lane == 0) ask_for_stages(p, at);
  } else {
    char *const my_x = at.x + warp * x_stages * L::x_bytes;
    row_sum *const my_x_sums = x_sums + warp * x_stages * GROUPS * 2;
    const uint32_t my_words = at.words + warp * 2048 + t * 128;
    /* Eight lanes read at once, with two g; by pieces 4 apart they keep out of each other's banks.
    ** */
    const int piece = g / 2 + g % 2 * 4;
    const uint32_t pieces[2] = {(uint32_t)(piece ^ t) * 16, (uint32_t)(piece ^ (t + 4)) * 16 + 512};
    const uint32_t digit = qm_shared(my_x) + (uint32_t)(min(g % 4, 2) * 64 + t * 16);
    const uint32_t pair = (uint32_t)(2 * piece + t / 2); /* of columns, the lane's two */
    int32_t slot = 0, phase = 0;
    float *to = sums + warp * L::columns + 4 * piece + t;
    qm_await_previous();
    lay_out_row<T, GROUPS, L>(p, warp, my_x, my_x_sums);
    __syncwarp();
    for (int32_t tile = (int32_t)blockIdx.x; tile < p.tiles; tile += (int32_t)gridDim.x) {
      float sum[2] = {};
      for (int32_t stage = 0; stage < p.stages; stage++) {
        const uint32_t slot_words = my_words + slot * L::words_bytes;
        const uint32_t words[2] = {slot_words + pieces[0], slot_words + pieces[1]};
        qm_barrier_wait(at.full + slot * 8, (uint32_t)phase);
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
          constexpr int STEPS = 4 / GROUPS;
          int32_t codes[2];
          multiply_group<STEPS>(codes, i * STEPS, words, digit + stage * L::x_bytes);
          const int32_t row = (warp * GROUPS + i) >> p.group_shift;
          add_group<ASYM>(
              p, sum, codes, my_x_sums[(stage * GROUPS + i) * 2 + t % 2],
              at.scales + slot * L::scales_bytes + row * 64 + pair * 4,
              at.zeros + slot * L::zeros_bytes + row * L::zero_bytes + (ASYM ? pair : pair * 4));
        }
        qm_barrier_arrive_warp(at.empty + slot * 8);
        if (++slot < p.slots) continue;
        slot = 0;
        phase ^= 1;
      }
      /* Lanes t and t ^ 1 have the digits' parts of two columns, and keep one: the lane's own. */
      const float other = __shfl_xor_sync(0xFFFFFFFFu, t % 2 == 0 ? sum[1] : sum[0], 1);
      *to = (t % 2 == 0 ? sum[0] : sum[1]) + other;
      to += L::warps * L::columns;
    }
  }
  __syncthreads();

  for (int32_t i = threadIdx.x;; i += L::threads) {
    const int32_t tile = (int32_t)blockIdx.x + i / L::columns * (int32_t)gridDim.x;
    if (tile >= p.tiles) return;
    const float *const from = sums + i / L::columns * L::warps * L::columns + i % L::columns;
    float sum = from[0];
#pragma unroll
    for (int w = 1; w < L::warps; w++) sum += from[w * L::columns];
    const row_part &of = p.part[part_at(p, tile, 0)];
    ((T *)of.out)[(tile - of.first_tile) * L::columns + i % L::columns] = qm_as<T>(sum);
  }
#endif
}

} /* namespace mpq_linear */

#endif
