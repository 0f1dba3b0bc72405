/* allocator.c - one device's memory: blocks are kept after release and reused by size class.
**
** Sizes round up to sixteen classes per doubling (at most 1/16 wasted), so a training step that
** asks for the same shapes again and again is served from the cache. The limit bounds live, cached
** and workspace bytes together; the cache is given back before a request is refused.
**
** While a graph is recorded its pool serves: from its own released blocks, then from the cache,
** then from the device, and what it has got stays with it. Its bytes count as live until it closes.
*/
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { SMALLEST_LOG2 = 8 }; /* 256 bytes, sixteen steps to the next power of two */
/* The largest request: its class is still one of QM__SIZE_CLASSES. */
static const int64_t largest_bytes = (int64_t)1 << (SMALLEST_LOG2 + QM__SIZE_CLASSES / 16 - 1);

/* The class of a request and, through *rounded, that class's block size. */
static int32_t size_class(int64_t size_bytes, int64_t *rounded) {
  int32_t log2 = SMALLEST_LOG2;
  while (log2 < 60 && ((int64_t)2 << log2) <= size_bytes) log2++;
  const int64_t base = (int64_t)1 << log2, step = base / 16;
  int64_t steps = size_bytes <= base ? 0 : (size_bytes - base + step - 1) / step;
  if (steps == 16) {
    log2++;
    steps = 0;
    *rounded = base * 2;
  } else {
    *rounded = base + steps * step;
  }
  return (log2 - SMALLEST_LOG2) * 16 + (int32_t)steps;
}

void qm__allocator_open(qm__allocator *allocator, const qm_backend *backend, void *context) {
  memset(allocator, 0, sizeof *allocator);
  allocator->backend = backend;
  allocator->context = context;
  pthread_mutex_init(&allocator->lock, NULL);
}

static void empty_cache_locked(qm__allocator *allocator) {
  for (int32_t i = 0; i < QM__SIZE_CLASSES; i++) {
    while (allocator->free_lists[i] != NULL) {
      qm__block *block = allocator->free_lists[i];
      allocator->free_lists[i] = block->next;
      allocator->backend->release(allocator->context, block->memory, block->size_bytes);
      allocator->memory.cached_bytes -= block->size_bytes;
      free(block);
    }
  }
}

void qm__allocator_empty_cache(qm__allocator *allocator) {
  pthread_mutex_lock(&allocator->lock);
  empty_cache_locked(allocator);
  pthread_mutex_unlock(&allocator->lock);
}

void qm__allocator_close(qm__allocator *allocator) {
  qm__allocator_empty_cache(allocator);
  pthread_mutex_destroy(&allocator->lock);
}

int64_t qm__workspace_bytes(const qm__allocator *allocator) {
  const qm_backend *backend = allocator->backend;
  return backend->workspace_bytes == NULL ? 0 : backend->workspace_bytes(allocator->context);
}

static int32_t refuse(const qm__allocator *allocator, int64_t size_bytes) {
  const qm_memory *m = &allocator->memory;
  return qm__fail(
      QM_E_MEMORY,
      "out of memory on %s: asked for %lld bytes with %lld live and %lld of workspace (peak %lld, "
      "limit %lld)",
      allocator->backend->name, (long long)size_bytes, (long long)m->live_bytes,
      (long long)qm__workspace_bytes(allocator), (long long)m->peak_bytes,
      (long long)m->limit_bytes);
}

/* Take a block off a list; NULL when there is none. */
static void *take(qm__block **list) {
  qm__block *block = *list;
  if (block == NULL) return NULL;
  void *memory = block->memory;
  *list = block->next;
  free(block);
  return memory;
}

/* Remember a block; false where the host has no memory for it. */
static bool put(qm__block **lists, void *memory, int64_t block_bytes) {
  qm__block *block = malloc(sizeof *block);
  if (block == NULL) return false;
  int64_t rounded;
  const int32_t class = size_class(block_bytes, &rounded);
  *block = (qm__block){lists[class], memory, block_bytes};
  lists[class] = block;
  return true;
}

static int32_t allocate_locked(qm__allocator *allocator, int64_t size_bytes, void **memory,
                               int64_t *block_bytes) {
  qm_memory *m = &allocator->memory;
  if (size_bytes < 0 || size_bytes > largest_bytes) return refuse(allocator, size_bytes);
  int64_t rounded;
  const int32_t class = size_class(size_bytes, &rounded);
  *block_bytes = rounded;
  m->allocation_count++;
  if (allocator->pool != NULL && (*memory = take(&allocator->pool->free_lists[class])) != NULL) {
    m->live_count++;
    return QM_OK;
  }
  *memory = take(&allocator->free_lists[class]);
  if (*memory != NULL) {
    m->cached_bytes -= rounded;
  } else {
    const int64_t wanted = rounded + qm__workspace_bytes(allocator);
    if (m->limit_bytes > 0 && m->live_bytes + m->cached_bytes + wanted > m->limit_bytes) {
      empty_cache_locked(allocator);
      if (m->live_bytes + wanted > m->limit_bytes) return refuse(allocator, size_bytes);
    }
    int32_t status = allocator->backend->allocate(allocator->context, rounded, memory);
    if (status == QM_E_MEMORY && m->cached_bytes > 0) {
      empty_cache_locked(allocator);
      status = allocator->backend->allocate(allocator->context, rounded, memory);
    }
    if (status == QM_E_MEMORY) return refuse(allocator, size_bytes);
    if (status != QM_OK) return status;
  }
  m->live_bytes += rounded;
  m->live_count++;
  if (allocator->pool != NULL) allocator->pool->size_bytes += rounded;
  if (m->live_bytes > m->peak_bytes) m->peak_bytes = m->live_bytes;
  return QM_OK;
}

int32_t qm__allocate(qm__allocator *allocator, int64_t size_bytes, void **memory,
                     int64_t *block_bytes, qm__pool **pool) {
  pthread_mutex_lock(&allocator->lock);
  const int32_t status = allocate_locked(allocator, size_bytes, memory, block_bytes);
  *pool = allocator->pool;
  if (status == QM_OK && *pool != NULL) (*pool)->live_count++;
  pthread_mutex_unlock(&allocator->lock);
  return status;
}

/* From live to cached; a host too poor to remember the block gives it back instead. */
static void cache(qm__allocator *allocator, void *memory, int64_t block_bytes) {
  allocator->memory.live_bytes -= block_bytes;
  if (put(allocator->free_lists, memory, block_bytes))
    allocator->memory.cached_bytes += block_bytes;
  else
    allocator->backend->release(allocator->context, memory, block_bytes);
}

void qm__release(qm__allocator *allocator, void *memory, int64_t block_bytes, qm__pool *pool) {
  pthread_mutex_lock(&allocator->lock);
  allocator->memory.live_count--;
  if (pool != NULL) pool->live_count--;
  if (pool == NULL || pool->closed || !put(pool->free_lists, memory, block_bytes))
    cache(allocator, memory, block_bytes);
  if (pool != NULL && pool->closed && pool->live_count == 0) free(pool);
  pthread_mutex_unlock(&allocator->lock);
}

qm__pool *qm__pool_open(qm__allocator *allocator) {
  qm__pool *pool = calloc(1, sizeof *pool);
  pthread_mutex_lock(&allocator->lock);
  allocator->pool = pool;
  pthread_mutex_unlock(&allocator->lock);
  return pool;
}

void qm__pool_stop(qm__allocator *allocator) {
  pthread_mutex_lock(&allocator->lock);
  allocator->pool = NULL;
  pthread_mutex_unlock(&allocator->lock);
}

void qm__pool_close(qm__allocator *allocator, qm__pool *pool) {
  pthread_mutex_lock(&allocator->lock);
  for (int32_t i = 0; i < QM__SIZE_CLASSES; i++) {
    while (pool->free_lists[i] != NULL) {
      const int64_t block_bytes = pool->free_lists[i]->size_bytes;
      cache(allocator, take(&pool->free_lists[i]), block_bytes);
    }
  }
  pool->closed = true;
  if (pool->live_count == 0) free(pool);
  pthread_mutex_unlock(&allocator->lock);
}
