/* index.c - moving elements about: permutation, gather, scatter. */
#include "reference.h"

int32_t qm_reference_permute(void *context, const qm_permute_args *args) {
  (void)context;
  const size_t size = (size_t)qm_element_size(args->x.dtype);
  for (int64_t i = 0; i < args->out.count; i++) {
    int64_t rest = i, at = 0;
    for (int32_t dim = QM_DIMS_MAX - 1; dim >= 0; dim--) {
      at += rest % args->shape[dim] * args->stride_x[dim];
      rest /= args->shape[dim];
    }
    memcpy((char *)args->out.data + (size_t)i * size,
           (const char *)args->x.data + (size_t)at * size, size);
  }
  return QM_OK;
}

/* Every index is looked at before anything is written. */
static int32_t check_index(const qm_gather_args *args) {
  const int32_t *index = args->index.data;
  for (int64_t i = 0; i < args->r; i++)
    if (index[i] < 0 || index[i] >= args->v)
      return qm_reference_host->fail(
          QM_E_ARGUMENT, "argument 'index': expected numbers from 0 to %lld, got %d at %lld",
          (long long)args->v - 1, index[i], (long long)i);
  return QM_OK;
}

int32_t qm_reference_gather(void *context, const qm_gather_args *args) {
  (void)context;
  const int32_t status = check_index(args);
  if (status != QM_OK) return status;
  const int32_t *index = args->index.data, from = args->x.dtype, to = args->out.dtype;
  const size_t row_bytes = (size_t)(args->c * qm_element_size(from));
  for (int64_t i = 0; i < args->r; i++) {
    if (from == to)
      memcpy((char *)args->out.data + (size_t)i * row_bytes,
             (const char *)args->x.data + (size_t)index[i] * row_bytes, row_bytes);
    else
      for (int64_t j = 0; j < args->c; j++)
        qm_store(args->out.data, to, i * args->c + j,
                 qm_load(args->x.data, from, index[i] * args->c + j));
  }
  return QM_OK;
}

int32_t qm_reference_scatter_add(void *context, const qm_scatter_add_args *args) {
  (void)context;
  const int32_t status = check_index(args);
  if (status != QM_OK) return status;
  const int32_t *index = args->index.data;
  float *out = args->out.data;
  for (int64_t i = 0; i < args->r; i++)
    for (int64_t j = 0; j < args->c; j++)
      out[index[i] * args->c + j] += qm_load(args->x.data, args->x.dtype, i * args->c + j);
  return QM_OK;
}

int32_t qm_reference_scatter(void *context, const qm_scatter_args *args) {
  (void)context;
  const int32_t status = check_index(args);
  if (status != QM_OK) return status;
  const int32_t *index = args->index.data;
  const size_t row_bytes = (size_t)(args->c * qm_element_size(args->x.dtype));
  for (int64_t i = 0; i < args->r; i++)
    memcpy((char *)args->out.data + (size_t)index[i] * row_bytes,
           (const char *)args->x.data + (size_t)i * row_bytes, row_bytes);
  return QM_OK;
}
