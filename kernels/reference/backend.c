/* backend.c - the reference backend's table, and host memory for every host backend. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "reference.h"

const qm_host *qm_reference_host;

const qm_kernels qm_reference_kernels = {
#define X(name) .name = qm_reference_##name,
    QM_KERNEL_LIST(X)
#undef X
};

enum { HUGE_PAGE_BYTES = 2 << 20 };

int32_t qm_reference_allocate(void *context, int64_t size_bytes, void **memory) {
  (void)context;
  const size_t alignment = size_bytes >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 64;
  const int code = posix_memalign(memory, alignment, (size_t)size_bytes);
  if (code == ENOMEM) return QM_E_MEMORY;
  if (code != 0) return qm_reference_host->fail(QM_E_DEVICE, "posix_memalign: error %d", code);
  if (size_bytes >= HUGE_PAGE_BYTES) madvise(*memory, (size_t)size_bytes, MADV_HUGEPAGE);
  return QM_OK;
}

void qm_reference_release(void *context, void *memory, int64_t size_bytes) {
  (void)context;
  (void)size_bytes;
  free(memory);
}

int32_t qm_reference_write(void *context, void *out, const void *host, int64_t size_bytes) {
  (void)context;
  memcpy(out, host, (size_t)size_bytes);
  return QM_OK;
}

int32_t qm_reference_read(void *context, const void *x, void *host, int64_t size_bytes) {
  (void)context;
  memcpy(host, x, (size_t)size_bytes);
  return QM_OK;
}

int32_t qm_reference_sync(void *context) {
  (void)context;
  return QM_OK;
}

static int32_t open_device(int32_t index, void **context) {
  *context = NULL;
  if (index == 0) return QM_OK;
  return qm_reference_host->fail(QM_E_DEVICE,
                                 "the reference backend has one device, index 0, got %d", index);
}

static void close_device(void *context) { (void)context; }

static void describe(void *context, qm_device_info *out) {
  (void)context;
  snprintf(out->description, sizeof out->description, "plain C, one thread: the oracle");
  out->threads = 1;
  out->fused_rows = 64;
}

const qm_backend *qm_reference_backend(const qm_host *host) {
  static qm_backend backend;
  if (backend.struct_size != 0) return &backend; /* other threads may be reading it */
  qm_reference_host = host;
  backend = (qm_backend){
      .version = QM_BACKEND_VERSION,
      .struct_size = sizeof(qm_backend),
      .name = "reference",
      .host_memory = 1,
      .open = open_device,
      .close = close_device,
      .describe = describe,
      .allocate = qm_reference_allocate,
      .release = qm_reference_release,
      .write = qm_reference_write,
      .read = qm_reference_read,
      .sync = qm_reference_sync,
      .kernels = qm_reference_kernels,
  };
  return &backend;
}
