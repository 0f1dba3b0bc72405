/* mpq_linear.c - x W and x W^T for few rows, from packed codes: each block of W is decoded once, to
** f32 in the first-level cache, and serves all rows.
**
** Reference: kernels/reference/mpq_linear.c, within the rounding of sums in f32.
** Cost:      reads w_bit / 8 bytes an element, then 2 operations for each row: with 1 or 2 rows the
**            decoding takes most of the time, from about 8 on the multiplications do.
*/
#include "mpq_block.h"
#include "simd.h"

/* A block of W: 32 packed rows of 128 columns are 16 KiB. Sums in registers: those of TILE rows of
** x with WIDTH vectors, or rows, of W. */
enum { COLUMNS = 128, VECTORS = COLUMNS / QM_LANES, TILE = 4, WIDTH = QM_LANES < 16 ? 2 : 4 };
/* Rows of x at a time: what their sums and operands take lies on the stack. */
enum { ROWS_MAX = 64 };

typedef struct slab {
  float w[QM_MPQ_ROWS][COLUMNS];
} slab;

/* Columns beyond the last are zeros. */
static void decode_slab(slab *out, const qm_mpq_view *q, qm_mpq_block *block, int64_t p) {
  for (int64_t i = 0; i < QM_MPQ_ROWS; i++) {
    qm_mpq_enter_group(block, q, qm_mpq_group(q, p + i));
    qm_mpq_decode_row(out->w[i], q, block, p + i, 0);
    for (int64_t j = block->count; j < COLUMNS; j++) out->w[i][j] = 0.0f;
  }
}

/* sum[row] += x[row] w for `rows` rows (a constant where this is inlined) and WIDTH vectors. */
QM_ALWAYS_INLINE void add_products(float *sum, const float *x, const slab *w, int64_t column,
                                   int32_t rows) {
  qm_vec total[TILE][WIDTH];
  for (int32_t r = 0; r < rows; r++)
    for (int32_t v = 0; v < WIDTH; v++)
      total[r][v] = qm_vec_load(sum + r * COLUMNS + column + v * QM_LANES);
  for (int32_t i = 0; i < QM_MPQ_ROWS; i++)
    for (int32_t r = 0; r < rows; r++)
      for (int32_t v = 0; v < WIDTH; v++)
        total[r][v] = qm_vec_fma(qm_vec_splat(x[r * QM_MPQ_ROWS + i]),
                                 qm_vec_load(&w->w[i][column + v * QM_LANES]), total[r][v]);
  for (int32_t r = 0; r < rows; r++)
    for (int32_t v = 0; v < WIDTH; v++)
      qm_vec_store(sum + r * COLUMNS + column + v * QM_LANES, total[r][v]);
}

/* Columns first .. first + COLUMNS of `rows` rows of out, from x's row m on. */
static void forward(const qm_mpq_linear_args *args, int64_t m, int64_t rows, int64_t first) {
  const qm_mpq_view *q = &args->q;
  qm_mpq_block block = {.first = first, .count = QM_MIN(COLUMNS, q->n - first), .group = -1};
  float sum[ROWS_MAX][COLUMNS], x[ROWS_MAX][QM_MPQ_ROWS];
  slab w;
  memset(sum, 0, (size_t)rows * sizeof *sum);
  for (int64_t p = 0; p < q->k; p += QM_MPQ_ROWS) {
    decode_slab(&w, q, &block, p);
    for (int64_t r = 0; r < rows; r++) {
      if (q->q_perm.data == NULL)
        qm_expand(x[r], args->x.data, args->x.dtype, (m + r) * q->k + p, QM_MPQ_ROWS);
      else
        for (int64_t i = 0; i < QM_MPQ_ROWS; i++)
          x[r][i] = qm_load(args->x.data, args->x.dtype, (m + r) * q->k + qm_mpq_feature(q, p + i));
    }
    int64_t r = 0;
    for (; r + TILE <= rows; r += TILE)
      for (int64_t j = 0; j < COLUMNS; j += WIDTH * QM_LANES)
        add_products(sum[r], x[r], &w, j, TILE);
    for (; r < rows; r++)
      for (int64_t j = 0; j < COLUMNS; j += WIDTH * QM_LANES) add_products(sum[r], x[r], &w, j, 1);
  }
  for (int64_t r = 0; r < rows; r++)
    qm_narrow(sum[r], args->out.data, args->out.dtype, (m + r) * q->n + first, block.count);
}

/* sum[row][i] += x[row] . w[i] for `rows` rows of x and WIDTH of w. */
QM_ALWAYS_INLINE void add_dots(float (*sum)[QM_MPQ_ROWS], float (*x)[COLUMNS], const slab *w,
                               int32_t i, int32_t rows) {
  qm_vec total[TILE][WIDTH] = {0};
  for (int32_t v = 0; v < VECTORS; v++)
    for (int32_t r = 0; r < rows; r++)
      for (int32_t k = 0; k < WIDTH; k++)
        total[r][k] = qm_vec_fma(qm_vec_load(&x[r][v * QM_LANES]),
                                 qm_vec_load(&w->w[i + k][v * QM_LANES]), total[r][k]);
  for (int32_t r = 0; r < rows; r++)
    for (int32_t k = 0; k < WIDTH; k++) sum[r][i + k] += qm_vec_sum(total[r][k]);
}

/* Packed rows p .. p + 32 of W, as columns of `rows` rows of out, from x's row m on. */
static void transposed(const qm_mpq_linear_args *args, int64_t m, int64_t rows, int64_t p) {
  const qm_mpq_view *q = &args->q;
  float sum[ROWS_MAX][QM_MPQ_ROWS], x[ROWS_MAX][COLUMNS];
  slab w;
  memset(sum, 0, (size_t)rows * sizeof *sum);
  for (int64_t first = 0; first < q->n; first += COLUMNS) {
    qm_mpq_block block = {.first = first, .count = QM_MIN(COLUMNS, q->n - first), .group = -1};
    decode_slab(&w, q, &block, p);
    for (int64_t r = 0; r < rows; r++) {
      qm_expand(x[r], args->x.data, args->x.dtype, (m + r) * q->n + first, block.count);
      for (int64_t j = block.count; j < COLUMNS; j++) x[r][j] = 0.0f;
    }
    int64_t r = 0;
    for (; r + TILE <= rows; r += TILE)
      for (int32_t i = 0; i < QM_MPQ_ROWS; i += WIDTH) add_dots(sum + r, x + r, &w, i, TILE);
    for (; r < rows; r++)
      for (int32_t i = 0; i < QM_MPQ_ROWS; i += WIDTH) add_dots(sum + r, x + r, &w, i, 1);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < QM_MPQ_ROWS; i++)
      qm_store(args->out.data, args->out.dtype, (m + r) * q->k + qm_mpq_feature(q, p + i),
               sum[r][i]);
}

int32_t QM_CPU(mpq_linear)(void *context, const qm_mpq_linear_args *args) {
  (void)context;
  const qm_mpq_view *q = &args->q;
  const int64_t size = args->transposed ? q->k : q->n;
  const int64_t step = args->transposed ? QM_MPQ_ROWS : COLUMNS;
  for (int64_t m = 0; m < args->rows; m += ROWS_MAX) {
    const int64_t rows = QM_MIN(ROWS_MAX, args->rows - m);
#pragma omp parallel for schedule(static) if (q->k * q->n > QM_MPQ_SERIAL_MAX)
    for (int64_t at = 0; at < size; at += step) {
      if (args->transposed)
        transposed(args, m, rows, at);
      else
        forward(args, m, rows, at);
    }
  }
  return QM_OK;
}

int32_t QM_CPU(mpq_linear_group)(void *context, const qm_mpq_linear_group_args *group) {
  int32_t status = QM_OK;
  for (int32_t i = 0; i < group->count && status == QM_OK; i++) {
    const qm_mpq_linear_args args = qm_mpq_linear_of(group, i);
    status = QM_CPU(mpq_linear)(context, &args);
  }
  return status;
}
