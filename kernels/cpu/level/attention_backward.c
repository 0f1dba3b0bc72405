/* attention_backward.c - the gradient of softmax attention over packed sequences. Reference:
** kernels/reference/attention.c, within f32 rounding. Source: Dao, arXiv 2307.08691, algorithm 2:
** the probabilities come again from q, k and the saved log-sum-exp, and delta = dout . out.
**
** One unit of work is one sequence under one key head: dk and dv have one writer, and dq gathers in
** f32 over the key tiles, in order. For each tile of keys K and V are expanded and transposed once,
** then BLOCK_ROWS stacked rows at a time give scores and dP (f32 tiles in cache) and the products
** dq += dS K, dv += P^T dout, dk += dS^T q.
*/
#include <omp.h>
#include <stdlib.h>

#include "attention_tile.h"

enum { BLOCK_ROWS = 64 };

typedef struct workspace {
  float *keys, *values, *dk, *dv; /* [TILE_KEYS, padded] */
  float *keys_t, *values_t;       /* [padded, TILE_KEYS] */
  float *q, *dout;                /* [BLOCK_ROWS, padded] */
  float *p, *ds;                  /* [BLOCK_ROWS, TILE_KEYS] */
  float *dq;                      /* [rows, padded]: all rows of the sequence */
  float *lse, *delta;             /* [rows], lse in base 2 */
} workspace;

static size_t workspace_floats(int64_t padded, int64_t rows) {
  const int64_t tiles = 6 * TILE_KEYS * padded + 2 * BLOCK_ROWS * (padded + TILE_KEYS);
  return (size_t)(tiles + rows * padded + 2 * ((rows + 15) / 16 * 16));
}

static workspace divide(float *memory, int64_t padded, int64_t rows) {
  workspace w;
  float **tiles[] = {&w.keys, &w.values, &w.dk, &w.dv, &w.keys_t, &w.values_t};
  for (size_t i = 0; i < sizeof tiles / sizeof *tiles; i++, memory += TILE_KEYS * padded)
    *tiles[i] = memory;
  w.q = memory;
  w.dout = w.q + BLOCK_ROWS * padded;
  w.p = w.dout + BLOCK_ROWS * padded;
  w.ds = w.p + BLOCK_ROWS * TILE_KEYS;
  w.dq = w.ds + BLOCK_ROWS * TILE_KEYS;
  w.lse = w.dq + rows * padded;
  w.delta = w.lse + (rows + 15) / 16 * 16;
  return w;
}

/* Tile rows row .. row + rows - 1: scores to P = 2^(score - lse), dP to dS = P (dP - delta); zeros
** where a row does not see, and up to the tile's end, for the products over rows read all of it. */
QM_ALWAYS_INLINE void differentiate(const sequence *s, const workspace *w, int64_t row,
                                    int64_t rows, int64_t key, int64_t end, float *p, float *ds) {
  const int32_t masked = !all_seen(s, row, row + rows - 1, key, end);
  for (int64_t i = 0; i < rows; i++, p += TILE_KEYS, ds += TILE_KEYS) {
    const float lse = w->lse[row + i], delta = w->delta[row + i];
    int64_t j = 0;
    for (; j < end; j += QM_LANES) {
      qm_vec x = qm_vec_exp2(qm_vec_load(p + j) - lse);
      qm_vec dx = x * (qm_vec_load(ds + j) - delta);
      if (masked) {
        const qm_ivec mask = seen(s, row + i, key + j);
        x = qm_vec_select(mask, x, (qm_vec){0});
        dx = qm_vec_select(mask, dx, (qm_vec){0});
      }
      qm_vec_store(p + j, x);
      qm_vec_store(ds + j, dx);
    }
    for (; j < TILE_KEYS; j += QM_LANES) {
      qm_vec_store(p + j, (qm_vec){0});
      qm_vec_store(ds + j, (qm_vec){0});
    }
  }
}

static const float ones[TILE_ROWS] = {1.0f, 1.0f, 1.0f,
                                      1.0f,
#if defined(__AVX512F__)
                                      1.0f, 1.0f, 1.0f,
                                      1.0f
#endif
};

/* Rows row .. row + rows - 1, whose q and dout stand in w, against the tile of n keys at `key`. */
static void block_backward(const sequence *s, const workspace *w, int64_t row, int64_t rows,
                           int64_t key, int64_t n) {
  const int64_t padded = s->padded, vectors = padded / QM_LANES;
  int64_t ends[BLOCK_ROWS / TILE_ROWS];
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    const int64_t count = QM_MIN(TILE_ROWS, rows - i);
    const int64_t end = tile_end(s, row + i, row + i + count - 1, key, n);
    const int64_t wide = (end + QM_LANES - 1) / QM_LANES;
    float *p = w->p + i * TILE_KEYS, *ds = w->ds + i * TILE_KEYS;
    const left q = {w->q + i * padded, padded, 1}, dout = {w->dout + i * padded, padded, 1};
    ends[i / TILE_ROWS] = end;
    multiply(count, p, TILE_KEYS, NULL, q, w->keys_t, TILE_KEYS, s->size, wide);
    multiply(count, ds, TILE_KEYS, NULL, dout, w->values_t, TILE_KEYS, s->size, wide);
    differentiate(s, w, row + i, count, key, end, p, ds);
    multiply(count, w->dq + (row + i) * padded, padded, ones, (left){ds, TILE_KEYS, 1}, w->keys,
             padded, end, vectors);
  }
  for (int64_t j = 0; j < n; j += TILE_ROWS) {
    int64_t i = 0; /* the first rows that see any of these keys */
    while (i < rows && ends[i / TILE_ROWS] <= j) i += TILE_ROWS;
    if (i >= rows) continue;
    const int64_t count = QM_MIN(TILE_ROWS, n - j), at = i * TILE_KEYS + j;
    multiply(count, w->dv + j * padded, padded, ones, (left){w->p + at, 1, TILE_KEYS},
             w->dout + i * padded, padded, rows - i, vectors);
    multiply(count, w->dk + j * padded, padded, ones, (left){w->ds + at, 1, TILE_KEYS},
             w->q + i * padded, padded, rows - i, vectors);
  }
}

static void scale_and_narrow(const sequence *s, float *x, float factor, const qm_array *out,
                             int64_t offset) {
  for (int64_t d = 0; d < s->size; d++) x[d] *= factor;
  qm_narrow(x, out->data, out->dtype, offset, s->size);
}

/* The tile of n keys at `key` against all rows that see any of it. */
static void tile_backward(const qm_attention_backward_args *args, const sequence *s,
                          const workspace *w, int64_t key, int64_t n) {
  const float factor = (float)(args->options.scale * LOG2_E);
  const int64_t padded = s->padded, total = s->queries * s->group;
  for (int64_t j = 0; j < n; j++) {
    expand_row(s, &args->k, key_offset(s, key + j), 1.0f, w->keys + j * padded);
    expand_row(s, &args->v, key_offset(s, key + j), 1.0f, w->values + j * padded);
  }
  transpose_tile(s, w->keys, n, w->keys_t);
  transpose_tile(s, w->values, n, w->values_t);
  memset(w->dk, 0, (size_t)(n * padded) * sizeof(float));
  memset(w->dv, 0, (size_t)(n * padded) * sizeof(float));
  for (int64_t row = 0; row < total; row += BLOCK_ROWS) {
    const int64_t rows = QM_MIN(BLOCK_ROWS, total - row);
    if (tile_end(s, row, row + rows - 1, key, n) == 0) continue;
    for (int64_t i = 0; i < rows; i++) {
      expand_row(s, &args->q, query_offset(s, row + i), factor, w->q + i * padded);
      expand_row(s, &args->dout, row_offset(s, row + i), 1.0f, w->dout + i * padded);
    }
    block_backward(s, w, row, rows, key, n);
  }
  /* q carries log2(e), so dk carries it too. */
  for (int64_t j = 0; j < n; j++) {
    scale_and_narrow(s, w->dk + j * padded, (float)LN_2, &args->dk, key_offset(s, key + j));
    scale_and_narrow(s, w->dv + j * padded, 1.0f, &args->dv, key_offset(s, key + j));
  }
}

static void sequence_backward(const qm_attention_backward_args *args, const sequence *s,
                              const workspace *w) {
  const int64_t padded = s->padded, rows = s->queries * s->group;
  for (int64_t row = 0; row < rows; row++) {
    expand_row(s, &args->dout, row_offset(s, row), 1.0f, w->dout);
    expand_row(s, &args->out, row_offset(s, row), 1.0f, w->q);
    qm_vec sum = {0};
    for (int64_t d = 0; d < padded; d += QM_LANES)
      sum = qm_vec_fma(qm_vec_load(w->dout + d), qm_vec_load(w->q + d), sum);
    w->delta[row] = qm_vec_sum(sum);
    w->lse[row] = ((const float *)args->lse.data)[row_index(s, row)] * (float)LOG2_E;
  }
  memset(w->dq, 0, (size_t)(rows * padded) * sizeof(float));
  for (int64_t key = 0; key < s->keys; key += TILE_KEYS)
    tile_backward(args, s, w, key, QM_MIN(TILE_KEYS, s->keys - key));
  for (int64_t row = 0; row < rows; row++)
    scale_and_narrow(s, w->dq + row * padded, (float)args->options.scale, &args->dq,
                     query_offset(s, row));
}

int32_t QM_CPU(attention_backward)(void *context, const qm_attention_backward_args *args) {
  int32_t status = qm_reference_check_offsets("cu_q", &args->cu_q, args->rows_q);
  if (status == QM_OK) status = qm_reference_check_offsets("cu_k", &args->cu_k, args->rows_k);
  if (status != QM_OK || args->q.count + args->k.count == 0) return status;
  if (takes_amx(context, &args->q, &args->k, &args->cu_q))
    return QM_CPU(attention_backward_amx)(args);
  const int64_t pairs = args->sequences * args->kv_heads, padded = pad(args->head_size);
  const int64_t rows = longest(&args->cu_q) * (args->heads / args->kv_heads);
  const size_t floats = (workspace_floats(padded, rows) + 15) / 16 * 16;
  const int32_t most = args->q.count + args->k.count > QM_PARALLEL_MIN ? omp_get_max_threads() : 1;
  const int32_t threads = (int32_t)QM_MIN(most, pairs > 1 ? pairs : 1);
  float *memory = aligned_alloc(64, floats * (size_t)threads * sizeof(float));
  if (memory == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "attention_backward: the host is out of memory");
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t pair = 0; pair < pairs; pair++) {
    const workspace w = divide(memory + floats * (size_t)omp_get_thread_num(), padded, rows);
    const sequence s = find_sequence(pair, args);
    sequence_backward(args, &s, &w);
  }
  free(memory);
  return QM_OK;
}
