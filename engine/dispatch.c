/* dispatch.c - one kernel call whose operands are checked: run, noted in a recording, or timed. */
#include "internal.h"

static const struct {
  const char *name;
  int64_t args_bytes;
} kernels[QM__KERNEL_COUNT] = {
#define X(name) {#name, (int64_t)sizeof(qm_##name##_args)},
    QM_KERNEL_LIST(X)
#undef X
};

int32_t qm__run(const qm_device *device, int32_t kernel, const void *args) {
  const qm_kernels *table = &device->backend->kernels;
  switch (kernel) {
#define X(name)                                                                                    \
  case QM__KERNEL_##name:                                                                          \
    if (table->name != NULL) return table->name(device->context, (const qm_##name##_args *)args);  \
    break;
    QM_KERNEL_LIST(X)
#undef X
    default: break;
  }
  return qm__fail(QM_E_UNSUPPORTED, "the %s backend has no kernel '%s'", device->backend->name,
                  kernels[kernel].name);
}

int32_t qm__dispatch(qm__call *call, int32_t kernel, const void *args) {
  if (qm__finish(call) != QM_OK) return call->status;
  const qm_device *device = call->device;
  if (device->recording != NULL) {
    const int64_t args_bytes = kernels[kernel].args_bytes;
    const int32_t status = qm__graph_note(device->recording, kernel, args, args_bytes);
    if (status != QM_OK || device->backend->graph_begin == NULL) return status;
    return qm__run(device, kernel, args);
  }
  const double started = qm__profile_clock();
  return qm__profile_book(kernels[kernel].name, started, qm__run(device, kernel, args));
}
