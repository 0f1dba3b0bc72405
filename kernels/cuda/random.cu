/* random.cu - uniform and normal numbers from Philox, four elements to a thread. Arithmetic of
** kernels/reference/random.c: uniform bits are equal, normal numbers differ by libm's rounding. */
#include "pack.cuh"
#include "philox.h"

enum { THREADS = 256 };

template <typename T>
static __global__ void __launch_bounds__(THREADS)
    uniform(T *out, int64_t count, bool packs, double a, double b, qm_noise noise) {
  const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
  if (i >= count) return;
  uint32_t words[4];
  float v[4];
  qm_philox(&noise, (uint64_t)i >> 2, words);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    v[j] = (float)(a + (b - a) * (double)qm_uniform_of(words[j]));
    if ((double)v[j] >= b && b > a) v[j] = (float)a; /* rounded up out of [a, b) */
  }
  qm_write<4>(out + i, packs && i + 4 <= count, count - i, v);
}

/* Box and Muller: two words to a pair, cosine for the even element, sine for the odd. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    normal(T *out, int64_t count, bool packs, double mean, double deviation, qm_noise noise) {
  const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
  if (i >= count) return;
  uint32_t words[4];
  float v[4];
  qm_philox(&noise, (uint64_t)i >> 2, words);
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const double u1 = ((double)words[j] + 1.0) * 0x1p-32; /* (0, 1] */
    const double u2 = (double)words[j + 1] * 0x1p-32;
    const double radius = sqrt(-2.0 * log(u1)), angle = 2.0 * 3.14159265358979323846 * u2;
    double sine, cosine;
    sincos(angle, &sine, &cosine);
    v[j] = (float)(mean + deviation * radius * cosine);
    v[j + 1] = (float)(mean + deviation * radius * sine);
  }
  qm_write<4>(out + i, packs && i + 4 <= count, count - i, v);
}

int32_t qm_cuda_random(void *context, const qm_random_args *args) {
  QM_CUDA_ENTER(context);
  const int64_t count = args->out.count;
  if (count == 0) return QM_OK;
  return qm_with_float(args->out.dtype, [&](auto element) {
    using T = decltype(element);
    T *out = (T *)args->out.data;
    const unsigned blocks = (unsigned)qm_ceil_div(count, 4 * THREADS);
    const auto kernel = args->kind == QM_UNIFORM ? uniform<T> : normal<T>;
    kernel<<<blocks, THREADS, 0, cuda->compute>>>(out, count, qm_packs<4>(out), args->a, args->b,
                                                  args->noise);
    return qm_cuda_launched(cuda, "random");
  });
}
