/* profile.c - wall time per kernel while a profile runs. Host kernels are synchronous, so the time
** around the call is the kernel's own. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "internal.h"

enum { ENTRIES_MAX = 128 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static qm_profile_entry entries[ENTRIES_MAX];
static int32_t entry_count;
static atomic_bool enabled;

double qm_clock(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

double qm__profile_clock(void) {
  return atomic_load_explicit(&enabled, memory_order_relaxed) ? qm_clock() : 0.0;
}

int32_t qm__profile_book(const char *kernel, double started, int32_t status) {
  if (started <= 0.0) return status;
  const double seconds = qm__profile_clock() - started;
  pthread_mutex_lock(&lock);
  int32_t i = 0;
  while (i < entry_count && strcmp(entries[i].kernel, kernel) != 0) i++;
  if (i == entry_count && i < ENTRIES_MAX) {
    entries[i] = (qm_profile_entry){.calls = 0};
    snprintf(entries[i].kernel, sizeof entries[i].kernel, "%s", kernel);
    entry_count++;
  }
  if (i < ENTRIES_MAX && seconds >= 0.0) {
    entries[i].calls++;
    entries[i].seconds += seconds;
  }
  pthread_mutex_unlock(&lock);
  return status;
}

int32_t qm_profile_enable(int32_t on) {
  pthread_mutex_lock(&lock);
  if (on) entry_count = 0;
  atomic_store(&enabled, on != 0);
  pthread_mutex_unlock(&lock);
  return QM_OK;
}

int32_t qm_profile_get(int32_t index, qm_profile_entry *out) {
  pthread_mutex_lock(&lock);
  const bool there = out != NULL && index >= 0 && index < entry_count;
  if (there) *out = entries[index];
  pthread_mutex_unlock(&lock);
  return there ? QM_OK
               : qm__fail(QM_E_ARGUMENT, "argument 'index': no kernel %d in the profile", index);
}
