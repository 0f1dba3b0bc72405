/* gemm.c - matrix products through oneDNN. Reference: kernels/reference/gemm.c, within the rounding
** of sums taken in another order; the same bits every time for one thread count.
**
** Transposes are strides, beta is a sum post-operation, alpha an output scale. bf16 multiplies
** natively where the CPU can; elsewhere, and for f16, operands are widened to f32 first. What
** oneDNN refuses goes the same way, and to the reference at last: slower, never wrong.
** Measured: two cores of a Xeon with AMX, bf16, 2.3 TFLOP/s at [4096, 256] x [256, 768] and its
** gradient to x, 1.7 at the weight gradient (sum over 4096 rows). For that one, cutting the sum
** into slices, transposing x first or swapping the operands gained nothing or lost; packed weights
** gained a tenth forward. A call costs 0.7 us over its arithmetic.
*/
#include <dnnl.h>
#include <pthread.h>
#include <stdlib.h>

#include "cpu.h"

/* What a primitive is made for. No padding, so that keys compare as bytes. */
typedef struct product {
  int64_t batch, m, k, n;
  int32_t type, out_type; /* QM_BF16 or QM_F32 */
  int32_t trans_a, trans_b;
  float alpha, beta;
} product;
_Static_assert(sizeof(product) == 4 * 8 + 6 * 4, "keys have no padding");

enum { A, B, OUT, OPERANDS };

typedef struct entry {
  product key;
  uint64_t used; /* when last; 0: empty */
  dnnl_primitive_t primitive;
  dnnl_memory_t memory[OPERANDS]; /* bound anew to each call's operands */
} entry;

/* A model has a few dozen products; each lives in one of WAYS places that its hash selects. */
enum { SETS = 64, WAYS = 8 };

struct qm_cpu_gemm {
  pthread_mutex_t lock; /* around a whole product: entries and scratch are in use until its end */
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  uint64_t clock;
  entry entries[SETS][WAYS];
  struct {
    void *data;
    int64_t size_bytes;
  } scratch[OPERANDS]; /* f32 copies of operands that oneDNN cannot take as they are */
};

static int32_t refuse(const char *what, dnnl_status_t code) {
  if (code == dnnl_out_of_memory)
    return qm_reference_host->fail(QM_E_MEMORY, "oneDNN: %s: out of memory", what);
  return qm_reference_host->fail(QM_E_DEVICE, "oneDNN: %s failed with code %d", what, (int)code);
}

static int native_bf16(const qm_cpu_context *context) {
  const int needed = (int)dnnl_cpu_isa_avx512_core_bf16;
  /* A lowered level is a request to run as an older CPU would. */
  return strcmp(context->level, "v4") == 0 &&
         ((int)dnnl_get_effective_cpu_isa() & needed) == needed;
}

int32_t qm_cpu_gemm_open(qm_cpu_context *context) {
  struct qm_cpu_gemm *gemm = calloc(1, sizeof *gemm);
  if (gemm == NULL) return qm_reference_host->fail(QM_E_MEMORY, "the host is out of memory");
  dnnl_status_t code = dnnl_engine_create(&gemm->engine, dnnl_cpu, 0);
  if (code == dnnl_success)
    code = dnnl_stream_create(&gemm->stream, gemm->engine, dnnl_stream_default_flags);
  if (code != dnnl_success) {
    if (gemm->engine != NULL) dnnl_engine_destroy(gemm->engine);
    free(gemm);
    return refuse("opening the CPU engine", code);
  }
  pthread_mutex_init(&gemm->lock, NULL);
  context->gemm = gemm;
  context->bf16 = native_bf16(context);
  return QM_OK;
}

static void entry_clear(entry *e) {
  for (int i = 0; i < OPERANDS; i++)
    if (e->memory[i] != NULL) dnnl_memory_destroy(e->memory[i]);
  if (e->primitive != NULL) dnnl_primitive_destroy(e->primitive);
  memset(e, 0, sizeof *e);
}

void qm_cpu_gemm_close(qm_cpu_context *context) {
  struct qm_cpu_gemm *gemm = context->gemm;
  for (int i = 0; i < SETS * WAYS; i++) entry_clear(&gemm->entries[i / WAYS][i % WAYS]);
  for (int i = 0; i < OPERANDS; i++) free(gemm->scratch[i].data);
  dnnl_stream_destroy(gemm->stream);
  dnnl_engine_destroy(gemm->engine);
  pthread_mutex_destroy(&gemm->lock);
  free(gemm);
}

/* [batch, rows, columns], or [rows, columns] alone; transposed: stored as [columns, rows]. */
static dnnl_status_t describe(dnnl_memory_desc_t *out, const product *p, int64_t rows,
                              int64_t columns, int transposed, int32_t type) {
  const int batched = p->batch > 1;
  dnnl_dims_t dims = {0}, strides = {0};
  dims[0] = p->batch; /* overwritten where there is one product only */
  strides[0] = rows * columns;
  dims[batched] = rows;
  strides[batched] = transposed ? 1 : columns;
  dims[batched + 1] = columns;
  strides[batched + 1] = transposed ? rows : 1;
  return dnnl_memory_desc_init_by_strides(out, 2 + batched, dims,
                                          type == QM_BF16 ? dnnl_bf16 : dnnl_f32, strides);
}

static dnnl_status_t set_attributes(dnnl_primitive_attr_t attributes, const product *p) {
  dnnl_status_t code = dnnl_success;
  if (p->alpha != 1.0f) code = dnnl_primitive_attr_set_output_scales(attributes, 1, 0, &p->alpha);
  if (code != dnnl_success || p->beta == 0.0f) return code;
  dnnl_post_ops_t sum;
  code = dnnl_post_ops_create(&sum);
  if (code != dnnl_success) return code;
  code = dnnl_post_ops_append_sum(sum, p->beta);
  if (code == dnnl_success) code = dnnl_primitive_attr_set_post_ops(attributes, sum);
  dnnl_post_ops_destroy(sum);
  return code;
}

static dnnl_status_t create_primitive(const struct qm_cpu_gemm *gemm, const product *p,
                                      const dnnl_memory_desc_t layouts[OPERANDS],
                                      dnnl_primitive_t *out) {
  dnnl_matmul_desc_t operation;
  dnnl_primitive_attr_t attributes;
  dnnl_primitive_desc_t description = NULL;
  dnnl_status_t code =
      dnnl_matmul_desc_init(&operation, &layouts[A], &layouts[B], NULL, &layouts[OUT]);
  if (code != dnnl_success) return code;
  code = dnnl_primitive_attr_create(&attributes);
  if (code != dnnl_success) return code;
  code = set_attributes(attributes, p);
  if (code == dnnl_success)
    code = dnnl_primitive_desc_create(&description, &operation, attributes, gemm->engine, NULL);
  if (code == dnnl_success) code = dnnl_primitive_create(out, description);
  if (description != NULL) dnnl_primitive_desc_destroy(description);
  dnnl_primitive_attr_destroy(attributes);
  return code;
}

static dnnl_status_t entry_fill(const struct qm_cpu_gemm *gemm, entry *e, const product *p) {
  dnnl_memory_desc_t layouts[OPERANDS];
  e->key = *p;
  dnnl_status_t code = describe(&layouts[A], p, p->m, p->k, p->trans_a, p->type);
  if (code == dnnl_success) code = describe(&layouts[B], p, p->k, p->n, p->trans_b, p->type);
  if (code == dnnl_success) code = describe(&layouts[OUT], p, p->m, p->n, 0, p->out_type);
  if (code == dnnl_success) code = create_primitive(gemm, p, layouts, &e->primitive);
  for (int i = 0; i < OPERANDS && code == dnnl_success; i++)
    code = dnnl_memory_create(&e->memory[i], &layouts[i], gemm->engine, DNNL_MEMORY_NONE);
  return code;
}

/* The cached primitive for p, made when there is none. QM_E_UNSUPPORTED: oneDNN has none either. */
static int32_t find(struct qm_cpu_gemm *gemm, const product *p, entry **out) {
  uint64_t hash = 0;
  uint32_t words[sizeof *p / sizeof(uint32_t)];
  memcpy(words, p, sizeof words);
  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    hash = (hash ^ words[i]) * 0x9E3779B97F4A7C15u;
  entry *set = gemm->entries[hash >> 58], *oldest = set;
  for (entry *e = set; e < set + WAYS; e++) {
    if (e->used != 0 && memcmp(&e->key, p, sizeof *p) == 0) {
      e->used = ++gemm->clock;
      *out = e;
      return QM_OK;
    }
    if (e->used < oldest->used) oldest = e;
  }
  entry_clear(oldest);
  const dnnl_status_t code = entry_fill(gemm, oldest, p);
  if (code != dnnl_success) {
    entry_clear(oldest);
    return code == dnnl_unimplemented || code == dnnl_invalid_arguments
               ? QM_E_UNSUPPORTED
               : refuse("preparing a product", code);
  }
  oldest->used = ++gemm->clock;
  *out = oldest;
  return QM_OK;
}

static int32_t execute(struct qm_cpu_gemm *gemm, entry *e, void *const data[OPERANDS]) {
  static const int names[OPERANDS] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST};
  dnnl_exec_arg_t arguments[OPERANDS];
  dnnl_status_t code = dnnl_success;
  for (int i = 0; i < OPERANDS && code == dnnl_success; i++) {
    code = dnnl_memory_set_data_handle(e->memory[i], data[i]);
    arguments[i] = (dnnl_exec_arg_t){.arg = names[i], .memory = e->memory[i]};
  }
  if (code == dnnl_success)
    code = dnnl_primitive_execute(e->primitive, gemm->stream, OPERANDS, arguments);
  if (code == dnnl_success) code = dnnl_stream_wait(gemm->stream);
  return code == dnnl_success ? QM_OK : refuse("a product", code);
}

/* Make x a f32 array of the same extents, in scratch `slot` and not yet filled. */
static int32_t borrow(struct qm_cpu_gemm *gemm, int slot, qm_array *x) {
  const int64_t needed = x->count * (int64_t)sizeof(float);
  if (gemm->scratch[slot].size_bytes < needed) {
    free(gemm->scratch[slot].data);
    gemm->scratch[slot].data = NULL;
    gemm->scratch[slot].size_bytes = 0;
    const int32_t status = qm_reference_allocate(NULL, needed, &gemm->scratch[slot].data);
    if (status != QM_OK)
      return qm_reference_host->fail(status, "qm_gemm: no memory for %lld bytes of f32 operand",
                                     (long long)needed);
    gemm->scratch[slot].size_bytes = needed;
  }
  x->dtype = QM_F32;
  x->data = gemm->scratch[slot].data;
  return QM_OK;
}

static int32_t convert(const qm_cpu_context *context, const qm_array *x, const qm_array *out) {
  const qm_copy_args copy = {.x = *x, .out = *out};
  return context->kernels->copy(NULL, &copy);
}

/* The product with operands of `type`, through f32 scratch where args has others. */
static int32_t multiply(qm_cpu_context *context, int32_t type, const qm_gemm_args *args) {
  struct qm_cpu_gemm *gemm = context->gemm;
  const int direct = args->out.dtype == QM_F32 || args->out.dtype == type;
  const product p = {
      .batch = args->batch,
      .m = args->m,
      .k = args->k,
      .n = args->n,
      .type = type,
      .out_type = direct ? args->out.dtype : QM_F32,
      .trans_a = args->trans_a,
      .trans_b = args->trans_b,
      .alpha = (float)args->alpha,
      .beta = args->beta == 0.0 ? 0.0f : (float)args->beta,
  };
  entry *e = NULL;
  int32_t status = find(gemm, &p, &e);
  const qm_array *operands[OPERANDS] = {&args->a, &args->b, &args->out};
  qm_array widened[OPERANDS] = {args->a, args->b, args->out};
  void *data[OPERANDS];
  for (int i = 0; i < OPERANDS && status == QM_OK; i++) {
    const int as_is = i == OUT ? direct : operands[i]->dtype == type;
    data[i] = operands[i]->data;
    if (as_is) continue;
    status = borrow(gemm, i, &widened[i]);
    data[i] = widened[i].data;
    if (status == QM_OK && (i != OUT || p.beta != 0.0f))
      status = convert(context, operands[i], &widened[i]);
  }
  if (status == QM_OK) status = execute(gemm, e, data);
  if (status == QM_OK && !direct) status = convert(context, &widened[OUT], &args->out);
  return status;
}

int32_t qm_cpu_gemm(void *opaque, const qm_gemm_args *args) {
  qm_cpu_context *context = opaque;
  if (args->out.count == 0 || args->k == 0) return qm_reference_gemm(NULL, args);
  pthread_mutex_lock(&context->gemm->lock);
  int32_t status = QM_E_UNSUPPORTED;
  if (args->a.dtype == QM_BF16 && context->bf16) status = multiply(context, QM_BF16, args);
  if (status == QM_E_UNSUPPORTED) status = multiply(context, QM_F32, args);
  if (status == QM_E_UNSUPPORTED) status = qm_reference_gemm(NULL, args);
  pthread_mutex_unlock(&context->gemm->lock);
  return status;
}
