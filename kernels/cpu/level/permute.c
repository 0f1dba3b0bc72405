/* permute.c - dimensions in another order. Reference: index.c there. Memory bound.
**
** Where the last dimension stays last, runs of it are copied. Else it changes places with the one
** that is contiguous in x, in tiles that stay in the first-level cache. */
#include "vector.h"

enum { TILE = 32 };

/* The permutation with out's dimensions merged where x steps through two as through one; dimension
** 0 is the innermost. */
typedef struct walk {
  int64_t shape[QM_DIMS_MAX], stride_x[QM_DIMS_MAX], stride_out[QM_DIMS_MAX];
  int32_t ndim;
} walk;

static walk merge(const qm_permute_args *args) {
  walk w = {.ndim = 0};
  int64_t step = 1;
  for (int32_t dim = QM_DIMS_MAX - 1; dim >= 0; dim--) {
    const int64_t extent = args->shape[dim], stride = args->stride_x[dim];
    if (extent == 1) continue;
    const int32_t last = w.ndim - 1;
    if (last >= 0 && stride == w.stride_x[last] * w.shape[last]) {
      w.shape[last] *= extent;
    } else {
      w.shape[w.ndim] = extent;
      w.stride_x[w.ndim] = stride;
      w.stride_out[w.ndim++] = step;
    }
    step *= extent;
  }
  if (w.ndim == 0) w = (walk){.ndim = 1, .shape = {1}, .stride_x = {1}, .stride_out = {1}};
  return w;
}

/* Where the run or tile number `rest` of the dimensions from 1 on, but `skip`, begins. */
static void locate(const walk *w, int64_t rest, int32_t skip, int64_t *at_x, int64_t *at_out) {
  *at_x = *at_out = 0;
  for (int32_t dim = 1; dim < w->ndim; dim++) {
    if (dim == skip) continue;
    *at_x += rest % w->shape[dim] * w->stride_x[dim];
    *at_out += rest % w->shape[dim] * w->stride_out[dim];
    rest /= w->shape[dim];
  }
}

static void copy_runs(const qm_permute_args *args, const walk *w) {
  const int64_t size = qm_element_size(args->x.dtype), length = w->shape[0];
#pragma omp parallel for schedule(static) if (args->out.count >= QM_PARALLEL_MIN)
  for (int64_t run = 0; run < args->out.count / length; run++) {
    int64_t at_x, at_out;
    locate(w, run, 0, &at_x, &at_out);
    memcpy((char *)args->out.data + at_out * size, (const char *)args->x.data + at_x * size,
           (size_t)(length * size));
  }
}

/* out[j * out_stride + i] = x[i * x_stride + j] for i < rows, j < columns. */
#define TRANSPOSE_TILE(type)                                                                       \
  static void transpose_tile_##type(const void *from, int64_t x_stride, void *to,                  \
                                    int64_t out_stride, int64_t rows, int64_t columns) {           \
    const type *x = from;                                                                          \
    type *out = to, tile[TILE][TILE];                                                              \
    for (int64_t i = 0; i < rows; i++) /* gather each column, then write it out whole */           \
      for (int64_t j = 0; j < columns; j++) tile[j][i] = x[i * x_stride + j];                      \
    for (int64_t j = 0; j < columns; j++)                                                          \
      memcpy(out + j * out_stride, tile[j], (size_t)rows * sizeof(type));                          \
  }
TRANSPOSE_TILE(int8_t)
TRANSPOSE_TILE(int16_t)
TRANSPOSE_TILE(int32_t)
TRANSPOSE_TILE(int64_t)

static void transpose_tile(int64_t size, const void *x, int64_t x_stride, void *out,
                           int64_t out_stride, int64_t rows, int64_t columns) {
  switch (size) {
    case 1: transpose_tile_int8_t(x, x_stride, out, out_stride, rows, columns); break;
    case 2: transpose_tile_int16_t(x, x_stride, out, out_stride, rows, columns); break;
    case 4: transpose_tile_int32_t(x, x_stride, out, out_stride, rows, columns); break;
    default: transpose_tile_int64_t(x, x_stride, out, out_stride, rows, columns);
  }
}

/* `swap` is the dimension that is contiguous in x, as dimension 0 is in out. */
static void copy_tiles(const qm_permute_args *args, const walk *w, int32_t swap) {
  const int64_t size = qm_element_size(args->x.dtype);
  const int64_t rows = w->shape[0], columns = w->shape[swap];
  const int64_t down = (rows + TILE - 1) / TILE, across = (columns + TILE - 1) / TILE;
  const int64_t planes = args->out.count / (rows * columns);
#pragma omp parallel for schedule(static) if (args->out.count >= QM_PARALLEL_MIN)
  for (int64_t task = 0; task < planes * down * across; task++) {
    const int64_t row = task % down * TILE, column = task / down % across * TILE;
    int64_t at_x, at_out;
    locate(w, task / (down * across), swap, &at_x, &at_out);
    at_x += row * w->stride_x[0] + column;
    at_out += column * w->stride_out[swap] + row;
    transpose_tile(size, (const char *)args->x.data + at_x * size, w->stride_x[0],
                   (char *)args->out.data + at_out * size, w->stride_out[swap],
                   QM_MIN(TILE, rows - row), QM_MIN(TILE, columns - column));
  }
}

int32_t QM_CPU(permute)(void *context, const qm_permute_args *args) {
  (void)context;
  if (args->out.count == 0) return QM_OK;
  const walk w = merge(args);
  int32_t swap = 0;
  while (swap < w.ndim - 1 && w.stride_x[swap] != 1) swap++;
  if (swap == 0)
    copy_runs(args, &w);
  else
    copy_tiles(args, &w, swap);
  return QM_OK;
}
