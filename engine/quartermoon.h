/* quartermoon.h - the whole public C ABI of Quartermoon.
**
** The text between the two cdef markers is also what LuaJIT's ffi.cdef reads, so it holds plain
** declarations and comments only: no preprocessor, no inline functions.
**
** Conventions
**   - Every call that can fail returns a status; 0 is success and qm_last_error() is the sentence.
**   - Tensors are row-major and contiguous. A qm_tensor describes and never owns.
**   - Operands of one call live on one device; outputs are caller-allocated and overwritten
**     unless the comment says they accumulate.
**   - "float" below means any of f32, f16, bf16. Shapes are in brackets; names bind sizes.
**   - NULL is accepted only where the comment says "or NULL".
*/
#ifndef QUARTERMOON_H
#define QUARTERMOON_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)
/* clang-format off */
/* cdef: begin */
enum { QM_ABI_VERSION = 1, QM_DIMS_MAX = 4 };

/* Every call that can fail returns one of these; 0 is success. */
enum {
  QM_OK = 0,
  QM_E_ARGUMENT = -1,   /* the caller passed something the call cannot take */
  QM_E_MEMORY = -2,     /* host or device memory ran out, or the limit was met */
  QM_E_DEVICE = -3,     /* the device or its driver failed */
  QM_E_UNSUPPORTED = -4, /* this backend has no kernel for the request */
  QM_E_IO = -5          /* a file could not be read or written, or holds what it must not */
};

/* Element types. */
enum {
  QM_F32 = 0,
  QM_F16 = 1,
  QM_BF16 = 2,
  QM_I8 = 3,
  QM_U8 = 4,
  QM_I16 = 5,
  QM_I32 = 6,
  QM_I64 = 7,
  QM_DTYPE_COUNT = 8
};

typedef struct qm_device qm_device;   /* handle: a device and its allocator, reference counted */
typedef struct qm_storage qm_storage; /* handle: device memory, reference counted */

/* Descriptor: says where a tensor lies, owns nothing. */
typedef struct qm_tensor {
  qm_storage *storage; /* borrowed: keep it while you use the descriptor */
  int64_t offset_bytes; /* from the start of storage */
  int64_t shape[4];     /* elements, row-major; entries from ndim on are ignored */
  int32_t ndim;         /* 0 (a scalar) to QM_DIMS_MAX */
  int32_t dtype;
} qm_tensor;

/* Which random bits: Philox4x32-10, key (seed, parameter), counter (element / 4, step, stream).
** The same four give the same bits on every device, whatever the launch shape. */
typedef struct qm_noise {
  uint32_t seed;
  uint32_t parameter; /* whose bits: one number per parameter or consumer */
  uint32_t step;
  uint32_t stream; /* which use within the step; the engine's own uses are QM_STREAM_* */
} qm_noise;
/* One word of an element rounds all that its step stores in few bits: of CODES in the quantized
** step, of EXP_AVG in the dense one. A code takes its high 24 bits, a bf16 weight the high half,
** bf16 exp_avg the low half, bf16 exp_avg_sq the sum of both halves. WEIGHT is a refitted grid's.
** EXP_AVG_SQ is not drawn from. */
enum { QM_STREAM_CODES = 0, QM_STREAM_EXP_AVG = 1, QM_STREAM_EXP_AVG_SQ = 2, QM_STREAM_WEIGHT = 3,
       QM_STREAM_USER = 16 };

/* ---- versions and errors ---- */

int32_t qm_abi_version(void);
/* The sentence for this thread's last failure; good until its next one. */
const char *qm_last_error(void);
const char *qm_status_name(int32_t status);
/* Name ("f32") and size of an element type; NULL and 0 when there is no such type. */
const char *qm_dtype_name(int32_t dtype);
int32_t qm_dtype_size(int32_t dtype);
/* Devices, storages and files that are open in this process: a leak counter for tests. */
int64_t qm_handles_live(void);

/* ---- devices ---- */

typedef struct qm_memory {
  int64_t live_bytes;   /* in storages that somebody holds */
  int64_t cached_bytes; /* released, kept for reuse */
  int64_t peak_bytes;   /* highest live_bytes since the last reset */
  int64_t limit_bytes;  /* 0: no limit; bounds live, cached and workspace bytes together */
  int64_t workspace_bytes; /* what kernels hold between calls */
  int64_t live_count;
  int64_t allocation_count; /* requests served since the device was opened */
} qm_memory;

typedef struct qm_device_info {
  char name[64];        /* "cpu", "reference", "cuda" */
  char description[192]; /* the hardware, in words */
  int32_t index;
  int32_t threads;       /* worker threads of host devices, 0 elsewhere */
  int32_t fast_bf16;     /* 1 where bf16 matrix products outrun f32 ones */
  int32_t fused_rows;    /* up to so many, qm_mpq_linear's x W outruns a dense weight's */
  int64_t total_bytes;   /* of the device's own memory; 0 where it uses the host's */
  int64_t free_bytes;    /* what of it nobody uses */
} qm_device_info;

/* Open (or retain, when already open) device `index` of backend `name`. */
int32_t qm_device_open(const char *name, int32_t index, qm_device **out);
void qm_device_retain(qm_device *device);
void qm_device_release(qm_device *device);
int32_t qm_device_get_info(const qm_device *device, qm_device_info *out);
/* Wait until everything queued has run; reports what failed late. */
int32_t qm_device_sync(qm_device *device);
int32_t qm_device_memory(const qm_device *device, qm_memory *out);
int32_t qm_device_set_limit(qm_device *device, int64_t limit_bytes);
int32_t qm_device_reset_peak(qm_device *device);
int32_t qm_device_empty_cache(qm_device *device);

/* ---- graphs: what a device is asked to do, recorded once and replayed ---- */

typedef struct qm_graph qm_graph; /* handle: a recording, and the memory it uses */

/* Record from now on: kernels called on this device are noted and not run. Reading from it, writing
** to it from the host and waiting for it are refused. Memory that storages get meanwhile belongs
** to the graph, and storages that the kernels use stay with it. One recording at a time. */
int32_t qm_graph_begin(qm_device *device);
/* End the recording; out NULL drops it. */
int32_t qm_graph_end(qm_device *device, qm_graph **out);
/* Do again what was recorded, in order with whatever else the device is asked to do. */
int32_t qm_graph_launch(qm_graph *graph);
void qm_graph_release(qm_graph *graph);
/* Kernel calls in the graph, and bytes of memory that it has for itself. */
int64_t qm_graph_count(const qm_graph *graph);
int64_t qm_graph_bytes(const qm_graph *graph);

/* ---- profile: time per kernel, of this process ---- */

typedef struct qm_profile_entry {
  char kernel[32];
  int64_t calls;
  double seconds;
  double bytes, flops; /* the least that the calls must move and compute; flops 0: not counted */
} qm_profile_entry;

/* Seconds since some fixed moment; never jumps back. */
double qm_clock(void);
/* Forget what was booked and book from now on (1), or stop booking (0). */
int32_t qm_profile_enable(int32_t on);
int32_t qm_profile_get(int32_t index, qm_profile_entry *out); /* QM_E_ARGUMENT past the end */

/* ---- storage ---- */

int32_t qm_storage_create(qm_device *device, int64_t size_bytes, qm_storage **out);
/* Map a file's bytes read-only into a host device; the result refuses to be written. */
int32_t qm_storage_map(qm_device *device, const char *path, qm_storage **out);
void qm_storage_retain(qm_storage *storage);
void qm_storage_release(qm_storage *storage);
int64_t qm_storage_size(const qm_storage *storage);
int32_t qm_storage_references(const qm_storage *storage);
/* Another number than before if a call, or a replayed graph, may have written here since. */
int64_t qm_storage_version(const qm_storage *storage);

/* ---- moving and filling ---- */

/* Host bytes into a tensor and back; size_bytes must be the tensor's. Reading waits. */
int32_t qm_write(const qm_tensor *out, const void *host, int64_t size_bytes);
int32_t qm_read(const qm_tensor *x, void *host, int64_t size_bytes);
/* The same without waiting: begin takes x as the calls before leave it, and the device goes on with
** the calls after. */
typedef struct qm_reading qm_reading; /* handle: a read under way */
int32_t qm_read_begin(const qm_tensor *x, qm_reading **out);
int32_t qm_reading_ready(const qm_reading *reading); /* 1: end would not wait; 0; or a failure */
/* Wait for the bytes and release the reading. */
int32_t qm_reading_end(qm_reading *reading, void *host, int64_t size_bytes);
void qm_reading_release(qm_reading *reading);
/* Same shape; converts between types (float to integer truncates and saturates, NaN to 0).
** Across devices the types must agree. */
int32_t qm_copy(const qm_tensor *x, const qm_tensor *out);
int32_t qm_fill(const qm_tensor *out, double value);
/* kind QM_UNIFORM: [a, b); QM_NORMAL: mean a, standard deviation b (Box-Muller). Float. */
enum { QM_UNIFORM = 0, QM_NORMAL = 1 };
int32_t qm_random(const qm_tensor *out, int32_t kind, double a, double b, const qm_noise *noise);

/* ---- elementwise, reductions, movement ---- */

/* out = op(x), same shape, one float type. p0, p1 are the operation's own numbers:
** POW exponent p0; CLAMP to [p0, p1]; AFFINE p0 * x + p1; GELU and its derivative GELU_GRAD p0 = 0
** for the exact form, 1 for the tanh approximation; the rest ignore them. ROUND: half to even. NaN
** stays NaN. */
enum { QM_NEG = 0, QM_ABS = 1, QM_EXP = 2, QM_LOG = 3, QM_SQRT = 4, QM_RSQRT = 5, QM_TANH = 6,
       QM_SIGMOID = 7, QM_SILU = 8, QM_GELU = 9, QM_RELU = 10, QM_SQUARE = 11, QM_POW = 12,
       QM_CLAMP = 13, QM_AFFINE = 14, QM_SIGN = 15, QM_FLOOR = 16, QM_ROUND = 17, QM_SIN = 18,
       QM_COS = 19, QM_RECIPROCAL = 20, QM_GELU_GRAD = 21, QM_SILU_GRAD = 22, QM_UNARY_COUNT = 23 };
int32_t qm_unary(int32_t op, const qm_tensor *x, const qm_tensor *out, double p0, double p1);
/* dx = dout op'(x), the derivative that of the operation at x: 0 for SIGN, FLOOR, ROUND and where
** ABS and RELU are not smooth; GELU_GRAD and SILU_GRAD are refused. One float type and shape; dx
** may be dout or x. */
int32_t qm_unary_backward(int32_t op, const qm_tensor *dout, const qm_tensor *x,
                          const qm_tensor *dx, double p0, double p1);
/* out = a op b, float, numpy broadcasting to out's shape; the comparisons give 1 or 0.
** Types may differ: computed in f32. MAXIMUM and MINIMUM are NaN where a or b is. */
enum { QM_ADD = 0, QM_SUB = 1, QM_MUL = 2, QM_DIV = 3, QM_MAXIMUM = 4, QM_MINIMUM = 5, QM_EQ = 6,
       QM_LT = 7, QM_LE = 8, QM_BINARY_COUNT = 9 };
int32_t qm_binary(int32_t op, const qm_tensor *a, const qm_tensor *b, const qm_tensor *out);
/* out = alpha x + beta out; same shape, float, types may differ. */
int32_t qm_accumulate(const qm_tensor *x, const qm_tensor *out, double alpha, double beta);
/* Reduce dimension dim (from 0) of x in a fixed order; in out it has size 1, or is left out. Sums
** run in f64 in the reference. x float, out float; ARGMAX: out i32, from 0, the first of equals.
** MAX and MIN of a NaN are NaN, and ARGMAX finds the first. */
enum { QM_SUM = 0, QM_MEAN = 1, QM_MAX = 2, QM_MIN = 3, QM_ARGMAX = 4, QM_REDUCE_COUNT = 5 };
int32_t qm_reduce(int32_t op, const qm_tensor *x, const qm_tensor *out, int32_t dim);
/* out = (accumulate != 0: +=) the sum of squares of all `count` tensors, float of any types; out
** f32 []. One fixed order: the tensors' types, shapes and order give the same bits wherever they
** lie. The sum of tensors with a NaN or an infinity is not finite. */
int32_t qm_sum_squares(const qm_tensor *const *x, int64_t count, const qm_tensor *out,
                       int32_t accumulate);
/* out[..] = x transposed by dims: out's dimension i is x's dims[i]. Any type. */
int32_t qm_permute(const qm_tensor *x, const qm_tensor *out, const int32_t *dims);
/* out[i, :] = x[index[i], :]; x any type [V, C] (or [V]), index i32 [R], out [R, C] of
** x's type, or of any float type when x is float.
** An index outside [0, V) is QM_E_ARGUMENT. */
int32_t qm_gather(const qm_tensor *x, const qm_tensor *index, const qm_tensor *out);
/* out[index[i], :] += x[i, :], in the order of i; out f32 [V, C], x float [R, C]. */
int32_t qm_scatter_add(const qm_tensor *x, const qm_tensor *index, const qm_tensor *out);
/* out[index[i], :] = x[i, :], all numbers in index different (else which row stays is open); x any
** type [R, C] (or [R]), out [V, C] of x's type. Rows of out that index does not name stay. */
int32_t qm_scatter(const qm_tensor *x, const qm_tensor *index, const qm_tensor *out);
/* out = softmax of x along the last dimension; float, same shape. */
int32_t qm_softmax(const qm_tensor *x, const qm_tensor *out);

/* ---- linear algebra ---- */

/* out = alpha op(a) op(b) + beta out, op transposing where its flag is set. [M, K] x [K, N], or
** with one leading batch dimension each. a and b of one float type; out float. f32 accumulation. */
int32_t qm_gemm(const qm_tensor *a, const qm_tensor *b, const qm_tensor *out, int32_t trans_a,
                int32_t trans_b, double alpha, double beta);
/* out = x weight + bias. x [M, K], weight [K, N] of one float type, or [N, K] if `transposed`;
** out float [M, N]; bias float [N], or NULL. f32 accumulation. What an epilogue makes of that, in
** GELU's tanh form:
**   QM_EPILOGUE_GELU       aux = x weight + bias, out = gelu of it: of aux, or before it is rounded
**   QM_EPILOGUE_GELU_GRAD  out = (x weight + bias) gelu'(aux), within one rounding
** aux [M, N] of out's type, written by the first and read by the second; NULL without. */
enum { QM_EPILOGUE_NONE = 0, QM_EPILOGUE_GELU = 1, QM_EPILOGUE_GELU_GRAD = 2,
       QM_EPILOGUE_COUNT = 3 };
int32_t qm_linear(const qm_tensor *x, const qm_tensor *weight, const qm_tensor *bias,
                  const qm_tensor *out, int32_t transposed, int32_t epilogue,
                  const qm_tensor *aux);
/* Thin singular value decomposition a = u diag(s) vt, s descending; f32.
** a [M, N], u [M, R], s [R], vt [R, N], R = min(M, N). Signs are arbitrary. */
int32_t qm_svd(const qm_tensor *a, const qm_tensor *u, const qm_tensor *s, const qm_tensor *vt);
/* Orthonormal basis of the columns: q of the thin QR. f32, a [M, N] with M >= N, q [M, N]. */
int32_t qm_qr(const qm_tensor *a, const qm_tensor *q);
/* Upper triangular u with inverse(a + damping mean(diagonal(a)) I) = u^T u; f32 [N, N], below the
** diagonal zeros. a symmetric. QM_E_ARGUMENT where the damped a is not positive definite. */
int32_t qm_cholesky_inverse(const qm_tensor *a, const qm_tensor *u, double damping);

/* ---- transformer layers: activations float of one type, statistics f32 ---- */

/* sum = x + residual (residual and sum both NULL: sum is x itself);
** rstd = 1 / sqrt(mean(sum^2) + eps); out = sum * rstd * weight.
** x, residual, sum, out [R, C]; weight float [C]; rstd f32 [R]. arXiv 1910.07467. */
int32_t qm_rms_norm(const qm_tensor *x, const qm_tensor *residual, const qm_tensor *weight,
                    const qm_tensor *sum, const qm_tensor *out, const qm_tensor *rstd, double eps);
/* dx = the gradient of `sum` through out, plus dsum (or NULL) that reached it directly;
** dweight f32 [C] or NULL, accumulates. `sum` is the normalised tensor (x, or x + residual). */
int32_t qm_rms_norm_backward(const qm_tensor *dout, const qm_tensor *sum, const qm_tensor *weight,
                             const qm_tensor *rstd, const qm_tensor *dsum, const qm_tensor *dx,
                             const qm_tensor *dweight);
/* sum as above; mean and rstd = 1 / sqrt(variance + eps) of sum's rows;
** out = (sum - mean) rstd weight + bias. bias of weight's type [C], or NULL; mean, rstd f32 [R];
** the rest as above. arXiv 1607.06450. */
int32_t qm_layer_norm(const qm_tensor *x, const qm_tensor *residual, const qm_tensor *weight,
                      const qm_tensor *bias, const qm_tensor *sum, const qm_tensor *out,
                      const qm_tensor *mean, const qm_tensor *rstd, double eps);
/* As qm_rms_norm_backward; dweight and dbias f32 [C], each or NULL, accumulate. */
int32_t qm_layer_norm_backward(const qm_tensor *dout, const qm_tensor *sum,
                               const qm_tensor *weight, const qm_tensor *mean,
                               const qm_tensor *rstd, const qm_tensor *dsum, const qm_tensor *dx,
                               const qm_tensor *dweight, const qm_tensor *dbias);
/* Rotate halves: for i < D/2, (x_i, x_{i+D/2}) turns by the angle whose cos and sin stand at
** [positions[r], i]; inverse != 0 turns back (the gradient). x, out [R, H, D], may be one tensor;
** cos, sin f32 [P, D/2]; positions i32 [R], each in [0, P). arXiv 2104.09864, Llama layout. */
int32_t qm_rope(const qm_tensor *x, const qm_tensor *cos, const qm_tensor *sin,
                const qm_tensor *positions, const qm_tensor *out, int32_t inverse);
/* A step of generation, in one pass: out = q turned as by qm_rope, keys[places[r]] = k[r] turned,
** values[places[r]] = v[r]. q, out [R, H, D], may be one tensor; k, v [R, HK, D]; keys, values
** [V, HK, D]; cos, sin, positions as above; places i32 [R], each in [0, V), none twice. */
int32_t qm_rope_append(const qm_tensor *q, const qm_tensor *k, const qm_tensor *v,
                       const qm_tensor *cos, const qm_tensor *sin, const qm_tensor *positions,
                       const qm_tensor *places, const qm_tensor *out, const qm_tensor *keys,
                       const qm_tensor *values);
/* out = silu(gate) * up; same shapes. arXiv 2002.05202. */
int32_t qm_swiglu(const qm_tensor *gate, const qm_tensor *up, const qm_tensor *out);
int32_t qm_swiglu_backward(const qm_tensor *dout, const qm_tensor *gate, const qm_tensor *up,
                           const qm_tensor *dgate, const qm_tensor *dup);

/* Softmax attention over packed sequences, without a T x T matrix (arXiv 2205.14135, 2307.08691).
** q, out [RQ, H, D]; k, v [RK, HK, D], HK divides H and query head h reads key head h * HK / H;
** cu_q, cu_k i32 [S + 1]: sequence s holds query rows cu_q[s] .. cu_q[s+1]-1 and key rows
** cu_k[s] .. cu_k[s+1]-1; ascending from 0 to RQ and RK.
** causal: the last query of a sequence sees its last key. window > 0: at most so many keys back,
** itself included. lse f32 [RQ, H]: log of the softmax sum, for the backward pass. */
typedef struct qm_attention_options {
  double scale; /* of the scores, usually 1 / sqrt(D) */
  int32_t causal;
  int32_t window;
} qm_attention_options;
int32_t qm_attention(const qm_tensor *q, const qm_tensor *k, const qm_tensor *v,
                     const qm_tensor *cu_q, const qm_tensor *cu_k, const qm_tensor *out,
                     const qm_tensor *lse, const qm_attention_options *options);
int32_t qm_attention_backward(const qm_tensor *dout, const qm_tensor *q, const qm_tensor *k,
                              const qm_tensor *v, const qm_tensor *out, const qm_tensor *lse,
                              const qm_tensor *cu_q, const qm_tensor *cu_k, const qm_tensor *dq,
                              const qm_tensor *dk, const qm_tensor *dv,
                              const qm_attention_options *options);
/* Both of a fused projection: qkv and dqkv [R, H + 2 HK, D], in every row the heads of q, of k and
** of v; out, dout [R, H, D]; cu i32 [S + 1] serves queries and keys. */
int32_t qm_attention_packed(const qm_tensor *qkv, const qm_tensor *cu, const qm_tensor *out,
                            const qm_tensor *lse, const qm_attention_options *options);
int32_t qm_attention_packed_backward(const qm_tensor *dout, const qm_tensor *qkv,
                                     const qm_tensor *out, const qm_tensor *lse,
                                     const qm_tensor *cu, const qm_tensor *dqkv,
                                     const qm_attention_options *options);
/* loss[r] = -log softmax(logits[r])[targets[r]]; dlogits = scale * factor * (softmax - onehot), or
** NULL, may be logits itself. Rows whose target is ignore_index give 0 and no gradient. Columns
** from `classes` on (at most V) only make rows longer: they hold minus infinity.
** logits, dlogits float [R, V]; targets i32 [R]; factor f32 [], or NULL for 1; loss f32 [R]. */
int32_t qm_cross_entropy(const qm_tensor *logits, const qm_tensor *targets, const qm_tensor *factor,
                         const qm_tensor *loss, const qm_tensor *dlogits, double scale,
                         int32_t ignore_index, int64_t classes);

/* ---- optimizer steps ---- */

/* One Adam step's numbers. `step` counts from 1: it is the step being taken.
**   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g,  g = grad_scale * grad
**   a = lr * (correct_bias ? sqrt(1 - beta2^step) / (1 - beta1^step) : 1)
**   u = m / (sqrt(v) + eps);  w = w - a u - lr weight_decay w
** bf16 moments are rounded stochastically from `noise`. */
typedef struct qm_adam {
  double lr, lr_next; /* lr_next: the following step's, for momentum feedback */
  double beta1, beta2, eps, weight_decay, grad_scale;
  int64_t step;
  int32_t correct_bias;
  qm_noise noise; /* its step and stream are set by the kernel's caller and the kernel */
  /* Read when the kernel runs, so that a recorded call can be played again with other numbers. */
  const qm_tensor *live;  /* i32 [16], a row that qm_adam_write wrote: then the fields above do not
                             count; or NULL */
  const qm_tensor *scale; /* f32 []: multiplies grad_scale (a direction u it leaves alone); NaN or
                             infinite: the step changes nothing, its direction is 0; or NULL */
} qm_adam;
/* Work out the numbers of `count` steps, in one write to the device; their live and scale do not
** count. live i32 [count, 16], each row one step's `live`. */
int32_t qm_adam_write(const qm_adam *adams, int64_t count, const qm_tensor *live);
/* Dense parameter: param f32 or bf16 (then rounded stochastically), grad float, moments f32 or
** bf16; all of one shape. exp_avg is m, exp_avg_sq is v; both NULL: grad is u already.
** arXiv 1711.05101. */
typedef struct qm_adamw_step {
  const qm_tensor *param, *grad, *exp_avg, *exp_avg_sq;
  qm_adam adam;
} qm_adamw_step;
/* The steps of `count` parameters. */
int32_t qm_adamw(const qm_adamw_step *steps, int64_t count);
/* The direction alone, for projected gradients: moments as above, update = u; f32. */
int32_t qm_adam_direction(const qm_tensor *grad, const qm_tensor *exp_avg,
                          const qm_tensor *exp_avg_sq, const qm_tensor *update,
                          const qm_adam *adam);

/* From the sum of the squares of all gradients (f32 []): their norm times factor (f32 []), and the
** `scale` (f32 []) of a step that takes factor * gradient, clipped to a norm of at most max_norm
** (HUGE_VAL: not clipped): NaN where the norm is not finite, and then skipped (i64 []) goes up. */
int32_t qm_grad_scale(const qm_tensor *squares, const qm_tensor *norm, const qm_tensor *scale,
                      const qm_tensor *skipped, double factor, double max_norm);

/* ---- quantized parameters: GPTQ, AWQ, MPQ (layer kind 1), MBWQ and EXL2 (kind 2) ----
**
** A weight W [K, N], K inputs (a multiple of 32), N outputs, on groups along K:
**   asym: W = scales[g] * (q - zero[g]), zero = field + zero_offset; N a multiple of 32
**   sym:  W = q * scales[g] - zeros[g],  zeros like scales (a product zero); one rounding (fma)
** Codes lie along K in packed rows, and these in sections of one width each. Column n of a section
** is a stream of bits: its row r has bits w_bit * r to w_bit * (r + 1), bit t is bit t % 32 of word
** row t / 32, and a field may go on in the next. 32 rows fill w_bit word rows.
** Packed row p holds feature q_perm[p] (identity without); its group is g_idx[feature], or
** group_map[p], or p / group_size. */
enum { QM_MPQ_SECTIONS_MAX = 8, QM_MPQ_GROUP_MAX = 4 };
typedef struct qm_mpq_section {
  int32_t w_bit; /* 1, 2, 3, 4, 5, 6 or 8 */
  int32_t rows;  /* a multiple of 32 */
} qm_mpq_section;
typedef struct qm_mpq {
  const qm_tensor *data;     /* i32 [sum of rows / 32 * w_bit, N] */
  const qm_tensor *scales;   /* float [G, N] */
  const qm_tensor *zeros;    /* asym: i32 [G, N / 32 * w_bit], each row a stream of fields;
                                sym: float [G, N], scales' type */
  const qm_tensor *g_idx;    /* i32 [K] by feature, or NULL */
  const qm_tensor *q_perm;   /* i32 [K], a permutation, or NULL */
  const qm_tensor *residual; /* i32 [K * residual_bits / 32, N], or NULL */
  const qm_tensor *group_map; /* i32 [K] by packed row, no group in two sections; or NULL */
  int32_t w_bit;             /* the one width; 0 where there are sections */
  int32_t residual_bits;     /* 0, 4 or 8: signed r + 2^(bits-1), packed like codes; the stored
                                weight is q + r / 2^residual_bits grid steps, forward uses q only */
  int32_t group_size;
  int32_t asym;
  int32_t zero_offset;       /* asym: 1, zero points 1 .. 2^w_bit (GPTQ); 0, zero points
                                0 .. 2^w_bit - 1 (GPTQ v2, AWQ): no file needs both ends at once */
  int32_t section_count;     /* 0: one section of w_bit. Sections need sym and a group_map */
  qm_mpq_section sections[8];
} qm_mpq;

/* Check every field: shapes, types, G against group_size, g_idx in range, q_perm a permutation. */
int32_t qm_mpq_validate(const qm_mpq *q);
/* codes u8 [K, N], in packed order of rows. */
int32_t qm_mpq_unpack(const qm_mpq *q, const qm_tensor *codes);
/* w float [K, N], in feature order; computed in f32, rounded once. QM_DECODE_RESIDUAL adds r;
** QM_DECODE_BIE rounds as the original does: each operation to the scales' type, sym twice. */
enum { QM_DECODE_CODES = 0, QM_DECODE_RESIDUAL = 1, QM_DECODE_BIE = 2 };
int32_t qm_mpq_dequantize(const qm_mpq *q, const qm_tensor *w, int32_t form);
/* Put w (float [K, N], feature order) on q's grid, writing data (and residual, which keeps what the
** codes lose). noise NULL: nearest, halves to even; else up with probability equal to the fraction.
** Values clamp first, so NaN packs as 0. */
int32_t qm_mpq_pack(const qm_mpq *q, const qm_tensor *w, const qm_noise *noise);
/* Fit scales and zeros to w, group by group: QM_FIT_MINMAX spans [min, max] (with 0 inside for
** asym), QM_FIT_MSE then shrinks the span to the least squared error; range multiplies the span. */
enum { QM_FIT_MINMAX = 0, QM_FIT_MSE = 1 };
int32_t qm_mpq_fit(const qm_mpq *q, const qm_tensor *w, int32_t method, double range);
/* Round rows one after the other onto their grids, c = clamp(round((w + zeros) / scales), 0,
** levels), w = scales c - zeros, and make up for each row's error in those that follow: errors[k] =
** (w[k] - rounded[k]) / u[k][k]; w[j] -= u[k][j] errors[k] for j > k (GPTQ). w f32 [B, N], in
** place; u f32 [B, B]; scales, zeros f32 [G, N]; groups i32 [B], each row's; errors f32 [B, N],
** written. */
int32_t qm_gptq_rows(const qm_tensor *w, const qm_tensor *u, const qm_tensor *scales,
                     const qm_tensor *zeros, const qm_tensor *groups, const qm_tensor *errors,
                     int32_t levels);
/* GBA's double quantization: out[g, n] = fl(fl(code - zeros[g, d]) * scales[g, d]), d = n / dq,
** in out's type. codes u8 [G, D, dq]; the nibble that `shift` and `mask` select is the code.
** zeros, scales of out's type: [G, D] or one row for all groups [1, D]; D * dq = N. out [G, N]. */
int32_t qm_mpq_prepare(const qm_tensor *codes, int32_t shift, int32_t mask, const qm_tensor *zeros,
                       const qm_tensor *scales, const qm_tensor *out);

enum { QM_ROUND_NEAREST = 0, QM_ROUND_STOCHASTIC = 1 };
enum { QM_FEEDBACK_NONE = 0, QM_FEEDBACK_MOMENTUM = 1, QM_FEEDBACK_RESIDUAL = 2 };
typedef struct qm_mpq_update_options {
  qm_adam adam;
  int32_t rounding;
  /* Where rounding errors go: RESIDUAL, q's residual; MOMENTUM, exp_avg (arXiv 2601.22101), save
  ** for what lies beyond the grid's ends, which could only wind it up. */
  int32_t feedback;
} qm_mpq_update_options;
/* One fused step on the fixed grid: decode, Adam, decay, round, feedback, encode.
** grad float [K, N] in feature order; exp_avg, exp_avg_sq f32 or bf16 [K, N], or both NULL: then
** grad is already the direction u (a projector's output). health i64 [4] or NULL, accumulates:
** elements, codes that moved, values clipped to the grid's ends, non-finite values (those elements
** keep their codes and moments). Random bits: stream CODES, element p * N + n for packed row p. */
int32_t qm_mpq_update(const qm_mpq *q, const qm_tensor *grad, const qm_tensor *exp_avg,
                      const qm_tensor *exp_avg_sq, const qm_mpq_update_options *options,
                      const qm_tensor *health);
/* The original system's step, to the bit: nearest rounding, zeros moved every fifth step, weight
** decay ignored. grad and direction as above (direction: u already projected back, with exp_avg
** NULL). zeros are updated in place. f32 arithmetic, rounded to the moments' type after each op. */
int32_t qm_mpq_update_bie(const qm_mpq *q, const qm_tensor *grad, const qm_tensor *exp_avg,
                          const qm_tensor *exp_avg_sq, const qm_adam *adam);
/* For few rows: out = x W, or with transposed != 0 x W^T, straight from the codes. x float [M, K],
** out of its type [M, N] (transposed: [M, N] and [M, K]); W as QM_DECODE_CODES has it, in f32 or
** rounded to x's type, whichever a backend multiplies; sums in f32, in an order that the shapes
** fix. */
int32_t qm_mpq_linear(const qm_tensor *x, const qm_mpq *q, const qm_tensor *out,
                      int32_t transposed);
/* out[i] = x W_i of up to QM_MPQ_GROUP_MAX weights, as where several layers read the same rows: for
** few rows, less than so many calls. Each as qm_mpq_linear has it; outs [M, N_i], none overlap. */
int32_t qm_mpq_linear_group(const qm_tensor *x, const qm_mpq *q, const qm_tensor *const *out,
                            int32_t count);

/* ---- files ---- */

typedef struct qm_file qm_file; /* handle: a file being written */

/* Write to "<path>.partial"; commit syncs and renames, release without commit removes: a kill at
** any instant leaves the old file or the new one, whole. */
int32_t qm_file_create(const char *path, qm_file **out);
int32_t qm_file_write(qm_file *file, const void *bytes, int64_t size_bytes);
int32_t qm_file_commit(qm_file *file);
void qm_file_release(qm_file *file);

/* Folders, for checkpoints. Create: parents too; one that is there already is fine. */
int32_t qm_folder_create(const char *path);
/* Names in a folder but "." and "..", in no order, each with its NUL, as far as they fit in names;
** *needed_bytes is what all of them take. */
int32_t qm_folder_list(const char *path, char *names, int64_t size_bytes, int64_t *needed_bytes);
/* Give a folder (or file) another name, which must not be taken, and sync: atomic. */
int32_t qm_folder_rename(const char *from, const char *to);
/* Remove a folder and the files in it; one that holds folders stays, without its files. */
int32_t qm_folder_remove(const char *path);

/* ---- safetensors ---- */

typedef struct qm_safetensors qm_safetensors; /* handle: an open file, checked on opening */
typedef struct qm_safetensors_writer qm_safetensors_writer;

/* Open and check: header length, JSON, every dtype, shape and offset against the file's length. */
int32_t qm_safetensors_open(const char *path, qm_safetensors **out);
void qm_safetensors_release(qm_safetensors *file);
int64_t qm_safetensors_count(const qm_safetensors *file);
/* Tensor i's name, and its shape and type in *out (storage NULL). Order of the data. A type we have
** no tensor for (F64, BOOL) has dtype -1, and cannot be read. */
int32_t qm_safetensors_entry(const qm_safetensors *file, int64_t index, const char **name,
                             qm_tensor *out);
/* The i-th metadata pair, or QM_E_ARGUMENT past the end. */
int32_t qm_safetensors_metadata(const qm_safetensors *file, int64_t index, const char **key,
                                const char **value);
/* Copy tensor i into out, on any device; shape and type must agree. */
int32_t qm_safetensors_read(const qm_safetensors *file, int64_t index, const qm_tensor *out);

/* Atomic, as a qm_file is. Declare metadata and every tensor first, then write the tensors in the
** order declared. */
int32_t qm_safetensors_create(const char *path, qm_safetensors_writer **out);
int32_t qm_safetensors_add_metadata(qm_safetensors_writer *writer, const char *key,
                                    const char *value);
int32_t qm_safetensors_add(qm_safetensors_writer *writer, const char *name, const qm_tensor *like);
int32_t qm_safetensors_write(qm_safetensors_writer *writer, const qm_tensor *x);
int32_t qm_safetensors_commit(qm_safetensors_writer *writer);
void qm_safetensors_writer_release(qm_safetensors_writer *writer);
/* cdef: end */
/* clang-format on */
#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
#endif
