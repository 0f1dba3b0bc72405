/* attention.c - softmax attention over packed sequences, forward. Reference:
** kernels/reference/attention.c, within f32 rounding (16-bit operands are expanded to f32 tiles).
** Source: Dao, arXiv 2307.08691: tiles of keys, a running maximum and sum per row, nothing T x T.
**
** One unit of work is up to BLOCK_ROWS stacked rows of one sequence and key head; it walks the key
** tiles those rows see. K is transposed once per tile; then for TILE_ROWS rows at a time the
** scores, their exponentials and the product with V stay in registers and the first-level cache.
** Exponents are base 2: log2(e) is part of the factor that scales q. No unit shares an output, and
** what a unit computes does not depend on the thread that runs it.
*/
#include <omp.h>
#include <stdlib.h>

#include "attention_tile.h"

enum { BLOCK_ROWS = 256 };
/* Below any score, and finite: the difference of two such is 0 and not NaN. */
#define LOWEST (-1e30f)

typedef struct workspace {
  float *keys, *keys_t, *values; /* [TILE_KEYS, padded], [padded, TILE_KEYS], [TILE_KEYS, padded] */
  float *q, *out;                /* [BLOCK_ROWS, padded] */
  float *most, *sums;            /* [BLOCK_ROWS], [BLOCK_ROWS, QM_LANES] */
} workspace;

static size_t workspace_floats(int64_t padded) {
  return (size_t)((3 * TILE_KEYS + 2 * BLOCK_ROWS) * padded + BLOCK_ROWS * (1 + QM_LANES));
}

static workspace divide(float *memory, int64_t padded) {
  workspace w;
  w.keys = memory;
  w.keys_t = w.keys + TILE_KEYS * padded;
  w.values = w.keys_t + TILE_KEYS * padded;
  w.q = w.values + TILE_KEYS * padded;
  w.out = w.q + BLOCK_ROWS * padded;
  w.sums = w.out + BLOCK_ROWS * padded;
  w.most = w.sums + BLOCK_ROWS * QM_LANES;
  return w;
}

/* Scores to exponentials, 2^(score - maximum), in place; rows' maxima and sums move on. keep[i] is
** what the row's earlier results are worth against the new maximum. */
QM_ALWAYS_INLINE void exponentiate(const sequence *s, int64_t row, int64_t rows, int64_t key,
                                   int64_t end, float *scores, float *most, float *sums,
                                   float *keep) {
  const int32_t masked = !all_seen(s, row, row + rows - 1, key, end);
  float before[QM_LANES] = {0}, after[QM_LANES] = {0};
  for (int64_t i = 0; i < rows; i++) {
    float *score = scores + i * TILE_KEYS;
    qm_vec largest = qm_vec_splat(LOWEST);
    for (int64_t j = 0; j < end; j += QM_LANES) {
      qm_vec x = qm_vec_load(score + j);
      if (masked) {
        x = qm_vec_select(seen(s, row + i, key + j), x, qm_vec_splat(-__builtin_inff()));
        qm_vec_store(score + j, x);
      }
      largest = qm_vec_max(largest, x);
    }
    const float tile_most = qm_vec_largest(largest);
    before[i] = most[i];
    after[i] = most[i] > tile_most ? most[i] : tile_most;
    most[i] = after[i];
  }
  const qm_vec fading = qm_vec_exp2(qm_vec_load(before) - qm_vec_load(after));
  qm_vec_store(keep, fading);
  for (int64_t i = 0; i < rows; i++) {
    float *score = scores + i * TILE_KEYS;
    qm_vec sum = keep[i] * qm_vec_load(sums + i * QM_LANES);
    for (int64_t j = 0; j < end; j += QM_LANES) {
      const qm_vec p = qm_vec_exp2(qm_vec_load(score + j) - after[i]);
      qm_vec_store(score + j, p);
      sum += p;
    }
    qm_vec_store(sums + i * QM_LANES, sum);
  }
}

/* All rows of the block against the tile of n keys at `key`. */
static void attend_tile(const sequence *s, const workspace *w, int64_t row, int64_t rows,
                        int64_t key, int64_t n) {
  float scores[TILE_ROWS * TILE_KEYS] __attribute__((aligned(64)));
  float keep[QM_LANES];
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    const int64_t count = QM_MIN(TILE_ROWS, rows - i);
    const int64_t end = tile_end(s, row + i, row + i + count - 1, key, n);
    if (end == 0) continue;
    const left q = {w->q + i * s->padded, s->padded, 1}, p = {scores, TILE_KEYS, 1};
    multiply(count, scores, TILE_KEYS, NULL, q, w->keys_t, TILE_KEYS, s->size,
             (end + QM_LANES - 1) / QM_LANES);
    exponentiate(s, row + i, count, key, end, scores, w->most + i, w->sums + i * QM_LANES, keep);
    multiply(count, w->out + i * s->padded, s->padded, keep, p, w->values, s->padded, end,
             s->padded / QM_LANES);
  }
}

/* Stacked rows row .. row + rows - 1 of one sequence. */
static void attend(const qm_attention_args *args, const sequence *s, const workspace *w,
                   int64_t row, int64_t rows) {
  const float factor = (float)(args->options.scale * LOG2_E);
  for (int64_t i = 0; i < rows; i++) {
    expand_row(s, &args->q, query_offset(s, row + i), factor, w->q + i * s->padded);
    w->most[i] = LOWEST;
  }
  memset(w->out, 0, (size_t)(rows * s->padded) * sizeof(float));
  memset(w->sums, 0, (size_t)(rows * QM_LANES) * sizeof(float));
  const int64_t end = end_seen(s, row + rows - 1);
  for (int64_t key = first_seen(s, row) / TILE_KEYS * TILE_KEYS; key < end; key += TILE_KEYS) {
    const int64_t n = QM_MIN(TILE_KEYS, s->keys - key);
    for (int64_t j = 0; j < n; j++) {
      expand_row(s, &args->k, key_offset(s, key + j), 1.0f, w->keys + j * s->padded);
      expand_row(s, &args->v, key_offset(s, key + j), 1.0f, w->values + j * s->padded);
    }
    transpose_tile(s, w->keys, n, w->keys_t);
    attend_tile(s, w, row, rows, key, n);
  }
  for (int64_t i = 0; i < rows; i++) {
    float *out = w->out + i * s->padded, *lse = (float *)args->lse.data + row_index(s, row + i);
    const int32_t empty = end_seen(s, row + i) <= first_seen(s, row + i);
    const float sum = qm_vec_sum(qm_vec_load(w->sums + i * QM_LANES)), inverse = 1.0f / sum;
    *lse = empty ? -__builtin_inff() : (w->most[i] + log2f(sum)) * (float)LN_2;
    for (int64_t d = 0; d < s->size; d++) out[d] = empty ? 0.0f : out[d] * inverse;
    qm_narrow(out, args->out.data, args->out.dtype, row_offset(s, row + i), s->size);
  }
}

int32_t QM_CPU(attention)(void *context, const qm_attention_args *args) {
  int32_t status = qm_reference_check_offsets("cu_q", &args->cu_q, args->rows_q);
  if (status == QM_OK) status = qm_reference_check_offsets("cu_k", &args->cu_k, args->rows_k);
  if (status != QM_OK || args->q.count == 0) return status;
  if (takes_amx(context, &args->q, &args->k, &args->cu_q)) return QM_CPU(attention_amx)(args);
  const int64_t pairs = args->sequences * args->kv_heads;
  const int64_t blocks =
      (longest(&args->cu_q) * (args->heads / args->kv_heads) + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int64_t padded = pad(args->head_size);
  const size_t floats = workspace_floats(padded);
  const int32_t threads = elements_read(args) > QM_PARALLEL_MIN ? omp_get_max_threads() : 1;
  float *memory = aligned_alloc(64, floats * (size_t)threads * sizeof(float));
  if (memory == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "attention: the host is out of memory");
    /* The last blocks see the most keys, so they come first. */
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int64_t block = blocks - 1; block >= 0; block--)
    for (int64_t pair = 0; pair < pairs; pair++) {
      const workspace w = divide(memory + floats * (size_t)omp_get_thread_num(), padded);
      const sequence s = find_sequence(pair, args);
      const int64_t row = block * BLOCK_ROWS, rows = s.queries * s.group - row;
      if (rows > 0) attend(args, &s, &w, row, QM_MIN(rows, BLOCK_ROWS));
    }
  free(memory);
  return QM_OK;
}
