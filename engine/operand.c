/* operand.c - checking one call's operands against their specs ("f32 [K, N]").
**
** These are the only shape checks in the system: Lua passes its tensors straight on, and the
** sentence written here is what the user reads.
*/
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static const struct {
  const char *name;
  int32_t size;
} dtypes[QM_DTYPE_COUNT] = {
    [QM_F32] = {"f32", 4}, [QM_F16] = {"f16", 2}, [QM_BF16] = {"bf16", 2}, [QM_I8] = {"i8", 1},
    [QM_U8] = {"u8", 1},   [QM_I16] = {"i16", 2}, [QM_I32] = {"i32", 4},   [QM_I64] = {"i64", 8},
};

const char *qm_dtype_name(int32_t dtype) {
  return dtype < 0 || dtype >= QM_DTYPE_COUNT ? NULL : dtypes[dtype].name;
}

int32_t qm_dtype_size(int32_t dtype) {
  return dtype < 0 || dtype >= QM_DTYPE_COUNT ? 0 : dtypes[dtype].size;
}

int64_t qm__count(const qm_tensor *x) {
  int64_t count = 1;
  for (int32_t i = 0; i < x->ndim; i++) count *= x->shape[i];
  return count;
}

/* Bounds the product of the extents other than 0, so that nothing made of them overflows. */
static const int64_t volume_max = (int64_t)1 << 52;

void qm__describe(const qm_tensor *x, char *text, size_t size) {
  const char *dtype = qm_dtype_name(x->dtype);
  size_t used = (size_t)snprintf(text, size, "%s [", dtype == NULL ? "?" : dtype);
  for (int32_t i = 0; i < x->ndim && i < QM_DIMS_MAX && used < size; i++)
    used += (size_t)snprintf(text + used, size - used, i == 0 ? "%lld" : ", %lld",
                             (long long)x->shape[i]);
  if (used < size) snprintf(text + used, size - used, "]");
}

qm__call qm__begin(const char *function) { return (qm__call){.function = function}; }

void qm__require(qm__call *call, bool condition, const char *format, ...) {
  if (condition || call->status != QM_OK) return;
  char sentence[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  const bool is_named = call->item > 0 && strncmp(sentence, "argument '", 10) == 0;
  const char *quote = is_named ? strchr(sentence + 10, '\'') : NULL;
  if (quote == NULL)
    call->status = qm__fail(QM_E_ARGUMENT, "%s", sentence);
  else /* "argument 'x[3]': expected ..." */
    call->status = qm__fail(QM_E_ARGUMENT, "%.*s[%lld]%s", (int)(quote - sentence), sentence,
                            (long long)call->item, quote);
}

/* Index of a bound size, or -1. */
static int32_t find_size(const qm__call *call, const char *name, size_t length) {
  for (int32_t i = 0; i < call->size_count; i++)
    if (strlen(call->sizes[i].name) == length && memcmp(call->sizes[i].name, name, length) == 0)
      return i;
  return -1;
}

static void bind(qm__call *call, const char *name, size_t length, int64_t value) {
  if (call->size_count >= QM__SIZES_MAX || length >= QM__NAME_MAX) {
    qm__require(call, false, "%s: too many sizes in its specs", call->function);
    return;
  }
  memcpy(call->sizes[call->size_count].name, name, length);
  call->sizes[call->size_count].name[length] = '\0';
  call->sizes[call->size_count++].value = value;
}

void qm__bind(qm__call *call, const char *name, int64_t value) {
  bind(call, name, strlen(name), value);
}

int64_t qm__size(const qm__call *call, const char *name) {
  const int32_t i = find_size(call, name, strlen(name));
  return i < 0 ? 0 : call->sizes[i].value;
}

/* The descriptor against its storage: nothing outside these bytes is ever touched. */
static bool lies_in_storage(qm__call *call, const char *name, const qm_tensor *x) {
  if (x->storage == NULL || x->ndim < 0 || x->ndim > QM_DIMS_MAX || qm_dtype_size(x->dtype) == 0) {
    qm__require(call, false, "argument '%s': not a tensor (or one that was freed)", name);
    return false;
  }
  const int64_t element = qm_dtype_size(x->dtype), size_bytes = x->storage->size_bytes;
  const int64_t offset = x->offset_bytes;
  bool fits = offset >= 0 && offset <= size_bytes && offset % element == 0, empty = false;
  int64_t volume = 1;
  for (int32_t i = 0; i < x->ndim && fits; i++) {
    const int64_t extent = x->shape[i] == 0 ? 1 : x->shape[i];
    empty = empty || x->shape[i] == 0;
    fits = extent > 0 && volume <= volume_max / extent;
    if (fits) volume *= extent;
  }
  fits = fits && (empty || volume <= (size_bytes - offset) / element);
  qm__require(call, fits, "argument '%s': its extents leave its storage", name);
  return fits;
}

static const char *skip_space(const char *text) { return text + strspn(text, " ,"); }

static bool dtype_fits(qm__call *call, const char *type, size_t length, const qm_tensor *x) {
  if (length == 3 && memcmp(type, "any", 3) == 0) return true;
  if (length == 5 && memcmp(type, "float", 5) == 0)
    return x->dtype == QM_F32 || x->dtype == QM_F16 || x->dtype == QM_BF16;
  if (type[0] == '=') { /* the dtype of an operand checked before: bound as "=name" */
    const int32_t i = find_size(call, type, length);
    return i < 0 || call->sizes[i].value == x->dtype;
  }
  const char *name = qm_dtype_name(x->dtype);
  const size_t name_length = strlen(name);
  for (const char *end = type + length; type < end;) {
    const char *bar = memchr(type, '|', (size_t)(end - type));
    const char *stop = bar == NULL ? end : bar;
    if ((size_t)(stop - type) == name_length && memcmp(type, name, name_length) == 0) return true;
    type = stop + 1;
  }
  return false;
}

/* Match (and bind) the shape; on a mismatch nothing is bound. text stands behind '['. */
static bool shape_fits(qm__call *call, const char *text, const qm_tensor *x) {
  if (strncmp(text, "...", 3) == 0) return true;
  const int32_t bound_before = call->size_count;
  int32_t dim = 0;
  bool fits = true;
  for (text = skip_space(text); *text != ']' && fits; text = skip_space(text), dim++) {
    const size_t length = strcspn(text, " ,]");
    if (dim >= x->ndim) {
      fits = false;
    } else if (*text >= '0' && *text <= '9') {
      int64_t number = 0;
      for (size_t i = 0; i < length; i++) number = number * 10 + (text[i] - '0');
      fits = number == x->shape[dim];
    } else {
      const int32_t i = find_size(call, text, length);
      if (i < 0)
        bind(call, text, length, x->shape[dim]);
      else
        fits = call->sizes[i].value == x->shape[dim];
    }
    text += length;
  }
  fits = fits && dim == x->ndim;
  if (!fits) call->size_count = bound_before;
  return fits;
}

/* "f32 [G, N]" with what is known so far: "f32 [G, N=96]". */
static void describe_expected(const qm__call *call, const char *spec, char *text, size_t size) {
  const char *bracket = strchr(spec, '[');
  size_t used = 0;
  if (spec[0] == '=') {
    const int32_t i = find_size(call, spec, strcspn(spec, " "));
    used = (size_t)snprintf(text, size, "%s [",
                            i < 0 ? "any" : qm_dtype_name((int32_t)call->sizes[i].value));
  } else {
    used = (size_t)snprintf(text, size, "%.*s", (int)(bracket - spec + 1), spec);
  }
  for (const char *at = bracket + 1; *at != '\0' && used < size;) {
    const size_t length = strcspn(at, " ,]");
    if (length == 0) {
      text[used++] = *at++;
      continue;
    }
    used += (size_t)snprintf(text + used, size - used, "%.*s", (int)length, at);
    const int32_t i = find_size(call, at, length);
    if (i >= 0 && used < size)
      used += (size_t)snprintf(text + used, size - used, "=%lld", (long long)call->sizes[i].value);
    at += length;
  }
  text[used < size ? used : size - 1] = '\0';
}

void qm__operand(qm__call *call, const char *name, const qm_tensor *x, const char *spec,
                 qm__use use, qm_array *out) {
  memset(out, 0, sizeof *out);
  if (call->status != QM_OK) return;
  char expected[160], got[160];
  const char *bracket = strchr(spec, '[');
  const size_t type_length = strcspn(spec, " ");
  if (x == NULL) {
    describe_expected(call, spec, expected, sizeof expected);
    qm__require(call, false, "argument '%s': expected %s, got nothing", name, expected);
    return;
  }
  if (!lies_in_storage(call, name, x)) return;
  if (!dtype_fits(call, spec, type_length, x) || !shape_fits(call, bracket + 1, x)) {
    describe_expected(call, spec, expected, sizeof expected);
    qm__describe(x, got, sizeof got);
    qm__require(call, false, "argument '%s': expected %s, got %s", name, expected, got);
    return;
  }
  if (call->device == NULL) call->device = x->storage->device;
  qm__require(call, call->device == x->storage->device,
              "argument '%s': expected a tensor on %s, got one on %s", name,
              call->device->backend->name, x->storage->device->backend->name);
  qm__require(call, use == QM__READ || !x->storage->read_only,
              "argument '%s': expected a writable tensor, got one that is a mapped file", name);
  char key[QM__NAME_MAX];
  if (snprintf(key, sizeof key, "=%s", name) < (int)sizeof key) qm__bind(call, key, x->dtype);
  if (call->status != QM_OK) return;
  out->data = x->storage->memory == NULL ? NULL : x->storage->memory + x->offset_bytes;
  out->ndim = x->ndim;
  out->dtype = x->dtype;
  out->count = qm__count(x);
  memcpy(out->shape, x->shape, sizeof out->shape);
  if (call->operand_count < (call->many == NULL ? QM__OPERANDS_MAX : call->many_max)) {
    const char *begin = out->data, *end = begin + out->count * qm_dtype_size(x->dtype);
    qm__extents(call)[call->operand_count++] = (qm__extent){name, begin, end, use};
  }
  if (use != QM__READ) atomic_fetch_add(&x->storage->writes, 1);
  if (call->device->recording != NULL) qm__graph_hold(call->device->recording, x->storage);
}

void qm__optional(qm__call *call, const char *name, const qm_tensor *x, const char *spec,
                  qm__use use, qm_array *out) {
  memset(out, 0, sizeof *out);
  if (x != NULL) qm__operand(call, name, x, spec, use, out);
}

void *qm__list_args(qm__call *call, size_t args_bytes, const void *list, int64_t count,
                    size_t item_bytes, int32_t operands) {
  qm__require(call, count >= 0 && count <= INT32_MAX,
              "argument 'count': expected 0 or more, got %lld", (long long)count);
  qm__require(call, list != NULL || count == 0,
              "argument 'count': expected 0 where there is no list, got %lld", (long long)count);
  if (call->status != QM_OK) return NULL;
  const size_t items = (size_t)count, most = items * (size_t)operands + QM__OPERANDS_MAX;
  args_bytes += items * item_bytes;
  char *args = calloc(1, args_bytes + most * sizeof *call->many);
  if (args == NULL) call->status = qm__fail(QM_E_MEMORY, "the host is out of memory");
  if (args == NULL) return NULL;
  call->list_bytes = (int64_t)(items * item_bytes);
  call->many = (qm__extent *)(void *)(args + args_bytes); /* both are multiples of 8 */
  call->many_max = (int64_t)most;
  return args;
}

void qm__list_item(qm__call *call, int64_t item, int64_t count) {
  call->item = count > 1 && item < count ? item + 1 : 0;
  call->size_count = 0;
}

void qm__same_shape(qm__call *call, const char *name, const qm_array *a, const qm_array *b) {
  if (call->status != QM_OK) return;
  bool same = a->ndim == b->ndim;
  for (int32_t i = 0; i < a->ndim && same; i++) same = a->shape[i] == b->shape[i];
  if (same) return;
  const qm_tensor expected = {.ndim = a->ndim,
                              .dtype = b->dtype,
                              .shape = {a->shape[0], a->shape[1], a->shape[2], a->shape[3]}};
  const qm_tensor got = {.ndim = b->ndim,
                         .dtype = b->dtype,
                         .shape = {b->shape[0], b->shape[1], b->shape[2], b->shape[3]}};
  char expected_text[160], got_text[160];
  qm__describe(&expected, expected_text, sizeof expected_text);
  qm__describe(&got, got_text, sizeof got_text);
  qm__require(call, false, "argument '%s': expected %s, got %s", name, expected_text, got_text);
}

static int by_begin(const void *left, const void *right) {
  const qm__extent *a = left, *b = right;
  return (a->begin > b->begin) - (a->begin < b->begin);
}

/* May a lie where b does? */
static bool may_overlap(const qm__extent *a, const qm__extent *b) {
  const bool same = a->begin == b->begin && a->end == b->end;
  const bool in_place = a->use == QM__IN_PLACE && b->use == QM__READ;
  return (same && in_place) || (a->use == QM__READ && b->use == QM__READ);
}

int32_t qm__finish(qm__call *call) {
  if (call->status != QM_OK) return call->status;
  call->item = 0;
  qm__extent *extents = qm__extents(call);
  const bool sorted = call->many != NULL; /* so that only neighbours need be compared */
  if (sorted) qsort(extents, (size_t)call->operand_count, sizeof *extents, by_begin);
  for (int64_t i = 0; i < call->operand_count; i++) {
    const qm__extent *a = &extents[i];
    for (int64_t j = i + 1; j < call->operand_count; j++) {
      const qm__extent *b = &extents[j];
      if (sorted && b->begin >= a->end) break;
      const bool empty = a->begin == a->end || b->begin == b->end;
      if (empty || a->end <= b->begin || b->end <= a->begin) continue;
      const bool a_first = a->use != QM__READ;
      qm__require(call, may_overlap(a, b) || may_overlap(b, a),
                  "argument '%s': overlaps argument '%s'", a_first ? a->name : b->name,
                  a_first ? b->name : a->name);
    }
  }
  return call->status;
}
