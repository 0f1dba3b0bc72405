/* tensor.c - moving bytes in and out of tensors, filling and converting them. */
#include <stdlib.h>

#include "internal.h"

/* Host memory must be there and of the array's size. */
static int32_t check_host(qm__call *call, const qm_array *array, const void *host,
                          int64_t size_bytes) {
  const int64_t expected = array->count * qm_dtype_size(array->dtype);
  qm__require(call, size_bytes == expected && (host != NULL || expected == 0),
              "argument 'host': expected %lld bytes, got %lld", (long long)expected,
              (long long)(host == NULL ? 0 : size_bytes));
  return qm__finish(call);
}

int32_t qm_write(const qm_tensor *out, const void *host, int64_t size_bytes) {
  qm__call call = qm__begin("qm_write");
  qm_array array;
  qm__operand(&call, "out", out, "any [...]", QM__WRITE, &array);
  if (check_host(&call, &array, host, size_bytes) != QM_OK || size_bytes == 0) return call.status;
  if (qm__graph_refuse(call.device, "writing to it from the host") != QM_OK) return QM_E_ARGUMENT;
  return call.device->backend->write(call.device->context, array.data, host, size_bytes);
}

int32_t qm_read(const qm_tensor *x, void *host, int64_t size_bytes) {
  qm__call call = qm__begin("qm_read");
  qm_array array;
  qm__operand(&call, "x", x, "any [...]", QM__READ, &array);
  if (check_host(&call, &array, host, size_bytes) != QM_OK || size_bytes == 0) return call.status;
  if (qm__graph_refuse(call.device, "reading a value back") != QM_OK) return QM_E_ARGUMENT;
  return call.device->backend->read(call.device->context, array.data, host, size_bytes);
}

enum { BOUNCE_BYTES = 4 << 20 };

/* Between two devices that cannot reach each other: by way of the host, piece by piece. */
static int32_t bounce(qm_device *source, qm_device *target, const char *x, char *out,
                      int64_t size_bytes) {
  char *buffer = malloc(BOUNCE_BYTES);
  if (buffer == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  int32_t status = QM_OK;
  for (int64_t at = 0; at < size_bytes && status == QM_OK; at += BOUNCE_BYTES) {
    const int64_t rest = size_bytes - at, piece = rest < BOUNCE_BYTES ? rest : BOUNCE_BYTES;
    status = source->backend->read(source->context, x + at, buffer, piece);
    if (status == QM_OK) status = target->backend->write(target->context, out + at, buffer, piece);
  }
  free(buffer);
  return status;
}

static int32_t copy_across(const qm_tensor *x, const qm_tensor *out) {
  qm__call source = qm__begin("qm_copy"), target = qm__begin("qm_copy");
  qm_array from, to;
  qm__operand(&source, "x", x, "any [...]", QM__READ, &from);
  if (source.status != QM_OK) return source.status;
  qm__operand(&target, "out", out, "any [...]", QM__WRITE, &to);
  if (target.status != QM_OK) return target.status;
  bool same_shape = from.ndim == to.ndim;
  for (int32_t i = 0; i < from.ndim && same_shape; i++) same_shape = from.shape[i] == to.shape[i];
  char got[160], expected[160];
  qm__describe(x, expected, sizeof expected);
  qm__describe(out, got, sizeof got);
  qm__require(&target, same_shape && from.dtype == to.dtype,
              "argument 'out': expected %s, got %s (across devices types must agree)", expected,
              got);
  if (target.status != QM_OK) return target.status;
  const int64_t size_bytes = from.count * qm_dtype_size(from.dtype);
  qm_device *source_device = source.device, *target_device = target.device;
  if (qm__graph_refuse(source_device, "copying to another device") != QM_OK) return QM_E_ARGUMENT;
  if (source_device->backend->host_memory) return qm_write(out, from.data, size_bytes);
  if (target_device->backend->host_memory) return qm_read(x, to.data, size_bytes);
  if (qm__graph_refuse(target_device, "copying from another device") != QM_OK) return QM_E_ARGUMENT;
  const qm_backend *backend = target_device->backend;
  if (backend->copy_between == NULL || backend != source_device->backend)
    return bounce(source_device, target_device, from.data, to.data, size_bytes);
  if (size_bytes == 0) return QM_OK;
  return backend->copy_between(target_device->context, to.data, source_device->context, from.data,
                               size_bytes);
}

int32_t qm_copy(const qm_tensor *x, const qm_tensor *out) {
  if (x != NULL && out != NULL && x->storage != NULL && out->storage != NULL &&
      x->storage->device != out->storage->device)
    return copy_across(x, out);
  qm__call call = qm__begin("qm_copy");
  qm_copy_args args;
  qm__operand(&call, "x", x, "any [...]", QM__READ, &args.x);
  qm__operand(&call, "out", out, "any [...]", QM__WRITE, &args.out);
  qm__same_shape(&call, "out", &args.x, &args.out);
  return QM__DISPATCH(call, copy, &args);
}

int32_t qm_fill(const qm_tensor *out, double value) {
  qm__call call = qm__begin("qm_fill");
  qm_fill_args args = {.value = value};
  qm__operand(&call, "out", out, "any [...]", QM__WRITE, &args.out);
  return QM__DISPATCH(call, fill, &args);
}

int32_t qm_random(const qm_tensor *out, int32_t kind, double a, double b, const qm_noise *noise) {
  qm__call call = qm__begin("qm_random");
  qm_random_args args = {.kind = kind, .a = a, .b = b};
  qm__operand(&call, "out", out, "float [...]", QM__WRITE, &args.out);
  qm__require(&call, kind == QM_UNIFORM || kind == QM_NORMAL,
              "argument 'kind': expected QM_UNIFORM or QM_NORMAL, got %d", kind);
  qm__require(&call, noise != NULL, "argument 'noise': expected a qm_noise, got nothing");
  if (noise != NULL) args.noise = *noise;
  return QM__DISPATCH(call, random, &args);
}
