/* profile.c - time, bytes and floating-point operations of each kernel while a profile runs.
**
** Host kernels are done when their call returns, so the time around the call is theirs. A device
** that works on while the host goes on times itself: its marks are read when the profile ends.
*/
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

enum { ENTRIES_MAX = 128 };

/* A call that a device timed. */
typedef struct pending {
  qm_device *device; /* retained */
  void *mark;
  int32_t entry;
} pending;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static qm_profile_entry entries[ENTRIES_MAX];
static int32_t entry_count;
static pending *pendings;
static int64_t pending_count, pending_room;
static atomic_bool enabled;

double qm_clock(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

qm__timing qm__profile_begin(const qm_device *device, const char *kernel) {
  const qm_backend *backend = device->backend;
  qm__timing timing = {.kernel = kernel};
  if (backend->range_begin != NULL) backend->range_begin(device->context, kernel);
  if (!atomic_load_explicit(&enabled, memory_order_relaxed)) return timing;
  timing.started = qm_clock();
  if (backend->time_begin != NULL)
    backend->time_begin(device->context, &timing.mark); /* failing, it leaves none */
  return timing;
}

/* Where a kernel is booked, or -1 when there is no room. */
static int32_t find_entry(const char *kernel) {
  int32_t i = 0;
  while (i < entry_count && strcmp(entries[i].kernel, kernel) != 0) i++;
  if (i == entry_count && i < ENTRIES_MAX) {
    entries[i] = (qm_profile_entry){.calls = 0};
    snprintf(entries[i].kernel, sizeof entries[i].kernel, "%s", kernel);
    entry_count++;
  }
  return i < ENTRIES_MAX ? i : -1;
}

/* Leave the mark for the end of the profile; false where the host has no memory for that. */
static bool defer(qm_device *device, void *mark, int32_t entry) {
  if (pending_count == pending_room) {
    const int64_t room = 2 * pending_room + 1024;
    pending *more = realloc(pendings, (size_t)room * sizeof *more);
    if (more == NULL) return false;
    pendings = more;
    pending_room = room;
  }
  qm_device_retain(device);
  pendings[pending_count++] = (pending){device, mark, entry};
  return true;
}

int32_t qm__profile_end(qm_device *device, const qm__timing *timing, qm__work work,
                        int32_t status) {
  const qm_backend *backend = device->backend;
  if (backend->range_end != NULL) backend->range_end(device->context);
  if (timing->started <= 0.0) return status;
  if (timing->mark != NULL) backend->time_end(device->context, timing->mark);
  double seconds = timing->mark == NULL ? qm_clock() - timing->started : 0.0;
  pthread_mutex_lock(&lock);
  const bool booking = atomic_load(&enabled); /* the profile may have ended meanwhile */
  const int32_t i = booking ? find_entry(timing->kernel) : -1;
  if (timing->mark != NULL && (i < 0 || !defer(device, timing->mark, i)))
    backend->time_read(device->context, timing->mark, &seconds);
  if (i >= 0) {
    entries[i].calls++;
    entries[i].seconds += seconds;
    entries[i].bytes += work.bytes;
    entries[i].flops += work.flops;
  }
  pthread_mutex_unlock(&lock);
  return status;
}

/* Take what is pending out of the list and add it up. Reading waits for the device. */
static int32_t settle(void) {
  pthread_mutex_lock(&lock);
  pending *list = pendings;
  const int64_t count = pending_count;
  pendings = NULL;
  pending_count = pending_room = 0;
  int32_t status = QM_OK;
  for (int64_t i = 0; i < count; i++) {
    double seconds = 0.0;
    const int32_t read =
        list[i].device->backend->time_read(list[i].device->context, list[i].mark, &seconds);
    if (status == QM_OK) status = read;
    entries[list[i].entry].seconds += seconds;
  }
  pthread_mutex_unlock(&lock);
  for (int64_t i = 0; i < count; i++) qm_device_release(list[i].device);
  free(list);
  return status;
}

int32_t qm_profile_enable(int32_t on) {
  atomic_store(&enabled, false);
  const int32_t status = settle();
  pthread_mutex_lock(&lock);
  if (on) entry_count = 0;
  atomic_store(&enabled, on != 0);
  pthread_mutex_unlock(&lock);
  return status;
}

int32_t qm_profile_get(int32_t index, qm_profile_entry *out) {
  pthread_mutex_lock(&lock);
  const bool there = out != NULL && index >= 0 && index < entry_count;
  if (there) *out = entries[index];
  pthread_mutex_unlock(&lock);
  return there ? QM_OK
               : qm__fail(QM_E_ARGUMENT, "argument 'index': no kernel %d in the profile", index);
}
