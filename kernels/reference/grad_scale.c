/* grad_scale.c - how far a step's gradients are scaled down, and whether it is taken at all.
** Source: Pascanu, Mikolov, Bengio, arXiv 1211.5063 (clipping by the norm). */
#include "adam.h"
#include "reference.h"

int32_t qm_reference_grad_scale(void *context, const qm_grad_scale_args *args) {
  (void)context;
  const qm_grad_measure measure =
      qm_grad_measure_of(*(const float *)args->squares.data, args->factor, args->max_norm);
  *(float *)args->norm.data = measure.norm;
  *(float *)args->scale.data = measure.scale;
  *(int64_t *)args->skipped.data += !(measure.norm <= FLT_MAX);
  return QM_OK;
}
