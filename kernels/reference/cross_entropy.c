/* cross_entropy.c - loss and gradient of softmax and the negative log-likelihood, row by row. */
#include "reference.h"

int32_t qm_reference_check_targets(const qm_cross_entropy_args *args) {
  const int32_t *targets = args->targets.data;
  for (int64_t i = 0; i < args->rows; i++)
    if (targets[i] != args->ignore_index && (targets[i] < 0 || targets[i] >= args->classes))
      return qm_reference_host->fail(
          QM_E_ARGUMENT,
          "argument 'targets': expected classes from 0 to %lld, or %d, got %d at %lld",
          (long long)args->classes - 1, args->ignore_index, targets[i], (long long)i);
  return QM_OK;
}

/* What multiplies the gradient. */
double qm_reference_loss_scale(const qm_cross_entropy_args *args) {
  return args->factor.data == NULL ? args->scale
                                   : args->scale * (double)*(const float *)args->factor.data;
}

int32_t qm_reference_cross_entropy(void *context, const qm_cross_entropy_args *args) {
  (void)context;
  const int32_t status = qm_reference_check_targets(args);
  if (status != QM_OK) return status;
  const int32_t *targets = args->targets.data, dtype = args->logits.dtype;
  const int64_t columns = args->columns;
  const double scale = qm_reference_loss_scale(args);
  for (int64_t i = 0; i < args->rows; i++) {
    const int ignored = targets[i] == args->ignore_index;
    const int64_t row = i * columns;
    double most = -(double)INFINITY, sum = 0.0;
    for (int64_t j = 0; j < columns; j++) {
      const double x = (double)qm_load(args->logits.data, dtype, row + j);
      most = x > most ? x : most;
    }
    for (int64_t j = 0; j < columns; j++)
      sum += exp((double)qm_load(args->logits.data, dtype, row + j) - most);
    ((float *)args->loss.data)[i] =
        ignored ? 0.0f
                : (float)(log(sum) + most -
                          (double)qm_load(args->logits.data, dtype, row + targets[i]));
    for (int64_t j = 0; j < columns && args->dlogits.data != NULL; j++) {
      const double p = exp((double)qm_load(args->logits.data, dtype, row + j) - most) / sum;
      const double gradient = scale * (p - (j == targets[i] ? 1.0 : 0.0));
      qm_store(args->dlogits.data, dtype, row + j, ignored ? 0.0f : (float)gradient);
    }
  }
  return QM_OK;
}
