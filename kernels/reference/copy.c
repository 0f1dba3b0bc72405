/* copy.c - fill, and copies that convert between element types. */
#include "reference.h"

static int is_float(int32_t dtype) {
  return dtype == QM_F32 || dtype == QM_F16 || dtype == QM_BF16;
}

static int64_t load_integer(const void *data, int32_t dtype, int64_t i) {
  switch (dtype) {
    case QM_I8: return ((const int8_t *)data)[i];
    case QM_U8: return ((const uint8_t *)data)[i];
    case QM_I16: return ((const int16_t *)data)[i];
    case QM_I32: return ((const int32_t *)data)[i];
    default: return ((const int64_t *)data)[i];
  }
}

static void store_integer(void *data, int32_t dtype, int64_t i, int64_t x) {
  switch (dtype) {
    case QM_I8:
      ((int8_t *)data)[i] = (int8_t)(x < INT8_MIN ? INT8_MIN : x > INT8_MAX ? INT8_MAX : x);
      break;
    case QM_U8: ((uint8_t *)data)[i] = (uint8_t)(x < 0 ? 0 : x > UINT8_MAX ? UINT8_MAX : x); break;
    case QM_I16:
      ((int16_t *)data)[i] = (int16_t)(x < INT16_MIN ? INT16_MIN : x > INT16_MAX ? INT16_MAX : x);
      break;
    case QM_I32:
      ((int32_t *)data)[i] = (int32_t)(x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x);
      break;
    default: ((int64_t *)data)[i] = x;
  }
}

/* Toward zero, saturating; NaN is 0. */
static int64_t to_integer(double x) {
  if (x != x) return 0;
  if (x >= 0x1p63) return INT64_MAX;
  if (x <= -0x1p63) return INT64_MIN;
  return (int64_t)x;
}

int32_t qm_reference_copy(void *context, const qm_copy_args *args) {
  (void)context;
  const int32_t from = args->x.dtype, to = args->out.dtype;
  for (int64_t i = 0; i < args->out.count; i++) {
    if (is_float(from) && is_float(to))
      qm_store(args->out.data, to, i, qm_load(args->x.data, from, i));
    else if (is_float(from))
      store_integer(args->out.data, to, i, to_integer((double)qm_load(args->x.data, from, i)));
    else if (is_float(to))
      qm_store(args->out.data, to, i, (float)load_integer(args->x.data, from, i));
    else
      store_integer(args->out.data, to, i, load_integer(args->x.data, from, i));
  }
  return QM_OK;
}

int32_t qm_reference_fill(void *context, const qm_fill_args *args) {
  (void)context;
  for (int64_t i = 0; i < args->out.count; i++) {
    if (is_float(args->out.dtype))
      qm_store(args->out.data, args->out.dtype, i, (float)args->value);
    else
      store_integer(args->out.data, args->out.dtype, i, to_integer(args->value));
  }
  return QM_OK;
}
