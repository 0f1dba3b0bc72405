/* index.c - gather, scatter_add, scatter. References: index.c there, equal to the bit. Memory
** bound. */
#include <omp.h>

#include "vector.h"

static int indices_fit(const qm_gather_args *args) {
  const int32_t *index = args->index.data;
  /* A negative number, seen as unsigned, is 2^31 at least. */
  const uint32_t v = (uint32_t)QM_MIN(args->v, (int64_t)1 << 31);
  int outside = 0;
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < args->r; i++) outside |= (uint32_t)index[i] >= v;
  return !outside;
}

int32_t QM_CPU(gather)(void *context, const qm_gather_args *args) {
  if (!indices_fit(args)) return qm_reference_gather(context, args); /* which says where */
  const int32_t *index = args->index.data, from = args->x.dtype, to = args->out.dtype;
  const int64_t c = args->c, row_bytes = c * qm_element_size(from);
#pragma omp parallel for schedule(static) if (args->out.count >= QM_PARALLEL_MIN)
  for (int64_t i = 0; i < args->r; i++) {
    const int64_t row = index[i];
    if (from == to) {
      memcpy((char *)args->out.data + i * row_bytes, (const char *)args->x.data + row * row_bytes,
             (size_t)row_bytes);
    } else if (to == QM_F32) {
      qm_expand((float *)args->out.data + i * c, args->x.data, from, row * c, c);
    } else if (from == QM_F32) {
      qm_narrow((const float *)args->x.data + row * c, args->out.data, to, i * c, c);
    } else {
      for (int64_t j = 0; j < c; j += QM_BLOCK) {
        float block[QM_BLOCK];
        const int64_t n = QM_MIN(QM_BLOCK, c - j);
        qm_expand(block, args->x.data, from, row * c + j, n);
        qm_narrow(block, args->out.data, to, i * c + j, n);
      }
    }
  }
  return QM_OK;
}

/* Columns [first, last) of every row, in the order of the rows. */
static void add_columns(const qm_scatter_add_args *args, int64_t first, int64_t last) {
  const int32_t *index = args->index.data;
  for (int64_t i = 0; i < args->r; i++)
    for (int64_t j = first; j < last; j += QM_BLOCK) {
      float block[QM_BLOCK];
      const int64_t n = QM_MIN(QM_BLOCK, last - j);
      const float *x = qm_floats(&args->x, i * args->c + j, n, block);
      float *out = (float *)args->out.data + index[i] * args->c + j;
#pragma omp simd
      for (int64_t k = 0; k < n; k++) out[k] += x[k];
    }
}

/* Each thread has columns of its own, so that the order of the sums is the rows' for any number. */
int32_t QM_CPU(scatter_add)(void *context, const qm_scatter_add_args *args) {
  if (!indices_fit(args)) return qm_reference_scatter_add(context, args);
  enum { LINE = 16 }; /* f32 in a cache line */
  const int64_t lines = (args->c + LINE - 1) / LINE;
#pragma omp parallel if (args->x.count >= QM_PARALLEL_MIN && lines > 1)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = lines * thread / threads * LINE;
    const int64_t last = lines * (thread + 1) / threads * LINE;
    add_columns(args, first, QM_MIN(last, args->c));
  }
  return QM_OK;
}

int32_t QM_CPU(scatter)(void *context, const qm_scatter_args *args) {
  if (args->x.count < QM_PARALLEL_MIN || !indices_fit(args))
    return qm_reference_scatter(context, args);
  const int32_t *index = args->index.data;
  const int64_t row_bytes = args->c * qm_element_size(args->x.dtype);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < args->r; i++)
    memcpy((char *)args->out.data + index[i] * row_bytes,
           (const char *)args->x.data + i * row_bytes, (size_t)row_bytes);
  return QM_OK;
}
