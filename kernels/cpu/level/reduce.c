/* reduce.c - reductions along one dimension, and the sum of squares. References: reduce.c there;
** sums within the rounding of f32 sums of some twenty, which are added up in f64; the rest equal.
** Memory bound.
**
** The work is cut into tiles of TILE_ROWS elements along the reduced dimension by QM_BLOCK across
** it (or, where the elements to reduce are neighbours, runs of RUN). Tiles give partial results,
** and those are put together in order: nothing depends on the number of threads. */
#include <omp.h>
#include <stdlib.h>

#include "vector.h"

enum { LANES = 32, TILE_ROWS = 256, STEP_ROWS = 32, RUN = 1 << 14 };

/* A block's sum, or sum of squares, in LANES sums: one order for all instruction-set levels. */
static float sum_block(const float *x, int64_t n, int squared) {
  float lanes[LANES] = {0.0f};
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; !squared && i < whole; i += LANES)
    for (int32_t lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane];
  for (int64_t i = 0; squared && i < whole; i += LANES)
    for (int32_t lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane] * x[i + lane];
  for (int64_t i = whole; i < n; i++) lanes[i - whole] += squared ? x[i] * x[i] : x[i];
  for (int32_t width = LANES / 2; width > 0; width /= 2)
    for (int32_t lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

static double sum_run(const qm_array *x, int64_t first, int64_t length, int squared) {
  double total = 0.0;
  for (int64_t i = 0; i < length; i += QM_BLOCK) {
    float block[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, length - i);
    total += (double)sum_block(qm_floats(x, first + i, n, block), n, squared);
  }
  return total;
}

/* The largest (of sign * x), or NaN. */
static float largest_run(const qm_array *x, int64_t first, int64_t length, float sign) {
  float lanes[LANES], block[QM_BLOCK];
  for (int32_t lane = 0; lane < LANES; lane++) lanes[lane] = -INFINITY;
  for (int64_t i = 0; i < length; i += QM_BLOCK) {
    const int64_t n = QM_MIN(QM_BLOCK, length - i), whole = n / LANES * LANES;
    const float *values = qm_floats(x, first + i, n, block);
    for (int64_t j = 0; j < whole; j += LANES)
#pragma omp simd
      for (int32_t lane = 0; lane < LANES; lane++) {
        const float value = sign * values[j + lane];
        lanes[lane] = ((value > lanes[lane]) | (value != value)) ? value : lanes[lane];
      }
    for (int64_t j = whole; j < n; j++) {
      const float value = sign * values[j];
      if (value > lanes[j - whole] || value != value) lanes[j - whole] = value;
    }
  }
  for (int32_t width = LANES / 2; width > 0; width /= 2)
#pragma omp simd
    for (int32_t lane = 0; lane < width; lane++) {
      const float value = lanes[lane + width];
      lanes[lane] = ((value > lanes[lane]) | (value != value)) ? value : lanes[lane];
    }
  return lanes[0];
}

static int32_t position_in_run(const qm_array *x, int64_t first, int64_t length) {
  const float largest = largest_run(x, first, length, 1.0f);
  for (int64_t i = 0; i < length; i += QM_BLOCK) {
    float block[QM_BLOCK];
    const int64_t n = QM_MIN(QM_BLOCK, length - i);
    const float *values = qm_floats(x, first + i, n, block);
    for (int64_t j = 0; j < n; j++)
      if (values[j] == largest || values[j] != values[j]) return (int32_t)(i + j);
  }
  return 0;
}

static double reduce_run(const qm_reduce_args *args, int64_t first, int64_t length) {
  if (args->op == QM_MAX) return (double)largest_run(&args->x, first, length, 1.0f);
  if (args->op == QM_MIN) return -(double)largest_run(&args->x, first, length, -1.0f);
  return sum_run(&args->x, first, length, 0);
}

/* Put the partial results of one output element together, `step` apart. */
static double gather_partials(int32_t op, const double *partial, int64_t count, int64_t step) {
  double result = partial[0];
  for (int64_t i = 1; i < count; i++) {
    const double next = partial[i * step];
    if (op == QM_SUM || op == QM_MEAN)
      result += next;
    else if (result == result && (next != next || (op == QM_MAX ? next > result : next < result)))
      result = next;
  }
  return result;
}

static void finish(const qm_reduce_args *args, int64_t i, double result) {
  if (args->op == QM_MEAN) result /= (double)args->length;
  qm_store(args->out.data, args->out.dtype, i, (float)result);
}

/* The elements to reduce are neighbours. */
static int32_t reduce_rows(const qm_reduce_args *args) {
  const int64_t length = args->length, outer = args->outer;
  const int64_t runs = args->op == QM_ARGMAX || length <= RUN ? 1 : (length + RUN - 1) / RUN;
  double *partial = runs == 1 ? NULL : malloc((size_t)(outer * runs) * sizeof *partial);
  if (runs > 1 && partial == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "reduce: the host is out of memory");
#pragma omp parallel for schedule(static) if (args->x.count >= QM_PARALLEL_MIN)
  for (int64_t task = 0; task < outer * runs; task++) {
    const int64_t row = task / runs, from = task % runs * RUN;
    const int64_t n = runs == 1 ? length : QM_MIN(RUN, length - from);
    if (args->op == QM_ARGMAX)
      ((int32_t *)args->out.data)[row] = position_in_run(&args->x, row * length, length);
    else if (runs == 1)
      finish(args, row, reduce_run(args, row * length, length));
    else
      partial[task] = reduce_run(args, row * length + from, n);
  }
  for (int64_t row = 0; runs > 1 && row < outer; row++)
    finish(args, row, gather_partials(args->op, partial + row * runs, runs, 1));
  free(partial);
  return QM_OK;
}

/* Sums of n columns over `rows` rows, `stride` apart. */
static void sum_tile(const qm_array *x, int64_t first, int64_t rows, int64_t stride, int64_t n,
                     double *result) {
  for (int64_t j = 0; j < n; j++) result[j] = 0.0;
  for (int64_t i = 0; i < rows; i += STEP_ROWS) {
    float sum[QM_BLOCK], block[QM_BLOCK];
    for (int64_t j = 0; j < n; j++) sum[j] = 0.0f;
    for (int64_t row = i; row < QM_MIN(rows, i + STEP_ROWS); row++) {
      const float *values = qm_floats(x, first + row * stride, n, block);
#pragma omp simd
      for (int64_t j = 0; j < n; j++) sum[j] += values[j];
    }
    for (int64_t j = 0; j < n; j++) result[j] += (double)sum[j];
  }
}

static void largest_tile(const qm_array *x, int64_t first, int64_t rows, int64_t stride, int64_t n,
                         float sign, double *result) {
  float best[QM_BLOCK], block[QM_BLOCK];
  for (int64_t j = 0; j < n; j++) best[j] = -INFINITY;
  for (int64_t row = 0; row < rows; row++) {
    const float *values = qm_floats(x, first + row * stride, n, block);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const float value = sign * values[j];
      best[j] = ((value > best[j]) | (value != value)) ? value : best[j];
    }
  }
  for (int64_t j = 0; j < n; j++) result[j] = (double)(sign * best[j]);
}

static void position_tile(const qm_array *x, int64_t first, int64_t rows, int64_t stride, int64_t n,
                          int32_t *result) {
  float best[QM_BLOCK], block[QM_BLOCK];
  int32_t at[QM_BLOCK];
  memcpy(best, qm_floats(x, first, n, block), (size_t)n * sizeof *best);
  memset(at, 0, sizeof at);
  for (int64_t row = 1; row < rows; row++) {
    const float *values = qm_floats(x, first + row * stride, n, block);
    const int32_t number = (int32_t)row;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const int wins = (best[j] == best[j]) & ((values[j] > best[j]) | (values[j] != values[j]));
      at[j] = wins ? number : at[j];
      best[j] = wins ? values[j] : best[j];
    }
  }
  memcpy(result, at, (size_t)n * sizeof *result);
}

/* Rows [from, from + rows) of one tile; its results go to partial or, without it, are final. */
static void reduce_tile(const qm_reduce_args *args, int64_t outer, int64_t from, int64_t column,
                        int64_t n, double *partial) {
  const int64_t inner = args->inner, out = outer * inner + column;
  const int64_t first = (outer * args->length + from) * inner + column;
  const int64_t rows = partial == NULL ? args->length : QM_MIN(TILE_ROWS, args->length - from);
  double result[QM_BLOCK];
  if (args->op == QM_ARGMAX) {
    position_tile(&args->x, first, rows, inner, n, (int32_t *)args->out.data + out);
    return;
  }
  if (args->op == QM_MAX || args->op == QM_MIN)
    largest_tile(&args->x, first, rows, inner, n, args->op == QM_MAX ? 1.0f : -1.0f, result);
  else
    sum_tile(&args->x, first, rows, inner, n, result);
  for (int64_t j = 0; partial == NULL && j < n; j++) finish(args, out + j, result[j]);
  if (partial != NULL) memcpy(partial, result, (size_t)n * sizeof *partial);
}

/* The elements to reduce are `inner` apart. */
static int32_t reduce_columns(const qm_reduce_args *args) {
  const int64_t length = args->length, inner = args->inner, outer = args->outer;
  const int64_t across = (inner + QM_BLOCK - 1) / QM_BLOCK;
  const int64_t along = args->op == QM_ARGMAX ? 1 : (length + TILE_ROWS - 1) / TILE_ROWS;
  double *partial = along == 1 ? NULL : malloc((size_t)(outer * along * inner) * sizeof *partial);
  if (along > 1 && partial == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "reduce: the host is out of memory");
#pragma omp parallel for schedule(static) if (args->x.count >= QM_PARALLEL_MIN)
  for (int64_t task = 0; task < outer * along * across; task++) {
    const int64_t column = task % across * QM_BLOCK, tile = task / across;
    reduce_tile(args, tile / along, tile % along * TILE_ROWS, column,
                QM_MIN(QM_BLOCK, inner - column),
                partial == NULL ? NULL : partial + tile * inner + column);
  }
  for (int64_t i = 0; partial != NULL && i < outer * inner; i++) {
    const double *first = partial + i / inner * along * inner + i % inner;
    finish(args, i, gather_partials(args->op, first, along, inner));
  }
  free(partial);
  return QM_OK;
}

int32_t QM_CPU(reduce)(void *context, const qm_reduce_args *args) {
  if (args->x.count == 0) return qm_reference_reduce(context, args);
  return args->inner == 1 ? reduce_rows(args) : reduce_columns(args);
}

static int64_t runs_of(const qm_array *x) { return (x->count + RUN - 1) / RUN; }

/* Runs [first, end) of all the tensors' runs, one after another. */
static void square_runs(const qm_sum_squares_args *args, int64_t first, int64_t end,
                        double *partial) {
  int64_t before = 0; /* runs of earlier tensors */
  for (int64_t i = 0; i < args->count && before < end; i++) {
    const qm_array *x = &args->x[i];
    const int64_t runs = runs_of(x), stop = QM_MIN(runs, end - before);
    for (int64_t run = first < before ? 0 : first - before; run < stop; run++)
      partial[before + run] = sum_run(x, run * RUN, QM_MIN(RUN, x->count - run * RUN), 1);
    before += runs;
  }
}

int32_t QM_CPU(sum_squares)(void *context, const qm_sum_squares_args *args) {
  (void)context;
  int64_t runs = 0, elements = 0;
  for (int64_t i = 0; i < args->count; i++) runs += runs_of(&args->x[i]);
  for (int64_t i = 0; i < args->count; i++) elements += args->x[i].count;
  double *partial = malloc((size_t)(runs + 1) * sizeof *partial);
  if (partial == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "sum_squares: the host is out of memory");
  float *out = args->out.data;
#pragma omp parallel if (elements >= QM_PARALLEL_MIN)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    square_runs(args, runs * thread / threads, runs * (thread + 1) / threads, partial);
  }
  partial[runs] = args->accumulate ? (double)*out : 0.0;
  *out = (float)gather_partials(QM_SUM, partial, runs + 1, 1);
  free(partial);
  return QM_OK;
}
