/* random.c - uniform and normal numbers from Philox. Source: philox.h; Box and Muller (1958). */
#include "reference.h"

int32_t qm_reference_random(void *context, const qm_random_args *args) {
  (void)context;
  for (int64_t i = 0; i < args->out.count; i++) {
    float x;
    if (args->kind == QM_UNIFORM) {
      x = (float)(args->a + (args->b - args->a) * (double)qm_uniform(&args->noise, (uint64_t)i));
      if ((double)x >= args->b && args->b > args->a)
        x = (float)args->a; /* rounded up out of [a, b) */
    } else {
      /* Elements 2j and 2j+1 share one pair of uniforms: cosine for the even, sine for the odd. */
      const uint64_t even = (uint64_t)i & ~(uint64_t)1;
      const double u1 = ((double)qm_bits(&args->noise, even) + 1.0) * 0x1p-32; /* (0, 1] */
      const double u2 = (double)qm_bits(&args->noise, even + 1) * 0x1p-32;
      const double radius = sqrt(-2.0 * log(u1)), angle = 2.0 * 3.14159265358979323846 * u2;
      x = (float)(args->a + args->b * radius * (i & 1 ? sin(angle) : cos(angle)));
    }
    qm_store(args->out.data, args->out.dtype, i, x);
  }
  return QM_OK;
}
