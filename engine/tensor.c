/* tensor.c - moving bytes in and out of tensors, filling and converting them. */
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

/* Between devices one side is always host memory today, so the bytes take one hop. */
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
  if (qm__graph_refuse(source.device, "copying to another device") != QM_OK) return QM_E_ARGUMENT;
  if (source.device->backend->host_memory)
    return qm_write(out, from.data, from.count * qm_dtype_size(from.dtype));
  if (target.device->backend->host_memory)
    return qm_read(x, to.data, to.count * qm_dtype_size(to.dtype));
  return qm__fail(QM_E_UNSUPPORTED, "qm_copy: between two devices without host memory");
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
