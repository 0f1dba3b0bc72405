/* copy.c - copies between float types, copies of one type, and fill. References: copy.c there,
** equal to the bit. Memory bound: each element is read and written once. */
#include "vector.h"

enum { CHUNK = 1 << 14 };

static int is_float(int32_t dtype) {
  return dtype == QM_F32 || dtype == QM_F16 || dtype == QM_BF16;
}

int32_t QM_CPU(copy)(void *context, const qm_copy_args *args) {
  const qm_array *x = &args->x, *out = &args->out;
  const int64_t count = out->count;
  if (x->dtype == out->dtype) {
    const int64_t size_bytes = count * qm_element_size(x->dtype);
#pragma omp parallel for schedule(static) if (count >= QM_PARALLEL_MIN)
    for (int64_t i = 0; i < size_bytes; i += 4 * CHUNK)
      memcpy((char *)out->data + i, (const char *)x->data + i,
             (size_t)QM_MIN(4 * CHUNK, size_bytes - i));
    return QM_OK;
  }
  if (!is_float(x->dtype) || !is_float(out->dtype)) return qm_reference_copy(context, args);
#pragma omp parallel for schedule(static) if (count >= QM_PARALLEL_MIN)
  for (int64_t i = 0; i < count; i += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, count - i);
    if (out->dtype == QM_F32) {
      qm_expand((float *)out->data + i, x->data, x->dtype, i, n);
    } else {
      float block[QM_BLOCK];
      qm_narrow(qm_floats(x, i, n, block), out->data, out->dtype, i, n);
    }
  }
  return QM_OK;
}

#define FILL(type)                                                                                 \
  do {                                                                                             \
    type *restrict elements = args->out.data, element;                                             \
    memcpy(&element, &bits, sizeof element);                                                       \
    _Pragma("omp parallel for schedule(static) if (count >= QM_PARALLEL_MIN)") for (int64_t i = 0; \
                                                                                    i < count;     \
                                                                                    i++)           \
        elements[i] = element;                                                                     \
  } while (0)

/* The reference converts one element, whatever its type; here it is repeated. */
int32_t QM_CPU(fill)(void *context, const qm_fill_args *args) {
  const int64_t count = args->out.count;
  int64_t bits = 0;
  qm_fill_args one = *args;
  one.out.data = &bits;
  one.out.count = 1;
  const int32_t status = qm_reference_fill(context, &one);
  if (status != QM_OK) return status;
  switch (qm_element_size(args->out.dtype)) {
    case 1: FILL(int8_t); break;
    case 2: FILL(int16_t); break;
    case 4: FILL(int32_t); break;
    default: FILL(int64_t);
  }
  return QM_OK;
}
