/* internal.h - what the engine's own files share. Kernels see backend.h, users quartermoon.h. */
#ifndef QM_INTERNAL_H
#define QM_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "backend.h"

#define QM__PRINTF(at, first) __attribute__((format(printf, at, first)))

/* ---- error.c ---- */

extern const qm_host qm__host;
/* Record the sentence for qm_last_error and return status: failing is one expression. */
int32_t qm__fail(int32_t status, const char *format, ...) QM__PRINTF(2, 3);
/* Put "prefix: " before the last error's sentence. */
void qm__prefix_error(const char *prefix);
void qm__handle_opened(void);
void qm__handle_closed(void);

/* ---- allocator.c: blocks of one device, kept for reuse by size class ---- */

typedef struct qm__block {
  struct qm__block *next;
  void *memory;
  int64_t size_bytes;
} qm__block;

enum { QM__SIZE_CLASSES = 16 * 48 };

/* A recorded graph's own blocks. Replays use them whatever becomes of the storages that had them,
** so nobody else gets one before the graph is released. Closed, it hands them to the allocator. */
typedef struct qm__pool {
  qm__block *free_lists[QM__SIZE_CLASSES];
  int64_t size_bytes;
  int64_t live_count; /* storages that still hold a block */
  bool closed;
} qm__pool;

typedef struct qm__allocator {
  const qm_backend *backend;
  void *context;
  pthread_mutex_t lock;
  qm__block *free_lists[QM__SIZE_CLASSES];
  qm_memory memory;
  qm__pool *pool; /* where requests are served from while a graph is recorded, else NULL */
} qm__allocator;

void qm__allocator_open(qm__allocator *allocator, const qm_backend *backend, void *context);
void qm__allocator_close(qm__allocator *allocator);
/* *block_bytes and *pool are what to hand back on release. */
int32_t qm__allocate(qm__allocator *allocator, int64_t size_bytes, void **memory,
                     int64_t *block_bytes, qm__pool **pool);
void qm__release(qm__allocator *allocator, void *memory, int64_t block_bytes, qm__pool *pool);
void qm__allocator_empty_cache(qm__allocator *allocator);
int64_t qm__workspace_bytes(const qm__allocator *allocator);
/* From now on requests are served for a graph, by blocks of its own. NULL: the host's memory is
** out. */
qm__pool *qm__pool_open(qm__allocator *allocator);
/* Serve everybody again; the blocks stay the graph's. */
void qm__pool_stop(qm__allocator *allocator);
void qm__pool_close(qm__allocator *allocator, qm__pool *pool);

/* ---- device.c, storage.c ---- */

struct qm_device {
  atomic_int references;
  const qm_backend *backend;
  void *context;
  int32_t index;
  qm__allocator allocator;
  qm_graph *recording;    /* the graph that is being recorded, or NULL */
  atomic_llong replays;   /* of graphs, their beginnings and ends: they write unseen */
  struct qm_device *next; /* in the list of open devices */
};

struct qm_storage {
  atomic_int references;
  qm_device *device; /* retained */
  char *memory;
  int64_t size_bytes;
  atomic_llong writes; /* calls that write here */
  int64_t block_bytes; /* what the allocator wants back; 0: a mapped file */
  qm__pool *pool;      /* the same: NULL, or whose block it is */
  int64_t recording;   /* serial number of the last recording that held it */
  bool read_only;
};

/* ---- operand.c: checking the arguments of one call ---- */

enum { QM__OPERANDS_MAX = 40, QM__SIZES_MAX = 48, QM__NAME_MAX = 16 };

/* How a call uses an operand. WRITE must not overlap any other operand; IN_PLACE may be exactly one
** that is read, for kernels that read an element before they write it. */
typedef enum qm__use { QM__READ, QM__WRITE, QM__IN_PLACE } qm__use;

/* An operand's bytes. */
typedef struct qm__extent {
  const char *name;
  const char *begin, *end;
  qm__use use;
} qm__extent;

/* The state of one call's checks. The first failure wins and turns the rest into nothing, so a
** call reads as a list of operands followed by one dispatch. */
typedef struct qm__call {
  const char *function;
  qm_device *device; /* the first operand's */
  int32_t status;
  int32_t size_count;
  int64_t operand_count;
  qm__extent few[QM__OPERANDS_MAX];
  qm__extent *many;   /* instead of few, where there is a list */
  int64_t many_max;   /* room there */
  int64_t list_bytes; /* of the list at the end of the kernel's arguments */
  int64_t item;       /* from 1: what is checked is of this item of a list of several; or 0 */
  struct {
    char name[QM__NAME_MAX];
    int64_t value;
  } sizes[QM__SIZES_MAX];
} qm__call;

/* Of the operands checked so far. */
static inline qm__extent *qm__extents(qm__call *call) {
  return call->many == NULL ? call->few : call->many;
}

qm__call qm__begin(const char *function);
/* Check x against spec and describe it to the kernel in *out. spec is a type, then a shape:
**   "f32 [K, N]", "float [R, H, D]", "f32|bf16 [C]", "any [...]", "i32 []"
** where a new name binds a size that later operands must share, a number means itself and [...]
** any shape. "=x" as the type means the type of the operand called x ("=x [R, C]"). */
void qm__operand(qm__call *call, const char *name, const qm_tensor *x, const char *spec,
                 qm__use use, qm_array *out);
/* The same, but NULL is allowed and gives an out->data of NULL. */
void qm__optional(qm__call *call, const char *name, const qm_tensor *x, const char *spec,
                  qm__use use, qm_array *out);
/* Arguments of a kernel that takes a list, which is their last field: args_bytes without it. They
** are zeroed, to be given to free() after the dispatch; NULL: the call has failed. An item brings
** up to `operands` operands. */
void *qm__list_args(qm__call *call, size_t args_bytes, const void *list, int64_t count,
                    size_t item_bytes, int32_t operands);
/* What is checked next belongs to item `item` (from 0) of a list of `count`, or, for item = count,
** to none: sentences say which, and the sizes that an item binds are its own. */
void qm__list_item(qm__call *call, int64_t item, int64_t count);
/* Bind a name before operands are checked, or read what they bound. */
void qm__bind(qm__call *call, const char *name, int64_t value);
int64_t qm__size(const qm__call *call, const char *name);
/* Fail unless the condition holds: "argument 'scales': expected G to divide K, got ...". */
void qm__require(qm__call *call, bool condition, const char *format, ...) QM__PRINTF(3, 4);
/* Fail unless both have the same extents; `name` is the second one. For specs of [...]. */
void qm__same_shape(qm__call *call, const char *name, const qm_array *a, const qm_array *b);
/* "f32 [8, 64]" */
void qm__describe(const qm_tensor *x, char *text, size_t size);
int64_t qm__count(const qm_tensor *x);
/* The last checks: nothing overlaps that must not. Returns the call's status. */
int32_t qm__finish(qm__call *call);

/* ---- checks that several calls share ---- */

/* optim.c: a step's numbers, checked, and the tensors they may come from. */
qm_adam qm__adam(qm__call *call, const qm_adam *adam, qm_array *live, qm_array *scale);
/* Both moments or neither; without them grad is the direction already. */
void qm__moments(qm__call *call, const qm_tensor *exp_avg, const qm_tensor *exp_avg_sq,
                 const char *spec_exp_avg, const char *spec_exp_avg_sq, qm_array *m, qm_array *v);
/* mpq.c: every field of q, described in *view; binds K, N and G. codes_use says what the call does
** with data and residual, grid_use what it does with scales and zeros. */
void qm__mpq(qm__call *call, const qm_mpq *q, qm__use codes_use, qm__use grid_use,
             qm_mpq_view *view);

/* ---- file.c ---- */

/* Sync the folder that path lies in: a rename is safe on disk only when its folder is. */
int32_t qm__sync_parent(const char *path);

/* ---- work.c ---- */

/* What a kernel call must at least move and compute. */
typedef struct qm__work {
  double bytes, flops;
} qm__work;
qm__work qm__work_of(qm__call *call, int32_t kernel, const void *args);

/* ---- graph.c ---- */

/* Keep a storage for the graph that its device is recording. */
void qm__graph_hold(qm_graph *graph, qm_storage *storage);
/* Note one kernel call, its arguments too on a backend that does not record by itself. */
int32_t qm__graph_note(qm_graph *graph, int32_t kernel, const void *args, int64_t args_bytes,
                       qm__work work);
/* QM_OK, or the sentence that this (done to a device) cannot be part of a graph. */
int32_t qm__graph_refuse(const qm_device *device, const char *what);

/* ---- profile.c ---- */

typedef struct qm__timing {
  const char *kernel;
  double started; /* 0 while no profile runs */
  void *mark;     /* a device's own, or NULL */
} qm__timing;
/* Around one kernel call: name it, and time it while a profile runs. end returns status. */
qm__timing qm__profile_begin(const qm_device *device, const char *kernel);
int32_t qm__profile_end(qm_device *device, const qm__timing *timing, qm__work work, int32_t status);

/* ---- dispatch.c ---- */

/* Which entry of the table of kernels. */
enum {
#define X(name) QM__KERNEL_##name,
  QM_KERNEL_LIST(X)
#undef X
      QM__KERNEL_COUNT
};
/* Call a kernel of the device; QM_E_UNSUPPORTED when it has none. */
int32_t qm__run(const qm_device *device, int32_t kernel, const void *args);
/* The last checks of a call, then its kernel: run now, or noted in a recording. */
int32_t qm__dispatch(qm__call *call, int32_t kernel, const void *args);
/* Run one kernel of the call's device, or say why not. Nothing inside sizeof is evaluated: it lets
** the compiler check that args are the kernel's. */
#define QM__DISPATCH(call, kernel, args)                                                           \
  ((void)sizeof((call).device->backend->kernels.kernel(NULL, (args))),                             \
   qm__dispatch(&(call), QM__KERNEL_##kernel, (args)))

/* ---- safetensors.c, safetensors_writer.c ---- */

/* An element type as a file's header names it; dtype -1 where no tensor of ours can hold it. */
typedef struct qm__file_type {
  const char *name;
  int32_t dtype;
  int32_t size_bytes;
} qm__file_type;
const qm__file_type *qm__file_type_named(const char *name);
const qm__file_type *qm__file_type_of(int32_t dtype);
/* Check the bytes of a whole file and list its tensors; *out does not own the bytes. */
int32_t qm__safetensors_parse(const char *bytes, int64_t size_bytes, qm_safetensors **out);

#endif
