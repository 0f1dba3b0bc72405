/* adam.h - one Adam step's numbers as the kernels use them: f32, worked out once in f64.
**
** Shared by the dense and the quantized steps, the reference, the CPU and CUDA, so that all of them
** round alike: multiply, add, divide and sqrt each round once, never contracted.
** Source: Kingma and Ba, arXiv 1412.6980; decoupled decay: Loshchilov and Hutter, arXiv 1711.05101;
**         momentum feedback: arXiv 2601.22101.
*/
#ifndef QM_ADAM_H
#define QM_ADAM_H

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "inline.h"
#include "philox.h"

/* One row of what qm_adam_write writes. */
typedef struct qm_adam_numbers {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float grad_scale; /* multiplies the gradient */
  float rate;       /* a: the learning rate with its bias correction */
  float decay;      /* lr * weight_decay */
  float inject;     /* momentum feedback: the moment's share of D * e */
  int32_t skip;     /* not 0: the call changes nothing */
  qm_noise noise;   /* its stream is the kernel's */
  int32_t unused[2];
} qm_adam_numbers;
static_assert(sizeof(qm_adam_numbers) == 16 * sizeof(int32_t), "live is i32 [16]");

QM_INLINE qm_adam_numbers qm_adam_prepare(const qm_adam *adam) {
  const double step = (double)adam->step;
  const double correction2 = adam->correct_bias ? sqrt(1.0 - pow(adam->beta2, step)) : 1.0;
  const double correction1 = adam->correct_bias ? 1.0 - pow(adam->beta1, step) : 1.0;
  const double next1 = adam->correct_bias ? 1.0 - pow(adam->beta1, step + 1.0) : 1.0;
  double inject = 0.0;
  if (adam->beta1 > 0.0 && adam->lr_next > 0.0)
    inject = (1.0 - adam->beta1) / adam->beta1 * next1 / adam->lr_next / correction2;
  qm_adam_numbers numbers;
  memset(&numbers, 0, sizeof numbers);
  numbers.beta1 = (float)adam->beta1;
  numbers.one_minus_beta1 = (float)(1.0 - adam->beta1);
  numbers.beta2 = (float)adam->beta2;
  numbers.one_minus_beta2 = (float)(1.0 - adam->beta2);
  numbers.eps = (float)adam->eps;
  numbers.grad_scale = (float)adam->grad_scale;
  numbers.rate = (float)(adam->lr * (correction2 / correction1));
  numbers.decay = (float)(adam->lr * adam->weight_decay);
  numbers.inject = (float)inject;
  numbers.noise = adam->noise;
  numbers.noise.step = (uint32_t)adam->step;
  return numbers;
}

/* Where a kernel finds its numbers: made on the host, read wherever the kernel runs. */
typedef struct qm_adam_source {
  qm_adam_numbers given;
  const qm_adam_numbers *live; /* or NULL */
  const float *scale;          /* or NULL */
  int32_t is_direction;        /* what arrives is no gradient: scale only says whether to step */
} qm_adam_source;

QM_INLINE qm_adam_source qm_adam_source_of(const qm_adam *adam, const void *live, const void *scale,
                                           int32_t is_direction) {
  qm_adam_source source = {qm_adam_prepare(adam), (const qm_adam_numbers *)live,
                           (const float *)scale, is_direction};
  return source;
}

/* The numbers in force now; where `skip` is set, the kernel leaves everything as it is. */
QM_INLINE qm_adam_numbers qm_adam_in_force(const qm_adam_source *source) {
  qm_adam_numbers numbers = source->live != NULL ? *source->live : source->given;
  if (source->scale == NULL) return numbers;
  const float scale = *source->scale;
  if (!(fabsf(scale) <= FLT_MAX)) numbers.skip = 1;
  if (!source->is_direction) numbers.grad_scale *= scale;
  return numbers;
}

QM_INLINE qm_noise qm_adam_noise(const qm_adam_numbers *numbers, uint32_t stream) {
  qm_noise noise = numbers->noise;
  noise.stream = stream;
  return noise;
}

/* Move one element's moments by its gradient; the direction u. */
QM_INLINE float qm_adam_advance(const qm_adam_numbers *c, float grad, float *m, float *v) {
  const float g = c->grad_scale * grad;
  *m = c->beta1 * *m + c->one_minus_beta1 * g;
  *v = c->beta2 * *v + c->one_minus_beta2 * g * g;
  return *m / (sqrtf(*v) + c->eps);
}
/* The weight after a step along u. */
QM_INLINE float qm_adam_move(const qm_adam_numbers *c, float w, float u) {
  return w - c->rate * u - c->decay * w;
}

/* What the sum of all gradients' squares says about a step. */
typedef struct qm_grad_measure {
  float norm; /* of factor * gradient */
  float
      scale; /* brings gradients to a norm of at most max_norm; NaN where the norm is not finite */
} qm_grad_measure;

QM_INLINE qm_grad_measure qm_grad_measure_of(float squares, double factor, double max_norm) {
  qm_grad_measure measure;
  measure.norm = (float)(sqrt((double)squares) * factor);
  const double norm = (double)measure.norm;
  measure.scale = (float)(norm > max_norm ? factor * (max_norm / norm) : factor);
  if (!(measure.norm <= FLT_MAX)) measure.scale = NAN;
  return measure;
}

/* One random word rounds all that an element's step stores. Rounding to bf16 discards 16 bits and
** wants as many random ones: the weight takes the word's high half, exp_avg the low half,
** exp_avg_sq the sum of both. Each is uniform, so that no result has a bias, and any two are
** independent. A code takes the high 24 bits (qm_uniform_of), where the low half decides but once
** in 2^16 times: exp_avg, which momentum feedback makes depend on how the code was rounded, is
** still rounded without a bias beyond 2^-16 of a step. The three together are dependent; later
** steps see that in the product of both moments' relative errors alone, in the mean below 2^-16.
** Results are 16 bits. */
QM_INLINE uint32_t qm_weight_bits(uint32_t word) { return word >> 16; }
QM_INLINE uint32_t qm_exp_avg_bits(uint32_t word) { return word & 0xFFFFu; }
QM_INLINE uint32_t qm_exp_avg_sq_bits(uint32_t word) { return (word * 0x10001u) >> 16; }

#endif
