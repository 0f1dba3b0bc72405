/* attention_backward_amx.c - the backward pass of attention_backward.c for bf16 in AMX tiles, with
** everything transposed as in attention_amx.c: a vector holds one key's entries for QM_LANES rows.
**
**   S^T = K Q^T, dP^T = V dout^T      by rows times words over the head size      [keys, rows]
**   P^T = 2^(S^T - lse), dS^T = P^T (dP^T - delta)            rounded to bf16
**   dV += P^T dout, dK += dS^T Q      by rows times words over the rows           [keys, head size]
**   dQ^T += K^T dS^T                  by rows times words over the keys           [head size, rows]
**
** Reference: kernels/reference/attention.c, within the rounding of P and dS to bf16 (2^-9 of each).
*/
#include <omp.h>
#include <stdlib.h>

#include "amx.h"
#include "attention.h"

#ifdef QM_AMX

enum { ROWS = 64, KEYS = 64, HALF = 32 };

/* One (sequence, key head)'s tensors; all [.., deep] or [deep, ..], deep the padded head size. The
** last eight have a part for every ROWS rows of the sequence. */
typedef struct workspace {
  int64_t deep;
  uint16_t *rows, *keys, *values, *keys_t; /* [64, deep] and [deep, KEYS] */
  float *dk, *dv;                          /* [KEYS, deep] */
  float *scores, *dp;                      /* [HALF, ROWS] */
  uint16_t *p, *ds;                        /* [KEYS, ROWS], keys by rows */
  uint32_t *ds_pairs, *pairs;              /* [KEYS / 2, ROWS], [32, deep] */
  uint32_t *q_t, *dout_t;                  /* [deep / 2, ROWS] */
  uint32_t *q_pairs, *dout_pairs;          /* [ROWS / 2, deep] */
  float *dq_t;                             /* [deep, ROWS] */
  float *lse, *delta;                      /* [ROWS], lse in base 2 */
  int32_t *first, *end; /* [ROWS]: keys each row sees; none for rows that are not */
} workspace;

/* The next piece of `memory`, in whole cache lines; where memory is NULL only *used counts. */
static void *carve(char *memory, int64_t *used, int64_t bytes) {
  char *start = memory == NULL ? NULL : memory + *used;
  *used += (bytes + 63) / 64 * 64;
  return start;
}

/* Lay the workspace out in `memory`, or nowhere; the bytes it takes. */
static size_t divide(workspace *w, char *memory, int64_t deep, int64_t parts) {
  int64_t used = 0;
  w->deep = deep;
#define CARVE(field, count) w->field = carve(memory, &used, (count) * (int64_t)sizeof *w->field)
  CARVE(rows, 64 * deep);
  CARVE(keys, KEYS * deep);
  CARVE(values, KEYS * deep);
  CARVE(keys_t, KEYS * deep);
  CARVE(dk, KEYS * deep);
  CARVE(dv, KEYS * deep);
  CARVE(scores, HALF * ROWS);
  CARVE(dp, HALF * ROWS);
  CARVE(p, KEYS * ROWS);
  CARVE(ds, KEYS * ROWS);
  CARVE(ds_pairs, KEYS / 2 * ROWS);
  CARVE(pairs, 32 * deep);
  CARVE(q_t, parts * ROWS * deep / 2);
  CARVE(dout_t, parts * ROWS * deep / 2);
  CARVE(q_pairs, parts * ROWS * deep / 2);
  CARVE(dout_pairs, parts * ROWS * deep / 2);
  CARVE(dq_t, parts * ROWS * deep);
  CARVE(lse, parts * ROWS);
  CARVE(delta, parts * ROWS);
  CARVE(first, parts * ROWS);
  CARVE(end, parts * ROWS);
#undef CARVE
  return (size_t)used;
}

/* P^T and dS^T of HALF keys from `from` on, for the part's rows from `row` on. */
static QM_AMX_TARGET void differentiate(const workspace *w, int64_t row, int64_t key, int64_t from,
                                        int32_t masked, float factor) {
  for (int64_t c = 0; c < ROWS; c += 2 * QM_LANES) {
    __m512i even = _mm512_setzero_si512();
    for (int64_t j = 0; j < HALF; j++) {
      qm_vec p[2], ds[2];
#pragma GCC unroll 2
      for (int32_t i = 0; i < 2; i++) {
        const int64_t lane = c + i * QM_LANES, at = j * ROWS + lane;
        const qm_vec lse = qm_vec_load(w->lse + row + lane),
                     delta = qm_vec_load(w->delta + row + lane);
        p[i] = qm_vec_exp2(qm_vec_fma(qm_vec_load(w->scores + at), qm_vec_splat(factor), -lse));
        ds[i] = p[i] * (qm_vec_load(w->dp + at) - delta);
        if (masked) {
          const __m512i here = _mm512_set1_epi32((int32_t)(key + from + j));
          const __mmask16 mask =
              _mm512_cmple_epi32_mask(_mm512_loadu_si512(w->first + row + lane), here) &
              _mm512_cmplt_epi32_mask(here, _mm512_loadu_si512(w->end + row + lane));
          p[i] = (qm_vec)_mm512_maskz_mov_ps(mask, (__m512)p[i]);
          ds[i] = (qm_vec)_mm512_maskz_mov_ps(mask, (__m512)ds[i]);
        }
      }
      const __m512i narrow = narrow_pair(ds[0], ds[1]);
      _mm512_storeu_si512(w->p + (from + j) * ROWS + c, narrow_pair(p[0], p[1]));
      _mm512_storeu_si512(w->ds + (from + j) * ROWS + c, narrow);
      if (j % 2 == 0)
        even = narrow;
      else
        pair(even, narrow, w->ds_pairs + (from + j) / 2 * ROWS + c);
    }
  }
}

/* Stacked rows row .. row + count - 1 against the tile of n keys at `key`. */
static void rows_backward(const sequence *s, const workspace *w, int64_t row, int64_t count,
                          int64_t key, int64_t n, float factor) {
  const int64_t deep = w->deep, words = row * deep / 2;
  const int64_t end = tile_end(s, row, row + count - 1, key, n),
                wide = (end + HALF - 1) / HALF * HALF;
  if (end == 0) return;
  const int32_t masked = count < ROWS || !all_seen(s, row, row + count - 1, key, wide);
  for (int64_t from = 0; from < wide; from += HALF) {
    tiles_multiply(w->scores, ROWS, 0, w->keys + from * deep, deep, w->q_t + words, ROWS, HALF,
                   ROWS, deep);
    tiles_multiply(w->dp, ROWS, 0, w->values + from * deep, deep, w->dout_t + words, ROWS, HALF,
                   ROWS, deep);
    differentiate(w, row, key, from, masked, factor);
  }
  tiles_multiply(w->dv, deep, 1, w->p, ROWS, w->dout_pairs + words, deep, wide, deep, ROWS);
  tiles_multiply(w->dk, deep, 1, w->ds, ROWS, w->q_pairs + words, deep, wide, deep, ROWS);
  tiles_multiply(w->dq_t + row * deep, ROWS, 1, w->keys_t, KEYS, w->ds_pairs, ROWS, deep, ROWS,
                 wide);
}

static QM_AMX_TARGET void tile_backward(const qm_attention_backward_args *args, const sequence *s,
                                        const workspace *w, int64_t key, int64_t n) {
  const uint16_t *k = args->k.data, *v = args->v.data;
  uint16_t *dk = args->dk.data, *dv = args->dv.data;
  const int64_t deep = w->deep, rows = s->queries * s->group;
  for (int64_t j = 0; j < KEYS; j++) {
    const int64_t offset = j < n ? key_offset(s, key + j) : 0;
    copy_row(j < n ? k + offset : NULL, s->size, deep, w->keys + j * deep);
    copy_row(j < n ? v + offset : NULL, s->size, deep, w->values + j * deep);
  }
  pair_rows(w->keys, KEYS, deep, w->pairs);
  transpose_words(w->pairs, KEYS / 2, deep, w->keys_t, KEYS / 2);
  memset(w->dk, 0, (size_t)(KEYS * deep) * sizeof(float));
  memset(w->dv, 0, (size_t)(KEYS * deep) * sizeof(float));
  for (int64_t row = 0; row < rows; row += ROWS)
    rows_backward(s, w, row, QM_MIN(ROWS, rows - row), key, n,
                  (float)(args->options.scale * LOG2_E));
  for (int64_t j = 0; j < n; j++) {
    store_row(w->dk + j * deep, (float)args->options.scale, s->size, dk + key_offset(s, key + j));
    store_row(w->dv + j * deep, 1.0f, s->size, dv + key_offset(s, key + j));
  }
}

/* delta = dout . out, lse and what each row sees, for the ROWS rows of a part. */
static QM_AMX_TARGET void prepare_statistics(const qm_attention_backward_args *args,
                                             const sequence *s, const workspace *w, int64_t row,
                                             int64_t count) {
  const uint16_t *dout = args->dout.data, *out = args->out.data;
  for (int64_t i = row; i < row + ROWS; i++) {
    float sum = 0.0f;
    w->lse[i] = 0.0f;
    w->first[i] = w->end[i] = 0;
    if (i < row + count) {
      const int64_t offset = row_offset(s, i);
      sum = dot_rows(dout + offset, out + offset, s->size);
      w->lse[i] = ((const float *)args->lse.data)[row_index(s, i)] * (float)LOG2_E;
      w->first[i] = (int32_t)first_seen(s, i);
      w->end[i] = (int32_t)end_seen(s, i);
    }
    w->delta[i] = sum;
  }
}

/* q, or dout, of a part's rows in both layouts. */
static void prepare_rows(const sequence *s, const workspace *w, const uint16_t *x, int32_t is_q,
                         int64_t row, int64_t count, uint32_t *transposed, uint32_t *pairs) {
  for (int64_t i = 0; i < ROWS; i++)
    copy_row(i >= count ? NULL : x + (is_q ? query_offset(s, row + i) : row_offset(s, row + i)),
             s->size, w->deep, w->rows + i * w->deep);
  transpose_words(w->rows, ROWS, w->deep / 2, transposed + row * w->deep / 2, ROWS);
  pair_rows(w->rows, ROWS, w->deep, pairs + row * w->deep / 2);
}

static QM_AMX_TARGET void sequence_backward(const qm_attention_backward_args *args,
                                            const sequence *s, const workspace *w) {
  const int64_t deep = w->deep, rows = s->queries * s->group;
  uint16_t *dq = args->dq.data;
  for (int64_t row = 0; row < rows; row += ROWS) {
    const int64_t count = QM_MIN(ROWS, rows - row);
    prepare_statistics(args, s, w, row, count);
    prepare_rows(s, w, args->q.data, 1, row, count, w->q_t, w->q_pairs);
    prepare_rows(s, w, args->dout.data, 0, row, count, w->dout_t, w->dout_pairs);
    memset(w->dq_t + row * deep, 0, (size_t)(ROWS * deep) * sizeof(float));
  }
  for (int64_t key = 0; key < s->keys; key += KEYS)
    tile_backward(args, s, w, key, QM_MIN(KEYS, s->keys - key));
  for (int64_t row = 0; row < rows; row += ROWS) {
    transpose_words(w->dq_t + row * deep, deep, ROWS, w->dk, deep);
    for (int64_t i = 0; i < QM_MIN(ROWS, rows - row); i++)
      store_row(w->dk + i * deep, (float)args->options.scale, s->size,
                dq + query_offset(s, row + i));
  }
}

int32_t QM_CPU(attention_backward_amx)(const qm_attention_backward_args *args) {
  const int64_t pairs = args->sequences * args->kv_heads, deep = (args->head_size + 31) / 32 * 32;
  const int64_t rows = longest(&args->cu_q) * (args->heads / args->kv_heads);
  const int64_t parts = (rows + ROWS - 1) / ROWS;
  const int32_t most = args->q.count + args->k.count > QM_PARALLEL_MIN ? omp_get_max_threads() : 1;
  const int32_t threads = (int32_t)QM_MIN(most, pairs > 1 ? pairs : 1);
  workspace layout;
  const size_t bytes = divide(&layout, NULL, deep, parts);
  char *memory = aligned_alloc(64, bytes * (size_t)threads);
  if (memory == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "attention_backward: the host is out of memory");
#pragma omp parallel num_threads(threads)
  {
    workspace w;
    tile_config before;
    divide(&w, memory + bytes * (size_t)omp_get_thread_num(), deep, parts);
    tiles_take(&before);
#pragma omp for schedule(dynamic)
    for (int64_t pair = 0; pair < pairs; pair++) {
      const sequence s = find_sequence(pair, args);
      sequence_backward(args, &s, &w);
    }
    tiles_give_back(&before);
  }
  free(memory);
  return QM_OK;
}

#else

int32_t QM_CPU(attention_backward_amx)(const qm_attention_backward_args *args) {
  (void)args;
  return QM_E_UNSUPPORTED;
}

#endif
