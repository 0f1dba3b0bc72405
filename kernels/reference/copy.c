/* copy.c - fill, and copies that convert between element types. */
#include "integer.h"
#include "reference.h"

int32_t qm_reference_copy(void *context, const qm_copy_args *args) {
  (void)context;
  for (int64_t i = 0; i < args->out.count; i++)
    qm_convert(args->x.data, args->x.dtype, args->out.data, args->out.dtype, i);
  return QM_OK;
}

int32_t qm_reference_fill(void *context, const qm_fill_args *args) {
  (void)context;
  for (int64_t i = 0; i < args->out.count; i++)
    qm_store_number(args->out.data, args->out.dtype, i, args->value);
  return QM_OK;
}
