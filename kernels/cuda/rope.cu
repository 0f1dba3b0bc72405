/* rope.cu - rotary position embedding. Arithmetic of kernels/reference/rope.c.
** Threads lie along the pairs of a head, then along heads, then rows, so that no index is divided;
** a thread's cosines and sines serve all the heads it turns. In place or not: both halves are read
** before either is written. */
#include <initializer_list>
#include <type_traits>

#include "pack.cuh"

/* HEADS: of a row, under way in a thread at once. BLOCKS: on a multiprocessor. */
enum { THREADS = 128, HEADS = 2, BLOCKS = 6, BLOCKS_QUEUED = 64, APPEND_THREADS = 256 };

/* WIDTH elements of a head as they lie in memory, one access. */
template <typename T, int WIDTH>
using packed = std::conditional_t<WIDTH == 1, qm_pack<T, 1>, qm_words<4>>;

/* The packs at one place of a head's first and second half, turned. */
template <typename T, int WIDTH>
static __device__ __forceinline__ void turn(const packed<T, WIDTH> &a, const packed<T, WIDTH> &b,
                                            packed<T, WIDTH> *out, int64_t packs,
                                            const qm_pack<float, WIDTH> &cosine,
                                            const qm_pack<float, WIDTH> &sine, float sign) {
  float p[WIDTH], q[WIDTH];
  if constexpr (WIDTH == 1) {
    p[0] = qm_float(a.at[0]);
    q[0] = qm_float(b.at[0]);
  } else {
    qm_unpack<T>(a, p);
    qm_unpack<T>(b, q);
  }
#pragma unroll
  for (int j = 0; j < WIDTH; j++) {
    const float first = p[j], second = q[j], s = sign * sine.at[j];
    p[j] = first * cosine.at[j] - second * s;
    q[j] = second * cosine.at[j] + first * s;
  }
  if constexpr (WIDTH == 1) {
    out[0] = {{qm_as<T>(p[0])}};
    out[packs] = {{qm_as<T>(q[0])}};
  } else {
    out[0] = qm_repack<T, 4>(p);
    out[packs] = qm_repack<T, 4>(q);
  }
}

/* A thread's packs of several heads are under way while it waits for the position, and then for the
** angles that all of them turn by. */
template <typename T, int WIDTH>
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    rope(qm_rope_args args, qm_cuda_late *late) {
  using pack = packed<T, WIDTH>;
  using angles = qm_pack<float, WIDTH>;
  const int64_t packs = args.head_size / 2 / WIDTH;
  const int32_t heads = (int32_t)args.heads;
  const float sign = args.inverse ? -1.0f : 1.0f;
  const int64_t step = (int64_t)gridDim.x * blockDim.z;
  for (int64_t r = (int64_t)blockIdx.x * blockDim.z + threadIdx.z; r < args.rows; r += step) {
    const int32_t position = ((const int32_t *)args.positions.data)[r];
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const int64_t row = r * heads * 2 * packs + i;
      const pack *x = (const pack *)args.x.data + row;
      pack *out = (pack *)args.out.data + row;
      for (int32_t h = threadIdx.y; h < heads; h += HEADS * blockDim.y) {
        pack first[HEADS], second[HEADS];
#pragma unroll
        for (int k = 0; k < HEADS; k++) {
          const int32_t head = h + k * blockDim.y;
          if (head >= heads) continue;
          first[k] = x[head * 2 * packs];
          second[k] = x[head * 2 * packs + packs];
        }
        if (!qm_index_fits(late, QM_CUDA_OP_rope, position, args.position_count)) break;
        const int64_t at = (int64_t)position * packs + i;
        const angles cosine = ((const angles *)args.cos.data)[at];
        const angles sine = ((const angles *)args.sin.data)[at];
#pragma unroll
        for (int k = 0; k < HEADS; k++) {
          const int32_t head = h + k * blockDim.y;
          if (head >= heads) continue;
          turn<T, WIDTH>(first[k], second[k], out + head * 2 * packs, packs, cosine, sine, sign);
        }
      }
    }
  }
}

/* blockIdx.y goes over the heads of q, then those of k, then those of v, blockDim.y at a time. */
template <typename T, int WIDTH>
static __global__ void rope_append(qm_rope_append_args args, qm_cuda_late *late) {
  using pack = packed<T, WIDTH>;
  using angles = qm_pack<float, WIDTH>;
  const int64_t packs = args.head_size / 2 / WIDTH, all = args.heads + 2 * args.kv_heads;
  const int64_t head = (int64_t)blockIdx.y * blockDim.y + threadIdx.y;
  const int64_t step = (int64_t)gridDim.x * blockDim.z;
  qm_take_turn();
  if (head >= all) return;
  for (int64_t r = (int64_t)blockIdx.x * blockDim.z + threadIdx.z; r < args.rows; r += step) {
    const int32_t position = ((const int32_t *)args.positions.data)[r];
    const int32_t place = ((const int32_t *)args.places.data)[r];
    if (!qm_index_fits(late, QM_CUDA_OP_rope_append, position, args.position_count) ||
        !qm_index_fits(late, QM_CUDA_OP_rope_append, place, args.place_count))
      continue;
    const bool is_query = head < args.heads, is_value = head >= args.heads + args.kv_heads;
    const int64_t kv_head = (head - args.heads) % args.kv_heads;
    const int64_t from =
        (is_query ? r * args.heads + head : r * args.kv_heads + kv_head) * 2 * packs;
    const int64_t to = is_query ? from : (place * args.kv_heads + kv_head) * 2 * packs;
    const qm_array &x = is_query ? args.q : is_value ? args.v : args.k;
    const qm_array &out = is_query ? args.out : is_value ? args.values : args.keys;
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const pack *source = (const pack *)x.data + from + i;
      pack *target = (pack *)out.data + to + i;
      if (is_value) {
        target[0] = source[0];
        target[packs] = source[packs];
        continue;
      }
      turn<T, WIDTH>(source[0], source[packs], target, packs,
                     ((const angles *)args.cos.data)[position * packs + i],
                     ((const angles *)args.sin.data)[position * packs + i], 1.0f);
    }
  }
}

/* Threads along the packs of a half, heads, rows. */
static dim3 block_of(int64_t threads, int64_t packs, int64_t heads) {
  const int64_t x = packs < threads ? packs : threads;
  const int64_t y = heads < threads / x ? heads : threads / x;
  const int64_t z = threads / (x * y) > 64 ? 64 : threads / (x * y); /* 64: the device's limit */
  return dim3((unsigned)x, (unsigned)y, (unsigned)z);
}

/* Call body with the elements that a thread takes at a time, a constant. */
template <typename T, typename Body>
static void with_width(bool aligned, int64_t head_size, Body body) {
  constexpr int WIDTH = 16 / sizeof(T);
  if (aligned && head_size / 2 % WIDTH == 0)
    body(std::integral_constant<int, WIDTH>{});
  else
    body(std::integral_constant<int, 1>{});
}

static bool are_aligned(std::initializer_list<const void *> all) {
  for (const void *one : all)
    if (!qm_aligned(one, 16)) return false;
  return true;
}

int32_t qm_cuda_rope(void *context, const qm_rope_args *args) {
  QM_CUDA_ENTER(context);
  if (args->x.count == 0) return QM_OK;
  const bool aligned = are_aligned({args->x.data, args->out.data, args->cos.data, args->sin.data});
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    with_width<T>(aligned, args->head_size, [&](auto width) {
      const dim3 block =
          block_of(THREADS, args->head_size / 2 / width.value, qm_ceil_div(args->heads, HEADS));
      rope<T, width.value><<<qm_blocks(cuda, args->rows, (int32_t)block.z, BLOCKS_QUEUED), block, 0,
                             cuda->compute>>>(*args, cuda->late_device);
    });
    return qm_cuda_launched(cuda, "rope");
  });
}

int32_t qm_cuda_rope_append(void *context, const qm_rope_append_args *args) {
  QM_CUDA_ENTER(context);
  if (args->q.count == 0) return QM_OK;
  const bool aligned =
      are_aligned({args->q.data, args->k.data, args->v.data, args->out.data, args->keys.data,
                   args->values.data, args->cos.data, args->sin.data});
  return qm_with_float(args->q.dtype, [&](auto element) {
    using T = decltype(element);
    with_width<T>(aligned, args->head_size, [&](auto width) {
      const int64_t all = args->heads + 2 * args->kv_heads;
      const dim3 block = block_of(APPEND_THREADS, args->head_size / 2 / width.value, all);
      const dim3 grid(qm_blocks(cuda, args->rows, (int32_t)block.z),
                      (unsigned)qm_ceil_div(all, block.y));
      qm_launch_early(cuda, rope_append<T, width.value>, grid, block, 0, *args, cuda->late_device);
    });
    return qm_cuda_launched(cuda, "rope_append");
  });
}
