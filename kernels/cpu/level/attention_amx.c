/* attention_amx.c - the forward pass of attention.c for bf16 in AMX tiles: everything transposed,
** so that a vector holds one key's scores for QM_LANES rows and no sum runs across lanes.
**
**   S^T = K Q^T        K by rows, Q^T in words     [keys, rows]
**   P^T = 2^(S^T - m)  rounded to bf16, keys paired into words
**   O^T += V^T P^T     V^T by rows                 [head size, rows]
**
** Reference: kernels/reference/attention.c, within the rounding of P to bf16 (2^-9 of each).
*/
#include <omp.h>
#include <stdlib.h>

#include "amx.h"
#include "attention.h"

#ifdef QM_AMX

enum { ROWS = 32, BLOCK_ROWS = 256, KEYS = 64 };
#define LOWEST (-1e30f) /* below any score, and finite */

typedef struct workspace {
  uint16_t *rows, *keys, *values_t; /* [KEYS, deep], [KEYS, deep], [deep, KEYS] */
  uint32_t *pairs, *q_t,
      *p; /* [KEYS / 2, deep], [BLOCK_ROWS / ROWS, deep / 2, ROWS], [KEYS / 2, ROWS] */
  float *scores, *out_t, *out; /* [KEYS, ROWS], [BLOCK_ROWS / ROWS, deep, ROWS], [ROWS, deep] */
  float *most, *sums;          /* [BLOCK_ROWS] */
  int32_t *first, *end; /* [BLOCK_ROWS]: the keys each row sees; none for rows that are not */
} workspace;

static size_t workspace_bytes(int64_t deep) {
  const int64_t halves = 3 * KEYS * deep;
  const int64_t words = KEYS / 2 * deep + BLOCK_ROWS * deep / 2 + KEYS / 2 * ROWS;
  const int64_t floats = KEYS * ROWS + BLOCK_ROWS * deep + ROWS * deep + 4 * BLOCK_ROWS;
  return (size_t)(2 * halves + 4 * words + 4 * floats);
}

static workspace divide(char *memory, int64_t deep) {
  workspace w;
  w.rows = (uint16_t *)(void *)memory;
  w.keys = w.rows + KEYS * deep;
  w.values_t = w.keys + KEYS * deep;
  w.pairs = (uint32_t *)(void *)(w.values_t + KEYS * deep);
  w.q_t = w.pairs + KEYS / 2 * deep;
  w.p = w.q_t + BLOCK_ROWS * deep / 2;
  w.scores = (float *)(void *)(w.p + KEYS / 2 * ROWS);
  w.out_t = w.scores + KEYS * ROWS;
  w.out = w.out_t + BLOCK_ROWS * deep;
  w.most = w.out + ROWS * deep;
  w.sums = w.most + BLOCK_ROWS;
  w.first = (int32_t *)(void *)(w.sums + BLOCK_ROWS);
  w.end = w.first + BLOCK_ROWS;
  return w;
}

/* Scores [wide, ROWS] of the block's rows from `row` on to exponentials in w->p; maxima and sums
** move on. keep: what the earlier results are worth against the new maxima; 0 when that is all of
** it. */
static QM_AMX_TARGET int32_t exponentiate(const workspace *w, int64_t row, int64_t key,
                                          int64_t wide, int32_t masked, float factor, float *keep) {
  int32_t faded = 0;
  for (int64_t c = 0; c < ROWS; c += QM_LANES) {
    const qm_vec before = qm_vec_load(w->most + row + c);
    const __m512i first = _mm512_loadu_si512(w->first + row + c);
    const __m512i end = _mm512_loadu_si512(w->end + row + c);
    float *scores = w->scores + c;
    qm_vec most = before, sum = {0};
    for (int64_t j = 0; j < wide; j++) {
      qm_vec x = qm_vec_load(scores + j * ROWS) * factor;
      if (masked) {
        const __m512i at = _mm512_set1_epi32((int32_t)(key + j));
        const __mmask16 mask =
            _mm512_cmple_epi32_mask(first, at) & _mm512_cmplt_epi32_mask(at, end);
        x = (qm_vec)_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), mask, (__m512)x);
      }
      qm_vec_store(scores + j * ROWS, x);
      most = qm_vec_max(most, x);
    }
    for (int64_t j = 0; j < wide; j += 2) {
      const qm_vec low = qm_vec_exp2(qm_vec_load(scores + j * ROWS) - most);
      const qm_vec high = qm_vec_exp2(qm_vec_load(scores + (j + 1) * ROWS) - most);
      sum += low + high;
      /* To nearest bf16, ties away from zero: positive numbers, so adding half a unit does it. */
      const qm_ivec words = (qm_ivec)((__v16su)((qm_ivec)low + 0x8000) >> 16) |
                            (((qm_ivec)high + 0x8000) & (int32_t)0xFFFF0000u);
      _mm512_storeu_si512(w->p + j / 2 * ROWS + c, (__m512i)words);
    }
    const qm_vec fading = qm_vec_exp2(before - most);
    faded |= _mm512_cmp_ps_mask((__m512)before, (__m512)most, _CMP_NEQ_UQ) != 0;
    qm_vec_store(keep + c, fading);
    qm_vec_store(w->most + row + c, most);
    qm_vec_store(w->sums + row + c, qm_vec_load(w->sums + row + c) * fading + sum);
  }
  return faded;
}

/* ROWS rows from `row` on (of them `count` real, the sequence's `at` and on) against one tile. */
static QM_AMX_TARGET void attend_rows(const sequence *s, const workspace *w, int64_t deep,
                                      int64_t row, int64_t at, int64_t count, int64_t key,
                                      int64_t n, float factor) {
  float keep[ROWS];
  const int64_t end = tile_end(s, at, at + count - 1, key, n), wide = (end + 31) / 32 * 32;
  if (end == 0) return;
  const int32_t masked = count < ROWS || !all_seen(s, at, at + count - 1, key, wide);
  float *out_t = w->out_t + row * deep;
  tiles_multiply(w->scores, ROWS, 0, w->keys, deep, w->q_t + row * deep / 2, ROWS, wide, ROWS,
                 deep);
  if (exponentiate(w, row, key, wide, masked, factor, keep)) {
    const qm_vec low = qm_vec_load(keep), high = qm_vec_load(keep + QM_LANES);
    for (int64_t d = 0; d < deep; d++) {
      float *out = out_t + d * ROWS;
      qm_vec_store(out, qm_vec_load(out) * low);
      qm_vec_store(out + QM_LANES, qm_vec_load(out + QM_LANES) * high);
    }
  }
  tiles_multiply(out_t, ROWS, 1, w->values_t, KEYS, w->p, ROWS, deep, ROWS, wide);
}

static QM_AMX_TARGET void finish_rows(const qm_attention_args *args, const sequence *s,
                                      const workspace *w, int64_t deep, int64_t row, int64_t at,
                                      int64_t count) {
  uint16_t *out = args->out.data;
  transpose_words(w->out_t + row * deep, deep, ROWS, w->out, deep);
  for (int64_t i = 0; i < count; i++) {
    const int32_t empty = w->end[row + i] <= w->first[row + i];
    const float sum = w->sums[row + i];
    if (empty) memset(w->out + i * deep, 0, (size_t)deep * sizeof(float));
    store_row(w->out + i * deep, empty ? 0.0f : 1.0f / sum, s->size, out + row_offset(s, at + i));
    ((float *)args->lse.data)[row_index(s, at + i)] =
        empty ? -__builtin_inff() : (w->most[row + i] + log2f(sum)) * (float)LN_2;
  }
}

/* Stacked rows at .. at + rows - 1 of one sequence. */
static QM_AMX_TARGET void attend(const qm_attention_args *args, const sequence *s,
                                 const workspace *w, int64_t deep, int64_t at, int64_t rows) {
  const uint16_t *q = args->q.data, *k = args->k.data, *v = args->v.data;
  const float factor = (float)(args->options.scale * LOG2_E);
  for (int64_t i = 0; i < BLOCK_ROWS; i++) {
    w->most[i] = LOWEST;
    w->sums[i] = 0.0f;
    w->first[i] = i < rows ? (int32_t)first_seen(s, at + i) : 0;
    w->end[i] = i < rows ? (int32_t)end_seen(s, at + i) : 0;
  }
  for (int64_t row = 0; row < rows; row += ROWS) {
    for (int64_t i = 0; i < ROWS; i++)
      copy_row(row + i < rows ? q + query_offset(s, at + row + i) : NULL, s->size, deep,
               w->rows + i * deep);
    transpose_words(w->rows, ROWS, deep / 2, w->q_t + row * deep / 2, ROWS);
    memset(w->out_t + row * deep, 0, (size_t)(ROWS * deep) * sizeof(float));
  }
  const int64_t end = end_seen(s, at + rows - 1);
  for (int64_t key = first_seen(s, at) / KEYS * KEYS; key < end; key += KEYS) {
    const int64_t n = QM_MIN(KEYS, s->keys - key);
    for (int64_t j = 0; j < KEYS; j++) {
      const int64_t offset = j < n ? key_offset(s, key + j) : 0;
      copy_row(j < n ? k + offset : NULL, s->size, deep, w->keys + j * deep);
      copy_row(j < n ? v + offset : NULL, s->size, deep, w->rows + j * deep);
    }
    pair_rows(w->rows, KEYS, deep, w->pairs);
    transpose_words(w->pairs, KEYS / 2, deep, w->values_t, KEYS / 2);
    for (int64_t row = 0; row < rows; row += ROWS)
      attend_rows(s, w, deep, row, at + row, QM_MIN(ROWS, rows - row), key, n, factor);
  }
  for (int64_t row = 0; row < rows; row += ROWS)
    finish_rows(args, s, w, deep, row, at + row, QM_MIN(ROWS, rows - row));
}

int32_t QM_CPU(attention_amx)(const qm_attention_args *args) {
  const int64_t pairs = args->sequences * args->kv_heads, deep = (args->head_size + 31) / 32 * 32;
  const int64_t group = args->heads / args->kv_heads;
  const int64_t blocks = (longest(&args->cu_q) * group + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const size_t bytes = workspace_bytes(deep);
  const int32_t threads = elements_read(args) > QM_PARALLEL_MIN ? omp_get_max_threads() : 1;
  char *memory = aligned_alloc(64, bytes * (size_t)threads);
  if (memory == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "attention: the host is out of memory");
#pragma omp parallel num_threads(threads)
  {
    const workspace w = divide(memory + bytes * (size_t)omp_get_thread_num(), deep);
    tile_config before;
    tiles_take(&before);
    /* The last blocks see the most keys, so they come first. */
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t block = blocks - 1; block >= 0; block--)
      for (int64_t pair = 0; pair < pairs; pair++) {
        const sequence s = find_sequence(pair, args);
        const int64_t row = block * BLOCK_ROWS, rows = s.queries * s.group - row;
        if (rows > 0) attend(args, &s, &w, deep, row, QM_MIN(rows, BLOCK_ROWS));
      }
    tiles_give_back(&before);
  }
  free(memory);
  return QM_OK;
}

#else

int32_t QM_CPU(attention_amx)(const qm_attention_args *args) {
  (void)args;
  return QM_E_UNSUPPORTED;
}

#endif
