/* rope.cu - rotary position embedding. Arithmetic of kernels/reference/rope.c.
** Threads lie along the pairs of a head, then along heads, then rows, so that no index is divided;
** a thread's cosines and sines serve all the heads it turns. In place or not: both halves are read
** before either is written. */
#include "device.cuh"

enum { THREADS = 256 };

template <typename T, int WIDTH>
static __global__ void rope(qm_rope_args args, qm_cuda_late *late) {
  using pack = qm_pack<T, WIDTH>;
  using angles = qm_pack<float, WIDTH>;
  const int64_t half = args.head_size / 2, packs = half / WIDTH;
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
        const pack a = ((const pack *)args.x.data)[at], b = ((const pack *)args.x.data)[at + packs];
        pack first, second;
        for (int j = 0; j < WIDTH; j++) {
          const float x = qm_float(a.at[j]), y = qm_float(b.at[j]), s = sign * sine.at[j];
          first.at[j] = qm_as<T>(x * cosine.at[j] - y * s);
          second.at[j] = qm_as<T>(y * cosine.at[j] + x * s);
        }
        ((pack *)args.out.data)[at] = first;
        ((pack *)args.out.data)[at + packs] = second;
      }
    }
  }
}

template <typename T, int WIDTH>
static void launch(qm_cuda *cuda, const qm_rope_args *args) {
  const int64_t packs = args->head_size / 2 / WIDTH, threads = THREADS;
  const int64_t x = packs < threads ? packs : threads;
  const int64_t y = args->heads < threads / x ? args->heads : threads / x;
  const int64_t z = threads / (x * y) > 64 ? 64 : threads / (x * y); /* 64: the device's limit */
  const dim3 block((unsigned)x, (unsigned)y, (unsigned)z);
  rope<T, WIDTH><<<qm_blocks(cuda, args->rows, (int32_t)z), block, 0, cuda->compute>>>(
      *args, cuda->late_device);
}

int32_t qm_cuda_rope(void *context, const qm_rope_args *args) {
  QM_CUDA_ENTER(context);
  if (args->x.count == 0) return QM_OK;
  const bool aligned = qm_aligned(args->x.data, 16) && qm_aligned(args->out.data, 16) &&
                       qm_aligned(args->cos.data, 16) && qm_aligned(args->sin.data, 16);
  return qm_with_float(args->x.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int WIDTH = 16 / sizeof(T);
    if (aligned && args->head_size / 2 % WIDTH == 0)
      launch<T, WIDTH>(cuda, args);
    else
      launch<T, 1>(cuda, args);
    return qm_cuda_launched(cuda, "rope");
  });
}
