/* graph.c - kernel calls recorded once and replayed.
**
** A backend that can record does so itself (a CUDA graph); for the others the calls are noted here,
** arguments and all, and repeated one by one. Either way a replay uses the addresses of the
** recording. So storages that recorded calls use are held until the graph is released, and memory
** asked for meanwhile comes from a pool of the graph's own.
*/
#include <stdlib.h>
#include <string.h>

#include "internal.h"

typedef struct note {
  struct note *next;
  int32_t kernel;
  max_align_t args[]; /* a copy */
} note;

struct qm_graph {
  qm_device *device; /* retained */
  void *recorded;    /* the backend's own, where it records by itself */
  note *first, **end;
  int64_t note_count;
  qm__work work; /* of all of them */
  int64_t serial;
  qm__pool *pool;
  qm_storage **held; /* retained */
  int64_t held_count, held_room;
  int32_t status; /* the first failure of the recording */
};

static atomic_llong recordings;

/* Release everything of a graph that is not being recorded any more. */
static void destroy(qm_graph *graph) {
  qm_device *device = graph->device;
  if (graph->recorded != NULL) device->backend->graph_release(device->context, graph->recorded);
  while (graph->first != NULL) {
    note *after = graph->first->next;
    free(graph->first);
    graph->first = after;
  }
  for (int64_t i = 0; i < graph->held_count; i++) qm_storage_release(graph->held[i]);
  free(graph->held);
  if (graph->pool != NULL) qm__pool_close(&device->allocator, graph->pool);
  free(graph);
  qm_device_release(device);
  qm__handle_closed();
}

int32_t qm_graph_begin(qm_device *device) {
  if (device == NULL) return qm__fail(QM_E_ARGUMENT, "qm_graph_begin: NULL");
  if (device->recording != NULL)
    return qm__fail(QM_E_ARGUMENT, "argument 'device': a graph is being recorded on %s already",
                    device->backend->name);
  qm_graph *graph = calloc(1, sizeof *graph);
  if (graph == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  graph->end = &graph->first;
  graph->serial = atomic_fetch_add(&recordings, 1) + 1;
  graph->device = device;
  qm_device_retain(device);
  qm__handle_opened();
  int32_t status = QM_OK;
  if (device->backend->graph_begin != NULL) status = device->backend->graph_begin(device->context);
  if (status == QM_OK) {
    graph->pool = qm__pool_open(&device->allocator);
    if (graph->pool == NULL) {
      status = qm__fail(QM_E_MEMORY, "the host is out of memory");
      if (device->backend->graph_end != NULL) device->backend->graph_end(device->context, NULL);
    }
  }
  if (status != QM_OK)
    destroy(graph);
  else
    device->recording = graph;
  atomic_fetch_add(&device->replays, 1);
  return status;
}

int32_t qm_graph_end(qm_device *device, qm_graph **out) {
  if (device == NULL) return qm__fail(QM_E_ARGUMENT, "qm_graph_end: NULL");
  qm_graph *graph = device->recording;
  if (graph == NULL)
    return qm__fail(QM_E_ARGUMENT, "argument 'device': no graph is being recorded on %s",
                    device->backend->name);
  device->recording = NULL;
  atomic_fetch_add(&device->replays, 1);
  qm__pool_stop(&device->allocator);
  const bool wanted = out != NULL && graph->status == QM_OK;
  int32_t status = QM_OK;
  if (device->backend->graph_end != NULL)
    status = device->backend->graph_end(device->context, wanted ? &graph->recorded : NULL);
  if (status == QM_OK && out != NULL && graph->status != QM_OK)
    status = qm__fail(graph->status, "the recording failed, and with it the graph");
  if (wanted && status == QM_OK)
    *out = graph;
  else
    destroy(graph);
  return status;
}

int32_t qm_graph_launch(qm_graph *graph) {
  if (graph == NULL) return qm__fail(QM_E_ARGUMENT, "qm_graph_launch: NULL");
  qm_device *device = graph->device;
  atomic_fetch_add(&device->replays, 1);
  int32_t status = qm__graph_refuse(device, "replaying a graph");
  if (status != QM_OK) return status;
  const qm__timing timing = qm__profile_begin(device, "graph");
  if (graph->recorded != NULL)
    status = device->backend->graph_launch(device->context, graph->recorded);
  for (const note *at = graph->first; at != NULL && status == QM_OK; at = at->next)
    status = qm__run(device, at->kernel, at->args);
  return qm__profile_end(device, &timing, graph->work, status);
}

void qm_graph_release(qm_graph *graph) {
  if (graph != NULL) destroy(graph);
}

int64_t qm_graph_count(const qm_graph *graph) { return graph == NULL ? 0 : graph->note_count; }

int64_t qm_graph_bytes(const qm_graph *graph) {
  return graph == NULL ? 0 : graph->pool->size_bytes;
}

void qm__graph_hold(qm_graph *graph, qm_storage *storage) {
  if (storage->recording == graph->serial || storage->pool == graph->pool) return;
  if (graph->held_count == graph->held_room) {
    const int64_t room = 2 * graph->held_room + 64;
    qm_storage **held = realloc(graph->held, (size_t)room * sizeof(qm_storage *));
    if (held == NULL) {
      graph->status = QM_E_MEMORY;
      return;
    }
    graph->held = held;
    graph->held_room = room;
  }
  storage->recording = graph->serial;
  qm_storage_retain(storage);
  graph->held[graph->held_count++] = storage;
}

int32_t qm__graph_note(qm_graph *graph, int32_t kernel, const void *args, int64_t args_bytes,
                       qm__work work) {
  graph->note_count++;
  graph->work.bytes += work.bytes;
  graph->work.flops += work.flops;
  if (graph->device->backend->graph_begin != NULL) return QM_OK;
  note *made = malloc(sizeof *made + (size_t)args_bytes);
  if (made == NULL) return graph->status = qm__fail(QM_E_MEMORY, "the host is out of memory");
  made->next = NULL;
  made->kernel = kernel;
  memcpy(made->args, args, (size_t)args_bytes);
  *graph->end = made;
  graph->end = &made->next;
  return QM_OK;
}

int32_t qm__graph_refuse(const qm_device *device, const char *what) {
  if (device->recording == NULL) return QM_OK;
  return qm__fail(QM_E_ARGUMENT,
                  "%s is recording a graph: %s cannot be part of it (a replay runs on the device "
                  "alone)",
                  device->backend->name, what);
}
