/* integer.h - integers of every width, and what becomes of a number that does not fit. */
#ifndef QM_INTEGER_H
#define QM_INTEGER_H

#include "dtype.h"

QM_INLINE int qm_is_float(int32_t dtype) {
  return dtype == QM_F32 || dtype == QM_F16 || dtype == QM_BF16;
}

QM_INLINE int64_t qm_load_integer(const void *data, int32_t dtype, int64_t i) {
  switch (dtype) {
    case QM_I8: return ((const int8_t *)data)[i];
    case QM_U8: return ((const uint8_t *)data)[i];
    case QM_I16: return ((const int16_t *)data)[i];
    case QM_I32: return ((const int32_t *)data)[i];
    default: return ((const int64_t *)data)[i];
  }
}

QM_INLINE int64_t qm_between(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}
/* Saturating. */
QM_INLINE void qm_store_integer(void *data, int32_t dtype, int64_t i, int64_t x) {
  switch (dtype) {
    case QM_I8: ((int8_t *)data)[i] = (int8_t)qm_between(x, INT8_MIN, INT8_MAX); break;
    case QM_U8: ((uint8_t *)data)[i] = (uint8_t)qm_between(x, 0, UINT8_MAX); break;
    case QM_I16: ((int16_t *)data)[i] = (int16_t)qm_between(x, INT16_MIN, INT16_MAX); break;
    case QM_I32: ((int32_t *)data)[i] = (int32_t)qm_between(x, INT32_MIN, INT32_MAX); break;
    default: ((int64_t *)data)[i] = x;
  }
}

/* Toward zero, saturating; NaN is 0. */
QM_INLINE int64_t qm_to_integer(double x) {
  if (x != x) return 0;
  if (x >= 0x1p63) return INT64_MAX;
  if (x <= -0x1p63) return INT64_MIN;
  return (int64_t)x;
}

/* Element i of out from element i of x, converted. */
QM_INLINE void qm_convert(const void *x, int32_t from, void *out, int32_t to, int64_t i) {
  if (qm_is_float(from) && qm_is_float(to))
    qm_store(out, to, i, qm_load(x, from, i));
  else if (qm_is_float(from))
    qm_store_integer(out, to, i, qm_to_integer((double)qm_load(x, from, i)));
  else if (qm_is_float(to))
    qm_store(out, to, i, (float)qm_load_integer(x, from, i));
  else
    qm_store_integer(out, to, i, qm_load_integer(x, from, i));
}

/* One value, as fill writes it. */
QM_INLINE void qm_store_number(void *out, int32_t to, int64_t i, double value) {
  if (qm_is_float(to))
    qm_store(out, to, i, (float)value);
  else
    qm_store_integer(out, to, i, qm_to_integer(value));
}

#endif
