/* rope.cu - rotary position embedding. Arithmetic of kernels/reference/rope.c.
** Threads lie along the pairs of a head, then along heads, then rows, so that no index is divided;
** a thread's cosines and sines serve all the heads it turns. In place or not: both halves are read
** before either is written. */
#include <initializer_list>
#include <type_traits>

#include "device.cuh"

enum { THREADS = 256 };

/* A row of a head as packs: `packs` of them to each half. */
template <typename T, int WIDTH>
static __device__ __forceinline__ void turn(const qm_pack<T, WIDTH> *x, qm_pack<T, WIDTH> *out,
                                            int64_t packs, const qm_pack<float, WIDTH> &cosine,
                                            const qm_pack<float, WIDTH> &sine, float sign) {
  const qm_pack<T, WIDTH> a = x[0], b = x[packs];
  qm_pack<T, WIDTH> first, second;
#pragma unroll
  for (int j = 0; j < WIDTH; j++) {
    const float p = qm_float(a.at[j]), q = qm_float(b.at[j]), s = sign * sine.at[j];
    first.at[j] = qm_as<T>(p * cosine.at[j] - q * s);
    second.at[j] = qm_as<T>(q * cosine.at[j] + p * s);
  }
  out[0] = first;
  out[packs] = second;
}

template <typename T, int WIDTH>
static __global__ void rope(qm_rope_args args, qm_cuda_late *late) {
  using pack = qm_pack<T, WIDTH>;
  using angles = qm_pack<float, WIDTH>;
  const int64_t packs = args.head_size / 2 / WIDTH;
  const int32_t *positions = (const int32_t *)args.positions.data;
  const float sign = args.inverse ? -1.0f : 1.0f;
  const int64_t step = (int64_t)gridDim.x * blockDim.z;
  for (int64_t r = (int64_t)blockIdx.x * blockDim.z + threadIdx.z; r < args.rows; r += step) {
    const int32_t position = positions[r];
    if (!qm_index_fits(late, QM_CUDA_OP_rope, position, args.position_count)) continue;
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const angles cosine = ((const angles *)args.cos.data)[position * packs + i];
      const angles sine = ((const angles *)args.sin.data)[position * packs + i];
      for (int64_t h = threadIdx.y; h < args.heads; h += blockDim.y) {
        const int64_t at = (r * args.heads + h) * 2 * packs + i;
        turn<T, WIDTH>((const pack *)args.x.data + at, (pack *)args.out.data + at, packs, cosine,
                       sine, sign);
      }
    }
  }
}

/* blockIdx.y goes over the heads of q, then those of k, then those of v, blockDim.y at a time. */
template <typename T, int WIDTH>
static __global__ void rope_append(qm_rope_append_args args, qm_cuda_late *late) {
  using pack = qm_pack<T, WIDTH>;
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
      turn<T, WIDTH>(source, target, packs, ((const angles *)args.cos.data)[position * packs + i],
                     ((const angles *)args.sin.data)[position * packs + i], 1.0f);
    }
  }
}

/* Threads along the packs of a half, heads, rows. */
static dim3 block_of(int64_t packs, int64_t heads) {
  const int64_t threads = THREADS, x = packs < threads ? packs : threads;
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
      const dim3 block = block_of(args->head_size / 2 / width.value, args->heads);
      rope<T, width.value>
          <<<qm_blocks(cuda, args->rows, (int32_t)block.z), block, 0, cuda->compute>>>(
              *args, cuda->late_device);
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
      const dim3 block = block_of(args->head_size / 2 / width.value, all);
      const dim3 grid(qm_blocks(cuda, args->rows, (int32_t)block.z),
                      (unsigned)qm_ceil_div(all, block.y));
      qm_launch_early(cuda, rope_append<T, width.value>, grid, block, 0, *args, cuda->late_device);
    });
    return qm_cuda_launched(cuda, "rope_append");
  });
}
