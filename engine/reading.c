/* reading.c - reads that do not wait: begun now, asked for later. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

struct qm_reading {
  qm_device *device; /* retained */
  void *begun;       /* the backend's, or NULL */
  void *snapshot;    /* device memory that the bytes leave from, or NULL */
  int64_t snapshot_bytes;
  qm__pool *pool;
  int64_t size_bytes;
  char bytes[]; /* where the backend reads at once */
};

enum { SMALL_BYTES = 64 << 10 }; /* sooner read in the kernels' stream than copied first */

static int32_t begin(qm_reading *reading, const void *x) {
  const qm_backend *backend = reading->device->backend;
  void *context = reading->device->context;
  const int64_t size_bytes = reading->size_bytes;
  if (backend->read_begin == NULL)
    return size_bytes == 0 ? QM_OK : backend->read(context, x, reading->bytes, size_bytes);
  /* Without memory for a snapshot, later kernels wait. */
  if (size_bytes > SMALL_BYTES &&
      qm__allocate(&reading->device->allocator, size_bytes, &reading->snapshot,
                   &reading->snapshot_bytes, &reading->pool) != QM_OK)
    reading->snapshot = NULL;
  return backend->read_begin(context, x, reading->snapshot, size_bytes, &reading->begun);
}

int32_t qm_read_begin(const qm_tensor *x, qm_reading **out) {
  qm__call call = qm__begin("qm_read_begin");
  qm_array array;
  qm__operand(&call, "x", x, "any [...]", QM__READ, &array);
  qm__require(&call, out != NULL, "argument 'out': expected a place for the reading, got nothing");
  if (qm__finish(&call) != QM_OK) return call.status;
  if (qm__graph_refuse(call.device, "reading a value back") != QM_OK) return QM_E_ARGUMENT;
  const int64_t size_bytes = array.count * qm_dtype_size(array.dtype);
  const bool at_once = call.device->backend->read_begin == NULL;
  qm_reading *reading = calloc(1, sizeof *reading + (at_once ? (size_t)size_bytes : 0));
  if (reading == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  reading->device = call.device;
  reading->size_bytes = size_bytes;
  qm_device_retain(reading->device);
  qm__handle_opened();
  const int32_t status = begin(reading, array.data);
  if (status != QM_OK)
    qm_reading_release(reading);
  else
    *out = reading;
  return status;
}

int32_t qm_reading_ready(const qm_reading *reading) {
  if (reading == NULL) return qm__fail(QM_E_ARGUMENT, "qm_reading_ready: NULL");
  if (reading->begun == NULL) return 1;
  return reading->device->backend->read_ready(reading->device->context, reading->begun);
}

/* Wait, copy into host unless it is NULL, and release everything. */
static int32_t end(qm_reading *reading, void *host) {
  qm_device *device = reading->device;
  int32_t status = QM_OK;
  if (reading->begun != NULL)
    status = device->backend->read_end(device->context, reading->begun, host);
  else if (host != NULL && device->backend->read_begin == NULL)
    memcpy(host, reading->bytes, (size_t)reading->size_bytes);
  if (reading->snapshot != NULL)
    qm__release(&device->allocator, reading->snapshot, reading->snapshot_bytes, reading->pool);
  free(reading);
  qm_device_release(device);
  qm__handle_closed();
  return status;
}

int32_t qm_reading_end(qm_reading *reading, void *host, int64_t size_bytes) {
  if (reading == NULL || host == NULL) return qm__fail(QM_E_ARGUMENT, "qm_reading_end: NULL");
  if (size_bytes != reading->size_bytes)
    return qm__fail(QM_E_ARGUMENT, "argument 'host': expected %lld bytes, got %lld",
                    (long long)reading->size_bytes, (long long)size_bytes);
  return end(reading, host);
}

void qm_reading_release(qm_reading *reading) {
  if (reading != NULL) end(reading, NULL);
}
