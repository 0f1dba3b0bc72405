/* random.c - uniform and normal numbers. Reference: random.c there; uniform equal to the bit,
** normal within 1e-8 relative before rounding to f32. */
#include "noise.h"
#include "vector.h"

/* Uniform in [a, b): multiples of 2^-24, scaled in f64 as the reference does. */
static void uniform_block(const qm_random_args *args, const uint32_t *words, float *out,
                          int64_t n) {
  const double a = args->a, b = args->b;
  const double end = b > a ? b : (double)__builtin_inff();
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const float x = (float)(a + (b - a) * ((double)(int32_t)(words[j] >> 8) * 0x1p-24));
    out[j] = (double)x >= end ? (float)a : x; /* rounded up out of [a, b) */
  }
}

/* ln u for u in (0, 1] a normal number: u = 2^e m, m in [3/4, 3/2), ln m = 2 artanh((m-1)/(m+1)),
** whose series to the 13th power is off by less than 1e-11 relative. Nothing cancels near 1. */
static inline double log_of(double u) {
  uint64_t bits;
  memcpy(&bits, &u, sizeof bits);
  const uint64_t shifted = bits - 0x3FE8000000000000u;               /* of 3/4 */
  const double e = (double)(int32_t)(shifted >> 52 << 20) * 0x1p-20; /* wraps to negative */
  const uint64_t fraction = (shifted & 0xFFFFFFFFFFFFFu) + 0x3FE8000000000000u;
  double m;
  memcpy(&m, &fraction, sizeof m);
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 2.0 / 13.0;
  p = p * z + 2.0 / 11.0;
  p = p * z + 2.0 / 9.0;
  p = p * z + 2.0 / 7.0;
  p = p * z + 2.0 / 5.0;
  p = p * z + 2.0 / 3.0;
  p = p * z + 2.0;
  return e * 0.69314718055994531 + p * s;
}

/* Sine and cosine of 2 pi t for t in [0, 1): of the angle to the nearest quarter turn, at most
** pi / 4, by Taylor series (off by less than 1e-10), turned by the quarters. */
static inline void turn_of(double t, double *sine, double *cosine) {
  const int32_t quarter = (int32_t)(4.0 * t + 0.5);
  const double angle = (t - 0.25 * (double)quarter) * 6.2831853071795865, z = angle * angle;
  double s = -1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  s = (s * z + 1.0) * angle;
  double c = 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = c * z + 1.0;
  const double across = (quarter & 1) ? c : s, along = (quarter & 1) ? s : c;
  *sine = (quarter & 2) ? -across : across;
  *cosine = ((quarter + 1) & 2) ? -along : along;
}

/* Elements 2j and 2j + 1 come from one pair of words, by Box and Muller. A block starts even. */
static void normal_block(const qm_random_args *args, const uint32_t *words, float *out) {
#pragma omp simd
  for (int64_t j = 0; j < QM_BLOCK; j += 2) {
    /* Words as signed, for which every level has a conversion: word = signed + 2^31. */
    const double u1 = ((double)(int32_t)(words[j] ^ 0x80000000u) + 2147483649.0) * 0x1p-32;
    const double u2 = ((double)(int32_t)(words[j + 1] ^ 0x80000000u) + 2147483648.0) * 0x1p-32;
    double sine, cosine;
    turn_of(u2, &sine, &cosine);
    const double radius = args->b * __builtin_sqrt(-2.0 * log_of(u1));
    out[j] = (float)(args->a + radius * cosine);
    out[j + 1] = (float)(args->a + radius * sine);
  }
}

int32_t QM_CPU(random)(void *context, const qm_random_args *args) {
  (void)context;
  const int64_t count = args->out.count;
#pragma omp parallel for schedule(static) if (count >= QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    uint32_t words[QM_BLOCK];
    float block[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    qm_noise_words(words, &args->noise, (uint64_t)i, QM_BLOCK);
    if (args->kind == QM_UNIFORM)
      uniform_block(args, words, block, n);
    else
      normal_block(args, words, block);
    qm_narrow(block, args->out.data, args->out.dtype, i, n);
  }
  return QM_OK;
}
