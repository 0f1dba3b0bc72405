/* gemm.c - matrix products through oneDNN. Reference: kernels/reference/gemm.c, within the rounding
** of sums taken in another order; the same bits every time for one thread count.
**
** Transposes are strides, beta is a sum post-operation, alpha an output scale. bf16 multiplies
** natively where the CPU can; elsewhere, and for f16, operands are widened to f32 first. What
** oneDNN refuses goes the same way, and to the reference at last: slower, never wrong.
** Measured: two cores of a Xeon with AMX, bf16 (scripts/bench/gemm.lua): 2.5 TFLOP/s at [4096, 256]
** x [256, 768] and its gradient to x, 1.7 at the weight gradient (a sum over 4096 rows). For that
** one, cutting the sum into slices, transposing x first or swapping the operands gained nothing or
** lost. A call costs 0.7 us over its arithmetic.
*/
#include "gemm.h"

#include <pthread.h>
#include <stdlib.h>

#include "gemm_apart.h"

/* A model has a few dozen products; each lives in one of WAYS places that its hash selects. */
enum { SETS = 64, WAYS = 8 };

struct qm_cpu_gemm {
  pthread_mutex_t lock; /* around a whole product: entries and scratch are in use until its end */
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  uint64_t clock;
  qm_cpu_primitive entries[SETS][WAYS];
  struct {
    void *data;
    int64_t size_bytes;
  } scratch[BUFFERS]; /* f32 copies of operands that oneDNN cannot take as they are; packed b */
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

void qm_cpu_gemm_close(qm_cpu_context *context) {
  struct qm_cpu_gemm *gemm = context->gemm;
  for (int i = 0; i < SETS * WAYS; i++) qm_cpu_primitive_clear(&gemm->entries[i / WAYS][i % WAYS]);
  for (int i = 0; i < BUFFERS; i++) free(gemm->scratch[i].data);
  dnnl_stream_destroy(gemm->stream);
  dnnl_engine_destroy(gemm->engine);
  pthread_mutex_destroy(&gemm->lock);
  free(gemm);
}

/* The cached primitive for p, made when there is none. QM_E_UNSUPPORTED: oneDNN has none either. */
static int32_t find(struct qm_cpu_gemm *gemm, const qm_cpu_product *p, qm_cpu_primitive **out) {
  uint64_t hash = 0;
  uint32_t words[sizeof *p / sizeof(uint32_t)];
  memcpy(words, p, sizeof words);
  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    hash = (hash ^ words[i]) * 0x9E3779B97F4A7C15u;
  qm_cpu_primitive *set = gemm->entries[hash >> 58], *oldest = set;
  for (qm_cpu_primitive *e = set; e < set + WAYS; e++) {
    if (e->used != 0 && memcmp(&e->key, p, sizeof *p) == 0) {
      e->used = ++gemm->clock;
      *out = e;
      return QM_OK;
    }
    if (e->used < oldest->used) oldest = e;
  }
  qm_cpu_primitive_clear(oldest);
  const dnnl_status_t code = qm_cpu_primitive_create(oldest, p, gemm->engine);
  if (code != dnnl_success) {
    qm_cpu_primitive_clear(oldest);
    return code == dnnl_unimplemented || code == dnnl_invalid_arguments
               ? QM_E_UNSUPPORTED
               : refuse("preparing a product", code);
  }
  oldest->used = ++gemm->clock;
  *out = oldest;
  return QM_OK;
}

/* Room for so many bytes in scratch `slot`. */
static int32_t reserve(struct qm_cpu_gemm *gemm, int slot, int64_t needed) {
  if (gemm->scratch[slot].size_bytes >= needed) return QM_OK;
  free(gemm->scratch[slot].data);
  gemm->scratch[slot].data = NULL;
  gemm->scratch[slot].size_bytes = 0;
  const int32_t status = qm_reference_allocate(NULL, needed, &gemm->scratch[slot].data);
  if (status != QM_OK)
    return qm_reference_host->fail(status, "qm_gemm: no memory for %lld bytes of scratch",
                                   (long long)needed);
  gemm->scratch[slot].size_bytes = needed;
  return QM_OK;
}

/* Make x a f32 array of the same extents, in scratch `slot` and not yet filled. */
static int32_t borrow(struct qm_cpu_gemm *gemm, int slot, qm_array *x) {
  const int32_t status = reserve(gemm, slot, x->count * (int64_t)sizeof(float));
  x->dtype = QM_F32;
  x->data = gemm->scratch[slot].data;
  return status;
}

static dnnl_status_t pack(struct qm_cpu_gemm *gemm, qm_cpu_primitive *e) {
  const dnnl_exec_arg_t arguments[2] = {{DNNL_ARG_FROM, e->memory[B]},
                                        {DNNL_ARG_TO, e->memory[PACKED]}};
  dnnl_status_t code = dnnl_memory_set_data_handle(e->memory[PACKED], gemm->scratch[PACKED].data);
  if (code == dnnl_success) code = dnnl_primitive_execute(e->pack, gemm->stream, 2, arguments);
  return code;
}

static int32_t execute(struct qm_cpu_gemm *gemm, qm_cpu_primitive *e, void *const data[OPERANDS]) {
  static const int names[OPERANDS] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST};
  dnnl_exec_arg_t arguments[OPERANDS];
  dnnl_status_t code = dnnl_success;
  if (e->pack != NULL) {
    const int32_t status = reserve(gemm, PACKED, (int64_t)e->packed_bytes);
    if (status != QM_OK) return status;
  }
  for (int i = 0; i < OPERANDS && code == dnnl_success; i++) {
    code = dnnl_memory_set_data_handle(e->memory[i], data[i]);
    arguments[i] = (dnnl_exec_arg_t){.arg = names[i], .memory = e->memory[i]};
  }
  if (code == dnnl_success && e->pack != NULL) {
    code = pack(gemm, e);
    arguments[B].memory = e->memory[PACKED];
  }
  if (code == dnnl_success)
    code = dnnl_primitive_execute(e->primitive, gemm->stream, OPERANDS, arguments);
  if (code == dnnl_success) code = dnnl_stream_wait(gemm->stream);
  return code == dnnl_success ? QM_OK : refuse("a product", code);
}

static int32_t convert(const qm_cpu_context *context, const qm_array *x, const qm_array *out) {
  const qm_copy_args copy = {.x = *x, .out = *out};
  return context->kernels->copy(NULL, &copy);
}

/* The product with operands of `type`, through f32 scratch where args has others. */
static int32_t multiply(qm_cpu_context *context, int32_t type, const qm_gemm_args *args) {
  struct qm_cpu_gemm *gemm = context->gemm;
  const int direct = args->out.dtype == QM_F32 || args->out.dtype == type;
  const qm_cpu_product p = {
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
  qm_cpu_primitive *e = NULL;
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

/* The product, then its bias in place: this costs nothing beside the product. */
static int32_t multiply_and_add(qm_cpu_context *context, const qm_gemm_args *args) {
  qm_gemm_args plain = *args;
  plain.bias = (qm_array){0};
  const qm_binary_args sum = {
      .a = args->out,
      .b = args->bias,
      .out = args->out,
      .shape = {1, 1, args->m, args->n},
      .stride_a = {0, 0, args->n, 1},
      .stride_b = {0, 0, 0, 1},
      .op = QM_ADD,
  };
  const int32_t status = qm_cpu_gemm(context, &plain);
  return status == QM_OK ? context->kernels->binary(NULL, &sum) : status;
}

int32_t qm_cpu_gemm(void *opaque, const qm_gemm_args *args) {
  qm_cpu_context *context = opaque;
  if (args->epilogue != QM_EPILOGUE_NONE) return qm_gemm_apart(context->kernels, context, args);
  if (args->out.count == 0 || args->k == 0) return qm_reference_gemm(NULL, args);
  if (args->bias.data != NULL) return multiply_and_add(context, args);
  pthread_mutex_lock(&context->gemm->lock);
  int32_t status = QM_E_UNSUPPORTED;
  if (args->a.dtype == QM_BF16 && context->bf16) status = multiply(context, QM_BF16, args);
  if (status == QM_E_UNSUPPORTED) status = multiply(context, QM_F32, args);
  if (status == QM_E_UNSUPPORTED) status = qm_reference_gemm(NULL, args);
  pthread_mutex_unlock(&context->gemm->lock);
  return status;
}
