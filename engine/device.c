/* device.c - finding a backend, opening its devices, and what can be asked of one. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static pthread_mutex_t devices_lock = PTHREAD_MUTEX_INITIALIZER;
static qm_device *open_devices;

/* Backends other than the two built in live in libquartermoon_<name>.so beside this library. The
** full path comes from dladdr: under AddressSanitizer dlopen ignores $ORIGIN. */
static const qm_backend *load_backend(const char *name) {
  char path[4096];
  Dl_info self;
  const size_t length = strspn(name, "abcdefghijklmnopqrstuvwxyz");
  if (length == 0 || length > 16 || name[length] != '\0') {
    qm__fail(QM_E_DEVICE, "no device is called '%.32s'", name);
    return NULL;
  }
  if (dladdr((const void *)&devices_lock, &self) == 0 || self.dli_fname == NULL) {
    qm__fail(QM_E_DEVICE, "cannot tell where the engine's library lies");
    return NULL;
  }
  const char *slash = strrchr(self.dli_fname, '/');
  const int folder = slash == NULL ? 0 : (int)(slash - self.dli_fname + 1);
  snprintf(path, sizeof path, "%.*slibquartermoon_%s.so", folder, self.dli_fname, name);
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    qm__fail(QM_E_DEVICE, "no backend '%s': %s", name, dlerror());
    return NULL;
  }
  qm_backend_entry_function entry;
  *(void **)&entry = dlsym(library, "qm_backend_entry");
  if (entry == NULL) {
    qm__fail(QM_E_DEVICE, "backend '%s': %s exports no qm_backend_entry", name, path);
    dlclose(library);
    return NULL;
  }
  return entry(&qm__host);
}

static const qm_backend *find_backend(const char *name) {
  const qm_backend *backend = strcmp(name, "reference") == 0 ? qm_reference_backend(&qm__host)
                              : strcmp(name, "cpu") == 0     ? qm_cpu_backend(&qm__host)
                                                             : load_backend(name);
  if (backend == NULL) return NULL;
  if (backend->version != QM_BACKEND_VERSION || backend->struct_size != sizeof(qm_backend)) {
    qm__fail(QM_E_DEVICE, "backend '%s' was built for another version of this engine: rebuild it",
             name);
    return NULL;
  }
  return backend;
}

static int32_t open_locked(const char *name, int32_t index, qm_device **out) {
  for (qm_device *device = open_devices; device != NULL; device = device->next) {
    if (device->index == index && strcmp(device->backend->name, name) == 0) {
      qm_device_retain(device);
      *out = device;
      return QM_OK;
    }
  }
  const qm_backend *backend = find_backend(name);
  if (backend == NULL) return QM_E_DEVICE;
  void *context = NULL;
  const int32_t status = backend->open(index, &context);
  if (status != QM_OK) return status;
  qm_device *device = calloc(1, sizeof *device);
  if (device == NULL) {
    backend->close(context);
    return qm__fail(QM_E_MEMORY, "qm_device_open: the host is out of memory");
  }
  atomic_init(&device->references, 1);
  device->backend = backend;
  device->context = context;
  device->index = index;
  qm__allocator_open(&device->allocator, backend, context);
  device->next = open_devices;
  open_devices = device;
  qm__handle_opened();
  *out = device;
  return QM_OK;
}

int32_t qm_device_open(const char *name, int32_t index, qm_device **out) {
  if (name == NULL || out == NULL)
    return qm__fail(QM_E_ARGUMENT, "qm_device_open: a name and a place for the device are needed");
  if (index < 0)
    return qm__fail(QM_E_ARGUMENT, "argument 'index': expected 0 or more, got %d", index);
  pthread_mutex_lock(&devices_lock);
  const int32_t status = open_locked(name, index, out);
  pthread_mutex_unlock(&devices_lock);
  return status;
}

void qm_device_retain(qm_device *device) {
  if (device != NULL) atomic_fetch_add(&device->references, 1);
}

void qm_device_release(qm_device *device) {
  if (device == NULL) return;
  pthread_mutex_lock(&devices_lock);
  if (atomic_fetch_sub(&device->references, 1) == 1) {
    qm_device **link = &open_devices;
    while (*link != device) link = &(*link)->next;
    *link = device->next;
    qm__allocator_close(&device->allocator);
    device->backend->close(device->context);
    free(device);
    qm__handle_closed();
  }
  pthread_mutex_unlock(&devices_lock);
}

int32_t qm_device_get_info(const qm_device *device, qm_device_info *out) {
  if (device == NULL || out == NULL) return qm__fail(QM_E_ARGUMENT, "qm_device_get_info: NULL");
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "%s", device->backend->name);
  out->index = device->index;
  device->backend->describe(device->context, out);
  return QM_OK;
}

int32_t qm_device_sync(qm_device *device) {
  if (device == NULL) return qm__fail(QM_E_ARGUMENT, "qm_device_sync: NULL");
  const int32_t status = qm__graph_refuse(device, "waiting for it");
  if (status != QM_OK) return status;
  return device->backend->sync(device->context);
}

int32_t qm_device_memory(const qm_device *device, qm_memory *out) {
  if (device == NULL || out == NULL) return qm__fail(QM_E_ARGUMENT, "qm_device_memory: NULL");
  qm_device *mutable_device = (qm_device *)(uintptr_t)device; /* the lock is not const */
  pthread_mutex_lock(&mutable_device->allocator.lock);
  *out = device->allocator.memory;
  out->workspace_bytes = qm__workspace_bytes(&device->allocator);
  pthread_mutex_unlock(&mutable_device->allocator.lock);
  return QM_OK;
}

int32_t qm_device_set_limit(qm_device *device, int64_t limit_bytes) {
  if (device == NULL) return qm__fail(QM_E_ARGUMENT, "qm_device_set_limit: NULL");
  if (limit_bytes < 0)
    return qm__fail(QM_E_ARGUMENT, "argument 'limit_bytes': expected 0 (none) or more, got %lld",
                    (long long)limit_bytes);
  pthread_mutex_lock(&device->allocator.lock);
  device->allocator.memory.limit_bytes = limit_bytes;
  pthread_mutex_unlock(&device->allocator.lock);
  return QM_OK;
}

int32_t qm_device_reset_peak(qm_device *device) {
  if (device == NULL) return qm__fail(QM_E_ARGUMENT, "qm_device_reset_peak: NULL");
  pthread_mutex_lock(&device->allocator.lock);
  device->allocator.memory.peak_bytes = device->allocator.memory.live_bytes;
  pthread_mutex_unlock(&device->allocator.lock);
  return QM_OK;
}

int32_t qm_device_empty_cache(qm_device *device) {
  if (device == NULL) return qm__fail(QM_E_ARGUMENT, "qm_device_empty_cache: NULL");
  qm__allocator_empty_cache(&device->allocator);
  return QM_OK;
}
