/* adam.h - one Adam step's numbers as the kernels use them: f32, worked out once in f64.
**
** Shared by the dense and the quantized steps, the reference, the CPU and CUDA, so that all of them
** round alike: multiply, add, divide and sqrt each round once, never contracted.
** Source: Kingma and Ba, arXiv 1412.6980; decoupled decay: Loshchilov and Hutter, arXiv 1711.05101.
*/
#ifndef QM_ADAM_H
#define QM_ADAM_H

#include <math.h>

#include "inline.h"
#include "philox.h"

typedef struct qm_adam_numbers {
  float beta1, rest1; /* rest1 = 1 - beta1 */
  float beta2, rest2;
  float eps, grad_scale;
  float rate;  /* a: the learning rate with its bias correction */
  float decay; /* lr * weight_decay */
} qm_adam_numbers;

/* The learning rate a with its bias correction. */
QM_INLINE float qm_adam_rate(const qm_adam *adam) {
  const double step = (double)adam->step;
  const double correction =
      adam->correct_bias == 0 ? 1.0
                              : sqrt(1.0 - pow(adam->beta2, step)) / (1.0 - pow(adam->beta1, step));
  return (float)(adam->lr * correction);
}

QM_INLINE qm_adam_numbers qm_adam_prepare(const qm_adam *adam) {
  const qm_adam_numbers numbers = {
      .beta1 = (float)adam->beta1,
      .rest1 = (float)(1.0 - adam->beta1),
      .beta2 = (float)adam->beta2,
      .rest2 = (float)(1.0 - adam->beta2),
      .eps = (float)adam->eps,
      .grad_scale = (float)adam->grad_scale,
      .rate = qm_adam_rate(adam),
      .decay = (float)(adam->lr * adam->weight_decay),
  };
  return numbers;
}

/* Random bits of bf16 moments. Rounding to bf16 discards 16 bits and wants as many random ones: one
** word of the element, of stream QM_STREAM_EXP_AVG, serves both moments. exp_avg takes the low half
** and exp_avg_sq the high half, also where the other is f32. Both results are 16 bits. */
QM_INLINE uint32_t qm_exp_avg_bits(uint32_t word) { return word & 0xFFFFu; }
QM_INLINE uint32_t qm_exp_avg_sq_bits(uint32_t word) { return word >> 16; }

#endif
