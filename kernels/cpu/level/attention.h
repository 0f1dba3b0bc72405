/* attention.h - what attention's passes share: which rows and keys a sequence has, what sees what.
**
** The query heads of one key head are stacked: row i * group + g of a sequence is query i under
** head g of the group, so that a decoding step still has `group` rows to multiply with.
*/
#ifndef QM_CPU_ATTENTION_H
#define QM_CPU_ATTENTION_H

#include "simd.h"

#define LOG2_E 1.44269504088896341
#define LN_2 0.69314718055994531

/* One sequence under one key head. */
typedef struct sequence {
  int64_t queries, keys;                 /* how many */
  int64_t first_query, first_key;        /* their rows in the tensors */
  int64_t group, head, kv_head;          /* heads per key head, the first of them, the key head */
  int64_t heads, kv_heads, size, padded; /* head size, and rounded up to whole vectors */
  int64_t stride_q, stride_k; /* elements of a row of q, of k and v, and of their gradients */
  int32_t causal, window;
} sequence;

/* The query of a stacked row; most models need no division. */
QM_ALWAYS_INLINE int64_t query_of(const sequence *s, int64_t row) {
  return s->group == 1 ? row : row / s->group;
}

/* Where in lse a stacked row stands. */
QM_ALWAYS_INLINE int64_t row_index(const sequence *s, int64_t row) {
  const int64_t query = query_of(s, row);
  return (s->first_query + query) * s->heads + s->head + (row - query * s->group);
}
/* Offset of a stacked row's elements in out and dout; in q and dq; of a key's in k, v, dk, dv. */
QM_ALWAYS_INLINE int64_t row_offset(const sequence *s, int64_t row) {
  return row_index(s, row) * s->size;
}
QM_ALWAYS_INLINE int64_t query_offset(const sequence *s, int64_t row) {
  const int64_t query = query_of(s, row), head = s->head + (row - query * s->group);
  return (s->first_query + query) * s->stride_q + head * s->size;
}
QM_ALWAYS_INLINE int64_t key_offset(const sequence *s, int64_t key) {
  return (s->first_key + key) * s->stride_k + s->kv_head * s->size;
}

/* The keys that a stacked row sees: from first_seen up to end_seen - 1. Both grow with the row. */
QM_ALWAYS_INLINE int64_t first_seen(const sequence *s, int64_t row) {
  const int64_t first = s->keys - s->queries + query_of(s, row) - s->window + 1;
  return s->window == 0 || first < 0 ? 0 : QM_MIN(first, s->keys);
}
QM_ALWAYS_INLINE int64_t end_seen(const sequence *s, int64_t row) {
  const int64_t end = s->keys - s->queries + query_of(s, row) + 1;
  return !s->causal ? s->keys : end < 0 ? 0 : end;
}
/* The part of the tile at `key` with n keys that rows first .. last see, from its start. */
QM_ALWAYS_INLINE int64_t tile_end(const sequence *s, int64_t first, int64_t last, int64_t key,
                                  int64_t n) {
  const int64_t end = QM_MIN(end_seen(s, last) - key, n);
  return end <= 0 || first_seen(s, first) >= key + n ? 0 : end;
}
/* Does every row see all of the tile's first `end` keys? */
QM_ALWAYS_INLINE int32_t all_seen(const sequence *s, int64_t first, int64_t last, int64_t key,
                                  int64_t end) {
  return end % QM_LANES == 0 && first_seen(s, last) <= key && end_seen(s, first) >= key + end;
}

/* Lanes of the vector at key + j that the row sees. */
QM_ALWAYS_INLINE qm_ivec seen(const sequence *s, int64_t row, int64_t key) {
  qm_ivec lane;
  for (int32_t i = 0; i < QM_LANES; i++) lane[i] = i;
  const int64_t first = first_seen(s, row) - key, end = end_seen(s, row) - key;
  const int32_t low = (int32_t)(first < 0 ? 0 : QM_MIN(first, QM_LANES));
  const int32_t high = (int32_t)(end < 0 ? 0 : QM_MIN(end, QM_LANES));
  return (lane >= low) & (lane < high);
}

QM_ALWAYS_INLINE int64_t pad(int64_t size) { return (size + QM_LANES - 1) / QM_LANES * QM_LANES; }

/* Rows of the longest sequence. */
QM_ALWAYS_INLINE int64_t longest(const qm_array *offsets) {
  const int32_t *cu = offsets->data;
  int64_t most = 0;
  for (int64_t s = 0; s + 1 < offsets->count; s++)
    most = cu[s + 1] - cu[s] > most ? cu[s + 1] - cu[s] : most;
  return most;
}

/* The unit'th of all (sequence, key head) pairs; args of either direction. */
#define find_sequence(unit, args)                                                                  \
  sequence_of(unit, (args)->heads, (args)->kv_heads, (args)->head_size, (args)->stride_q,          \
              (args)->stride_k, &(args)->cu_q, &(args)->cu_k, &(args)->options)
static inline sequence sequence_of(int64_t unit, int64_t heads, int64_t kv_heads, int64_t size,
                                   int64_t stride_q, int64_t stride_k, const qm_array *cu_q,
                                   const qm_array *cu_k, const qm_attention_options *options) {
  const int64_t s = unit / kv_heads, group = heads / kv_heads, kv_head = unit % kv_heads;
  const int32_t *queries = cu_q->data, *keys = cu_k->data;
  return (sequence){.queries = queries[s + 1] - queries[s],
                    .keys = keys[s + 1] - keys[s],
                    .first_query = queries[s],
                    .first_key = keys[s],
                    .group = group,
                    .head = kv_head * group,
                    .kv_head = kv_head,
                    .heads = heads,
                    .kv_heads = kv_heads,
                    .size = size,
                    .padded = pad(size),
                    .stride_q = stride_q,
                    .stride_k = stride_k,
                    .causal = options->causal,
                    .window = options->window};
}

/* Elements of q, and of k where a query asks for them: a cache holds many keys that none sees. */
static inline int64_t elements_read(const qm_attention_args *args) {
  const int32_t *cu_q = args->cu_q.data, *cu_k = args->cu_k.data;
  int64_t keys = 0;
  for (int64_t s = 0; s < args->sequences; s++)
    if (cu_q[s + 1] > cu_q[s]) keys += cu_k[s + 1] - cu_k[s];
  return args->q.count + keys * args->kv_heads * args->head_size;
}

/* The bf16 passes in AMX tiles, and whether they are the ones to take: the device has AMX and some
** sequence fills a tile. It depends on shapes alone, so one shape always gives one result. */
int32_t QM_CPU(attention_amx)(const qm_attention_args *args);
int32_t QM_CPU(attention_backward_amx)(const qm_attention_backward_args *args);
static inline int32_t takes_amx(const qm_cpu_context *context, const qm_array *q, const qm_array *k,
                                const qm_array *cu_q) {
  return context->amx && q->dtype == QM_BF16 && longest(cu_q) * q->shape[1] >= 16 * k->shape[1];
}

#endif
