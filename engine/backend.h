/* backend.h - the contract between the engine and a device: one table of functions.
**
** The engine validates every call once (shapes, types, extents against storage, one device), so a
** kernel may trust its arguments: pointers are valid on its device and sizes are what they say.
** A backend with no kernel for a request leaves the entry NULL, or returns QM_E_UNSUPPORTED.
*/
#ifndef QM_BACKEND_H
#define QM_BACKEND_H

#include "quartermoon.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { QM_BACKEND_VERSION = 1 };

/* What the engine lends a backend. */
typedef struct qm_host {
  uint32_t version, struct_size;
  /* Record the failure (printf style) and return status, so that failing is one expression. */
  int32_t (*fail)(int32_t status, const char *format, ...);
} qm_host;

/* An operand as a kernel sees it: a pointer on the device, its type and its extents. */
typedef struct qm_array {
  void *data; /* NULL for an operand that was not given */
  int64_t shape[QM_DIMS_MAX];
  int64_t count; /* product of the extents */
  int32_t ndim;
  int32_t dtype;
} qm_array;

typedef struct qm_copy_args {
  qm_array x, out;
} qm_copy_args;
typedef struct qm_fill_args {
  qm_array out;
  double value;
} qm_fill_args;
typedef struct qm_random_args {
  qm_array out;
  int32_t kind;
  double a, b;
  qm_noise noise;
} qm_random_args;
typedef struct qm_unary_args {
  qm_array x, out;
  int32_t op;
  double p0, p1;
} qm_unary_args;
typedef struct qm_unary_backward_args {
  qm_array dout, x, dx;
  int32_t op;
  double p0, p1;
} qm_unary_backward_args;
/* Strides in elements over out's four dimensions (left-padded with 1); 0 where broadcast. */
typedef struct qm_binary_args {
  qm_array a, b, out;
  int64_t shape[QM_DIMS_MAX], stride_a[QM_DIMS_MAX], stride_b[QM_DIMS_MAX];
  int32_t op;
} qm_binary_args;
typedef struct qm_accumulate_args {
  qm_array x, out;
  double alpha, beta;
} qm_accumulate_args;
/* x is [outer, length, inner], out [outer, inner]. */
typedef struct qm_reduce_args {
  qm_array x, out;
  int64_t outer, length, inner;
  int32_t op;
} qm_reduce_args;
typedef struct qm_sum_squares_args {
  qm_array out;
  int64_t count;
  int32_t accumulate;
  qm_array x[]; /* [count] */
} qm_sum_squares_args;
/* stride_x: elements to step in x per dimension of out (left-padded to four). */
typedef struct qm_permute_args {
  qm_array x, out;
  int64_t shape[QM_DIMS_MAX], stride_x[QM_DIMS_MAX];
} qm_permute_args;
/* gather: x [v, c], out [r, c]; scatter_add, scatter: x [r, c], out [v, c]. */
typedef struct qm_gather_args {
  qm_array x, index, out;
  int64_t v, r, c;
} qm_gather_args;
typedef struct qm_softmax_args {
  qm_array x, out;
  int64_t rows, columns;
} qm_softmax_args;

/* out = alpha op(a) op(b) + bias + beta out, or what an epilogue makes of that: see qm_linear.
** bias and aux may be absent, and are where there is a batch. */
typedef struct qm_gemm_args {
  qm_array a, b, out;
  qm_array bias; /* float [n], added to every row */
  qm_array aux;  /* the epilogue's, out's type and shape */
  int64_t batch, m, k, n;
  int32_t trans_a, trans_b, epilogue;
  double alpha, beta;
} qm_gemm_args;
typedef struct qm_svd_args {
  qm_array a, u, s, vt;
  int64_t m, n, r;
} qm_svd_args;
typedef struct qm_qr_args {
  qm_array a, q;
  int64_t m, n;
} qm_qr_args;
typedef struct qm_cholesky_inverse_args {
  qm_array a, u;
  int64_t n;
  double damping;
} qm_cholesky_inverse_args;

typedef struct qm_rms_norm_args {
  qm_array x, residual, weight, sum, out, rstd;
  int64_t rows, columns;
  double eps;
} qm_rms_norm_args;
typedef struct qm_rms_norm_backward_args {
  qm_array dout, sum, weight, rstd, dsum, dx, dweight;
  int64_t rows, columns;
} qm_rms_norm_backward_args;
typedef struct qm_layer_norm_args {
  qm_array x, residual, weight, bias, sum, out, mean, rstd;
  int64_t rows, columns;
  double eps;
} qm_layer_norm_args;
typedef struct qm_layer_norm_backward_args {
  qm_array dout, sum, weight, mean, rstd, dsum, dx, dweight, dbias;
  int64_t rows, columns;
} qm_layer_norm_backward_args;
typedef struct qm_rope_args {
  qm_array x, cos, sin, positions, out;
  int64_t rows, heads, head_size, position_count;
  int32_t inverse;
} qm_rope_args;
typedef struct qm_rope_append_args {
  qm_array q, k, v, cos, sin, positions, places, out, keys, values;
  int64_t rows, heads, kv_heads, head_size, position_count, place_count;
} qm_rope_append_args;
typedef struct qm_swiglu_args {
  qm_array gate, up, out;
} qm_swiglu_args;
typedef struct qm_swiglu_backward_args {
  qm_array dout, gate, up, dgate, dup;
} qm_swiglu_backward_args;
/* stride_q, _k, _v: elements from one row of q (and dq), of k (and dk), of v (and dv) to the next,
** heads standing side by side within a row. H * D, HK * D and HK * D where each is a tensor of its
** own; (H + 2 HK) * D for all where they are slices of one fused projection [R, H + 2 HK, D]: take
** a row's place from these and never from shape. out, dout and lse always stand alone. */
typedef struct qm_attention_args {
  qm_array q, k, v, cu_q, cu_k, out, lse;
  int64_t sequences, heads, kv_heads, head_size, rows_q, rows_k;
  int64_t stride_q, stride_k, stride_v;
  qm_attention_options options;
} qm_attention_args;
typedef struct qm_attention_backward_args {
  qm_array dout, q, k, v, out, lse, cu_q, cu_k, dq, dk, dv;
  int64_t sequences, heads, kv_heads, head_size, rows_q, rows_k;
  int64_t stride_q, stride_k, stride_v;
  qm_attention_options options;
} qm_attention_backward_args;
typedef struct qm_cross_entropy_args {
  qm_array logits, targets, factor, loss, dlogits;
  int64_t rows, columns;
  int64_t classes; /* columns that targets may name; those behind hold minus infinity */
  double scale;    /* of dlogits, as is *factor where it is given */
  int32_t ignore_index;
} qm_cross_entropy_args;

/* live and scale of the optimizer steps: what adam points to; see kernels/adam.h. */
typedef struct qm_adamw_item {
  qm_array param, grad, exp_avg, exp_avg_sq, live, scale;
  qm_adam adam;
} qm_adamw_item;
typedef struct qm_adamw_args {
  int64_t count;
  qm_adamw_item step[]; /* [count] */
} qm_adamw_args;
typedef struct qm_adam_direction_args {
  qm_array grad, exp_avg, exp_avg_sq, update, live, scale;
  qm_adam adam;
} qm_adam_direction_args;

typedef struct qm_grad_scale_args {
  qm_array squares, norm, scale, skipped;
  double factor, max_norm;
} qm_grad_scale_args;

/* Packed rows of one width: where they begin and end, and the word row where their codes begin. */
typedef struct qm_mpq_rows {
  int64_t first_row, end_row, first_word;
  int32_t w_bit;
} qm_mpq_rows;
/* A quantized parameter as a kernel sees it. There is always a section; kernels that know one width
** alone find it in w_bit (0: there are several). */
typedef struct qm_mpq_view {
  qm_array data, scales, zeros, g_idx, q_perm, residual, group_map;
  int64_t k, n, groups;
  int32_t w_bit, residual_bits, group_size, asym, zero_offset, section_count;
  qm_mpq_rows sections[QM_MPQ_SECTIONS_MAX];
} qm_mpq_view;
typedef struct qm_mpq_unpack_args {
  qm_mpq_view q;
  qm_array codes;
} qm_mpq_unpack_args;
typedef struct qm_mpq_dequantize_args {
  qm_mpq_view q;
  qm_array w;
  int32_t form;
} qm_mpq_dequantize_args;
typedef struct qm_mpq_pack_args {
  qm_mpq_view q;
  qm_array w;
  int32_t stochastic;
  qm_noise noise;
} qm_mpq_pack_args;
typedef struct qm_mpq_fit_args {
  qm_mpq_view q;
  qm_array w;
  int32_t method;
  double range;
} qm_mpq_fit_args;
typedef struct qm_mpq_prepare_args {
  qm_array codes, zeros, scales, out;
  int64_t groups, blocks, block_size; /* G, D, dq */
  int32_t shift, mask;
} qm_mpq_prepare_args;
typedef struct qm_mpq_update_args {
  qm_mpq_view q;
  qm_array grad, exp_avg, exp_avg_sq, health, live, scale;
  qm_mpq_update_options options;
} qm_mpq_update_args;
typedef struct qm_mpq_update_bie_args {
  qm_mpq_view q;
  qm_array grad, exp_avg, exp_avg_sq, live, scale;
  qm_adam adam;
} qm_mpq_update_bie_args;

typedef struct qm_mpq_linear_args {
  qm_array x, out;
  qm_mpq_view q;
  int64_t rows;
  int32_t transposed;
} qm_mpq_linear_args;

typedef struct qm_mpq_linear_group_args {
  qm_array x;
  int64_t rows;
  int32_t count;
  qm_mpq_view q[QM_MPQ_GROUP_MAX];
  qm_array out[QM_MPQ_GROUP_MAX];
} qm_mpq_linear_group_args;

typedef struct qm_gptq_rows_args {
  qm_array w, u, scales, zeros, groups, errors;
  int64_t rows, columns, group_count;
  float levels;
} qm_gptq_rows_args;

/* Every kernel, in the order of the header. X(name) expands once per kernel; the arguments of
** kernel `name` are `qm_<name>_args`. Append, never reorder. */
#define QM_KERNEL_LIST(X)                                                                          \
  X(copy)                                                                                          \
  X(fill)                                                                                          \
  X(random)                                                                                        \
  X(unary)                                                                                         \
  X(binary)                                                                                        \
  X(accumulate)                                                                                    \
  X(reduce)                                                                                        \
  X(sum_squares)                                                                                   \
  X(permute)                                                                                       \
  X(gather)                                                                                        \
  X(scatter_add)                                                                                   \
  X(softmax)                                                                                       \
  X(gemm)                                                                                          \
  X(svd)                                                                                           \
  X(qr)                                                                                            \
  X(rms_norm)                                                                                      \
  X(rms_norm_backward)                                                                             \
  X(rope)                                                                                          \
  X(swiglu)                                                                                        \
  X(swiglu_backward)                                                                               \
  X(attention)                                                                                     \
  X(attention_backward)                                                                            \
  X(cross_entropy)                                                                                 \
  X(adamw)                                                                                         \
  X(adam_direction)                                                                                \
  X(mpq_unpack)                                                                                    \
  X(mpq_dequantize)                                                                                \
  X(mpq_pack)                                                                                      \
  X(mpq_fit)                                                                                       \
  X(mpq_prepare)                                                                                   \
  X(mpq_update)                                                                                    \
  X(mpq_update_bie)                                                                                \
  X(mpq_linear)                                                                                    \
  X(grad_scale)                                                                                    \
  X(layer_norm)                                                                                    \
  X(layer_norm_backward)                                                                           \
  X(unary_backward)                                                                                \
  X(scatter)                                                                                       \
  X(cholesky_inverse)                                                                              \
  X(gptq_rows)                                                                                     \
  X(rope_append)                                                                                   \
  X(mpq_linear_group)

typedef qm_gather_args qm_scatter_add_args;
typedef qm_gather_args qm_scatter_args;

typedef struct qm_kernels {
#define X(name) int32_t (*name)(void *context, const qm_##name##_args *args);
  QM_KERNEL_LIST(X)
#undef X
} qm_kernels;

typedef struct qm_backend {
  uint32_t version, struct_size; /* QM_BACKEND_VERSION, sizeof: a misfit is refused by name */
  const char *name;
  int32_t host_memory; /* 1: pointers are ordinary host pointers, files can be mapped */
  int32_t (*open)(int32_t index, void **context);
  void (*close)(void *context);
  void (*describe)(void *context, qm_device_info *out);
  int32_t (*allocate)(void *context, int64_t size_bytes, void **memory);
  void (*release)(void *context, void *memory, int64_t size_bytes);
  int32_t (*write)(void *context, void *out, const void *host, int64_t size_bytes);
  int32_t (*read)(void *context, const void *x, void *host, int64_t size_bytes);
  int32_t (*sync)(void *context);
  /* A read that does not wait. snapshot: device memory for a copy of x, so that later kernels may
  ** overwrite x; or NULL, and then they wait. read_ready: 1, 0, or a failure. read_end waits,
  ** copies to host (unless NULL) and releases the reading. NULL: the engine reads at once. */
  int32_t (*read_begin)(void *context, const void *x, void *snapshot, int64_t size_bytes,
                        void **reading);
  int32_t (*read_ready)(void *context, void *reading);
  int32_t (*read_end)(void *context, void *reading, void *host);
  /* Copy to a device of the same backend; `from` is the context that x belongs to. NULL: the engine
  ** copies by way of the host. */
  int32_t (*copy_between)(void *context, void *out, void *from, const void *x, int64_t size_bytes);
  /* Record kernels instead of running them, until graph_end; *graph is then what to launch, or, for
  ** graph NULL, nothing is kept. All NULL: the engine notes the calls and repeats them. */
  int32_t (*graph_begin)(void *context);
  int32_t (*graph_end)(void *context, void **graph);
  int32_t (*graph_launch)(void *context, void *graph);
  void (*graph_release)(void *context, void *graph);
  /* Where the queue stands before and behind one kernel; time_read waits for it, gives the seconds
  ** between and releases the mark. NULL: kernels are done when they return. */
  int32_t (*time_begin)(void *context, void **mark);
  int32_t (*time_end)(void *context, void *mark);
  int32_t (*time_read)(void *context, void *mark, double *seconds);
  /* Name what happens between the two, for tools that look on. Or NULL. */
  void (*range_begin)(void *context, const char *name);
  void (*range_end)(void *context);
  /* Bytes that kernels hold as workspace, beside what was allocated. NULL: none. */
  int64_t (*workspace_bytes)(void *context);
  qm_kernels kernels;
} qm_backend;

/* The one symbol a backend library exports. */
typedef const qm_backend *(*qm_backend_entry_function)(const qm_host *host);
const qm_backend *qm_reference_backend(const qm_host *host);
const qm_backend *qm_cpu_backend(const qm_host *host);

#ifdef __cplusplus
}
#endif
#endif
