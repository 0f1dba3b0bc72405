/* storage.c - reference-counted device memory, and files mapped as such. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

static int32_t storage_new(qm_device *device, qm_storage **out) {
  qm_storage *storage = calloc(1, sizeof *storage);
  if (storage == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  atomic_init(&storage->references, 1);
  storage->device = device;
  qm_device_retain(device);
  qm__handle_opened();
  *out = storage;
  return QM_OK;
}

int32_t qm_storage_create(qm_device *device, int64_t size_bytes, qm_storage **out) {
  if (device == NULL || out == NULL) return qm__fail(QM_E_ARGUMENT, "qm_storage_create: NULL");
  if (size_bytes < 0)
    return qm__fail(QM_E_ARGUMENT, "argument 'size_bytes': expected 0 or more, got %lld",
                    (long long)size_bytes);
  void *memory;
  int64_t block_bytes;
  qm__pool *pool;
  int32_t status = qm__allocate(&device->allocator, size_bytes, &memory, &block_bytes, &pool);
  if (status != QM_OK) return status;
  qm_storage *storage = NULL;
  status = storage_new(device, &storage);
  if (status != QM_OK) {
    qm__release(&device->allocator, memory, block_bytes, pool);
    return status;
  }
  storage->memory = memory;
  storage->size_bytes = size_bytes;
  storage->block_bytes = block_bytes;
  storage->pool = pool;
  *out = storage;
  return QM_OK;
}

int32_t qm_storage_map(qm_device *device, const char *path, qm_storage **out) {
  if (device == NULL || path == NULL || out == NULL)
    return qm__fail(QM_E_ARGUMENT, "qm_storage_map: NULL");
  if (!device->backend->host_memory)
    return qm__fail(QM_E_UNSUPPORTED, "files map into host devices, not into %s",
                    device->backend->name);
  const int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* a pipe must not wait */
  struct stat status_of;
  if (file < 0) return qm__fail(QM_E_IO, "%s: %s", path, strerror(errno));
  if (fstat(file, &status_of) != 0 || !S_ISREG(status_of.st_mode)) {
    close(file);
    return qm__fail(QM_E_IO, "%s: not a regular file", path);
  }
  void *memory = NULL;
  if (status_of.st_size > 0)
    memory = mmap(NULL, (size_t)status_of.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  const int map_error = errno;
  close(file);
  if (memory == MAP_FAILED) return qm__fail(QM_E_IO, "%s: %s", path, strerror(map_error));
  qm_storage *storage = NULL;
  const int32_t status = storage_new(device, &storage);
  if (status != QM_OK) {
    if (memory != NULL) munmap(memory, (size_t)status_of.st_size);
    return status;
  }
  storage->memory = memory;
  storage->size_bytes = status_of.st_size;
  storage->read_only = true;
  *out = storage;
  return QM_OK;
}

void qm_storage_retain(qm_storage *storage) {
  if (storage != NULL) atomic_fetch_add(&storage->references, 1);
}

void qm_storage_release(qm_storage *storage) {
  if (storage == NULL || atomic_fetch_sub(&storage->references, 1) != 1) return;
  if (storage->block_bytes > 0)
    qm__release(&storage->device->allocator, storage->memory, storage->block_bytes, storage->pool);
  else if (storage->memory != NULL)
    munmap(storage->memory, (size_t)storage->size_bytes);
  qm_device_release(storage->device);
  free(storage);
  qm__handle_closed();
}

int64_t qm_storage_size(const qm_storage *storage) {
  return storage == NULL ? 0 : storage->size_bytes;
}

int64_t qm_storage_version(const qm_storage *storage) {
  if (storage == NULL) return 0;
  qm_storage *counted = (qm_storage *)(uintptr_t)storage;
  return atomic_load(&counted->writes) + atomic_load(&counted->device->replays);
}

int32_t qm_storage_references(const qm_storage *storage) {
  return storage == NULL ? 0 : atomic_load(&((qm_storage *)(uintptr_t)storage)->references);
}
