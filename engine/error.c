/* error.c - status codes, the last error's sentence, and the count of live handles. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

enum { MESSAGE_BYTES = 1024 };

static _Thread_local char last_error[MESSAGE_BYTES];
static atomic_llong handles_live;

const qm_host qm__host = {
    .version = QM_BACKEND_VERSION, .struct_size = sizeof(qm_host), .fail = qm__fail};

int32_t qm__fail(int32_t status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

void qm__prefix_error(const char *prefix) {
  char sentence[MESSAGE_BYTES];
  memcpy(sentence, last_error, sizeof sentence);
  snprintf(last_error, sizeof last_error, "%s: %.*s", prefix, MESSAGE_BYTES / 2, sentence);
}

int32_t qm_abi_version(void) { return QM_ABI_VERSION; }

const char *qm_last_error(void) { return last_error; }

const char *qm_status_name(int32_t status) {
  switch (status) {
    case QM_OK: return "ok";
    case QM_E_ARGUMENT: return "bad argument";
    case QM_E_MEMORY: return "out of memory";
    case QM_E_DEVICE: return "device failure";
    case QM_E_UNSUPPORTED: return "unsupported";
    case QM_E_IO: return "file failure";
    default: return "unknown status";
  }
}

void qm__handle_opened(void) { atomic_fetch_add(&handles_live, 1); }
void qm__handle_closed(void) { atomic_fetch_sub(&handles_live, 1); }
int64_t qm_handles_live(void) { return atomic_load(&handles_live); }
