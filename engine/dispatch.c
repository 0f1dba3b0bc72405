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

/* Run a kernel; where it finds no memory for its workspace, give back what is cached and try
** again. */
static int32_t run_with_memory(qm_device *device, int32_t kernel, const void *args) {
  const int32_t status = qm__run(device, kernel, args);
  if (status != QM_E_MEMORY || device->allocator.memory.cached_bytes == 0) return status;
  qm__allocator_empty_cache(&device->allocator);
  return qm__run(device, kernel, args);
}

int32_t qm__dispatch(qm__call *call, int32_t kernel, const void *args) {
  if (qm__finish(call) != QM_OK) return call->status;
  qm_device *device = call->device;
  const qm__work work = qm__work_of(call, kernel, args);
  if (device->recording != NULL) {
    const int64_t args_bytes = kernels[kernel].args_bytes + call->list_bytes;
    const int32_t status = qm__graph_note(device->recording, kernel, args, args_bytes, work);
    if (status != QM_OK || device->backend->graph_begin == NULL) return status;
    return qm__run(device, kernel, args);
  }
  const qm__timing timing = qm__profile_begin(device, kernels[kernel].name);
  return qm__profile_end(device, &timing, work, run_with_memory(device, kernel, args));
}
