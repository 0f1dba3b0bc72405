/* attention.c - softmax attention over packed sequences and its gradient, one query row at a time.
** Source: Vaswani et al., arXiv 1706.03762; the gradient from the saved log-sum-exp as in Dao,
** arXiv 2307.08691, algorithm 2. A query that sees no key gives 0, with an lse of minus infinity.
*/
#include <stdlib.h>

#include "reference.h"

int32_t qm_reference_check_offsets(const char *name, const qm_array *offsets, int64_t rows) {
  const int32_t *cu = offsets->data;
  const int64_t last = offsets->count - 1;
  for (int64_t s = 0; s <= last; s++)
    if (cu[s] < (s == 0 ? 0 : cu[s - 1]) || cu[s] > rows || (s == 0 && cu[s] != 0) ||
        (s == last && cu[s] != rows))
      return qm_reference_host->fail(
          QM_E_ARGUMENT, "argument '%s': expected offsets ascending from 0 to %lld, got %d at %lld",
          name, (long long)rows, cu[s], (long long)s);
  return QM_OK;
}

/* Where one query row looks: key rows first .. end - 1, of head kv_head. */
typedef struct view {
  int64_t query, head, kv_head, first, end;
} view;

static view look(const qm_attention_args *args, int64_t s, int64_t query, int64_t head) {
  const int32_t *cu_q = args->cu_q.data, *cu_k = args->cu_k.data;
  /* The key row at the query's own position: the last of each are aligned. */
  const int64_t self = cu_k[s + 1] - (cu_q[s + 1] - query);
  view at = {query, head, head * args->kv_heads / args->heads, cu_k[s], cu_k[s + 1]};
  if (args->options.causal) at.end = self + 1;
  if (args->options.window > 0 && self - args->options.window + 1 > at.first)
    at.first = self - args->options.window + 1;
  if (at.first > cu_k[s + 1]) at.first = cu_k[s + 1];
  if (at.end < at.first) at.end = at.first;
  return at;
}

/* The size elements of a at i times those of b at j. */
static double dot(const qm_array *a, int64_t i, const qm_array *b, int64_t j, int64_t size) {
  double sum = 0.0;
  for (int64_t d = 0; d < size; d++)
    sum += (double)qm_load(a->data, a->dtype, i + d) * (double)qm_load(b->data, b->dtype, j + d);
  return sum;
}

static void attend(const qm_attention_args *args, view at, double *p) {
  const int64_t size = args->head_size, row = at.query * args->heads + at.head;
  const int64_t q = at.query * args->stride_q + at.head * size, head = at.kv_head * size;
  double most = -(double)INFINITY, sum = 0.0;
  for (int64_t j = at.first; j < at.end; j++) {
    p[j] = args->options.scale * dot(&args->q, q, &args->k, j * args->stride_k + head, size);
    most = p[j] > most ? p[j] : most;
  }
  for (int64_t j = at.first; j < at.end; j++) {
    p[j] = exp(p[j] - most);
    sum += p[j];
  }
  ((float *)args->lse.data)[row] = at.first == at.end ? -INFINITY : (float)(most + log(sum));
  for (int64_t d = 0; d < size; d++) {
    double out = 0.0;
    for (int64_t j = at.first; j < at.end; j++)
      out += p[j] * (double)qm_load(args->v.data, args->v.dtype, j * args->stride_v + head + d);
    qm_store(args->out.data, args->out.dtype, row * size + d,
             at.first == at.end ? 0.0f : (float)(out / sum));
  }
}

static int32_t check(const qm_attention_args *args) {
  const int32_t status = qm_reference_check_offsets("cu_q", &args->cu_q, args->rows_q);
  return status != QM_OK ? status : qm_reference_check_offsets("cu_k", &args->cu_k, args->rows_k);
}

int32_t qm_reference_attention(void *context, const qm_attention_args *args) {
  (void)context;
  const int32_t *cu_q = args->cu_q.data, status = check(args);
  if (status != QM_OK) return status;
  double *p = calloc((size_t)args->rows_k + 1, sizeof *p);
  if (p == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "attention: the host is out of memory");
  for (int64_t s = 0; s < args->sequences; s++)
    for (int64_t i = cu_q[s]; i < cu_q[s + 1]; i++)
      for (int64_t h = 0; h < args->heads; h++) attend(args, look(args, s, i, h), p);
  free(p);
  return QM_OK;
}

/* One query row's part of the gradients: P = exp(S - lse), dS = P (dP - delta) with
** delta = dout . out. */
static void attend_backward(const qm_attention_backward_args *args, view at, double *dq, double *dk,
                            double *dv) {
  const int64_t size = args->head_size, row = at.query * args->heads + at.head;
  const int64_t q = at.query * args->stride_q + at.head * size, head = at.kv_head * size;
  const double lse = (double)((const float *)args->lse.data)[row], scale = args->options.scale;
  const double delta = dot(&args->dout, row * size, &args->out, row * size, size);
  for (int64_t d = 0; d < size; d++) dq[d] = 0.0;
  for (int64_t j = at.first; j < at.end; j++) {
    const int64_t sums = (j * args->kv_heads + at.kv_head) * size;
    const int64_t k = j * args->stride_k + head, v = j * args->stride_v + head;
    const double p = exp(scale * dot(&args->q, q, &args->k, k, size) - lse);
    const double dp = dot(&args->dout, row * size, &args->v, v, size);
    const double ds = p * (dp - delta) * scale;
    for (int64_t d = 0; d < size; d++) {
      dq[d] += ds * (double)qm_load(args->k.data, args->k.dtype, k + d);
      dk[sums + d] += ds * (double)qm_load(args->q.data, args->q.dtype, q + d);
      dv[sums + d] += p * (double)qm_load(args->dout.data, args->dout.dtype, row * size + d);
    }
  }
  for (int64_t d = 0; d < size; d++) qm_store(args->dq.data, args->dq.dtype, q + d, (float)dq[d]);
}

int32_t qm_reference_attention_backward(void *context, const qm_attention_backward_args *args) {
  (void)context;
  const qm_attention_args forward = {.q = args->q,
                                     .k = args->k,
                                     .v = args->v,
                                     .cu_q = args->cu_q,
                                     .cu_k = args->cu_k,
                                     .sequences = args->sequences,
                                     .heads = args->heads,
                                     .kv_heads = args->kv_heads,
                                     .head_size = args->head_size,
                                     .rows_q = args->rows_q,
                                     .rows_k = args->rows_k,
                                     .options = args->options};
  const int32_t *cu_q = args->cu_q.data, status = check(&forward);
  if (status != QM_OK) return status;
  const size_t count = (size_t)args->dk.count, size = (size_t)args->head_size;
  double *sums = calloc(2 * count + size, sizeof *sums);
  if (sums == NULL)
    return qm_reference_host->fail(QM_E_MEMORY, "attention_backward: the host is out of memory");
  double *dk = sums + size, *dv = dk + count;
  for (int64_t s = 0; s < args->sequences; s++)
    for (int64_t i = cu_q[s]; i < cu_q[s + 1]; i++)
      for (int64_t h = 0; h < args->heads; h++)
        attend_backward(args, look(&forward, s, i, h), sums, dk, dv);
  const int64_t width = args->kv_heads * args->head_size;
  for (int64_t i = 0; i < args->dk.count; i++) {
    const int64_t r = i / width, c = i % width;
    qm_store(args->dk.data, args->dk.dtype, r * args->stride_k + c, (float)dk[i]);
    qm_store(args->dv.data, args->dv.dtype, r * args->stride_v + c, (float)dv[i]);
  }
  free(sums);
  return QM_OK;
}
