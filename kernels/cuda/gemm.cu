/* gemm.cu - matrix products through cuBLASLt. Reference: kernels/reference/gemm.c, within the
** rounding of sums taken in another order; the same bits every time.
**
** cuBLASLt counts by columns, so it sees the transpose of every row-major matrix: out^T = b^T a^T.
** Sums run in f32; f32 operands are multiplied as such, never as TF32. Partial sums of a product
** that is split along k stay f32 too.
**
** GELU and its gradient are epilogues of cuBLASLt: they cost no pass over memory of their own. What
** it refuses, and what it would refuse, other kernels do after the product. An epilogue takes GELU
** of the sum before that is rounded to aux's type, the kernel after it: the two ways differ by that
** rounding. A bias's gradient is none (BGRADA): on an H200 it was up to 9 % slower on the way than
** the product and a kernel of its own, at all but one of GPT-2 124M's shapes.
*/
#include "device.cuh"
#include "gemm.cuh"
#include "gemm_apart.h"

enum { THREADS = 256, ALIGNMENT_MAX = 256, BATCH_MAX = 65535 /* grid.z */ };

static int32_t alignment(const void *x) {
  const uintptr_t lowest = (uintptr_t)x & (0 - (uintptr_t)x);
  return lowest < ALIGNMENT_MAX ? (int32_t)lowest : ALIGNMENT_MAX;
}

/* out = product + beta out + bias; product NULL is the sum over nothing. */
template <typename T, typename B>
static __global__ void finish(const float *product, const B *bias, T *out, float beta, int64_t n,
                              int64_t count) {
  const int64_t stride = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) {
    float result = product == NULL ? 0.0f : product[i];
    if (bias != NULL) result += qm_float(bias[i % n]);
    if (beta != 0.0f) result += beta * qm_float(out[i]);
    out[i] = qm_as<T>(result);
  }
}

static int32_t launch_finish(qm_cuda *cuda, const float *product, const qm_array *bias,
                             const qm_array *out, float beta, int64_t n) {
  return qm_with_float(out->dtype, [&](auto element) {
    return qm_with_float(bias->dtype, [&](auto bias_element) {
      finish<<<qm_blocks(cuda, out->count, THREADS), THREADS, 0, cuda->compute>>>(
          product, (const decltype(bias_element) *)bias->data, (decltype(element) *)out->data, beta,
          n, out->count);
      return qm_cuda_launched(cuda, "gemm");
    });
  });
}

/* One product whose types cuBLASLt has; bias (or NULL) is in out's type.
** QM_E_UNSUPPORTED: cuBLASLt does not join this epilogue. */
static int32_t multiply(qm_cuda *cuda, const qm_gemm_args *args, const qm_array *out, float beta,
                        int32_t epilogue, const void *bias) {
  qm_cuda_blas *blas = cuda->blas;
  const int64_t size = args->a.dtype == QM_F32 ? 4 : 2, out_size = out->dtype == QM_F32 ? 4 : 2;
  void *aux = args->aux.data;
  int32_t status = QM_OK;
  for (int64_t done = 0; done < args->batch && status == QM_OK; done += BATCH_MAX) {
    const char *a = (const char *)args->a.data + done * args->m * args->k * size;
    const char *b = (const char *)args->b.data + done * args->k * args->n * size;
    char *to = (char *)out->data + done * args->m * args->n * out_size;
    const int64_t left = args->batch - done, most = BATCH_MAX;
    const qm_gemm_key key = {
        .batch = left < most ? left : most,
        .m = args->m,
        .k = args->k,
        .n = args->n,
        .type = args->a.dtype,
        .out_type = out->dtype,
        .trans_a = args->trans_a,
        .trans_b = args->trans_b,
        .epilogue = epilogue,
        .alignment_a = alignment(a),
        .alignment_b = alignment(b),
        .alignment_out = alignment(to),
        .alignment_bias = bias == NULL ? 0 : alignment(bias),
        .alignment_aux = aux == NULL ? 0 : alignment(aux),
    };
    const qm_gemm_operands operands = {a, b, to, to, bias, aux, (float)args->alpha, beta};
    const std::lock_guard<std::mutex> guard(blas->lock);
    qm_gemm_plan *p = NULL;
    status = qm_cuda_gemm_find(blas, &key, &p);
    if (status != QM_OK) return status;
    if (p->count == 0) return QM_E_UNSUPPORTED;
    if (p->count > 1) qm_cuda_gemm_tune(cuda, &key, p, &operands);
    const cublasStatus_t code = qm_cuda_gemm_run(cuda, p, 0, &operands);
    if (qm_gemm_can_part(epilogue) && qm_gemm_is_refusal(code)) {
      p->count = 0;
      return QM_E_UNSUPPORTED;
    }
    status = qm_cuda_gemm_check(code, "launch");
  }
  return status == QM_OK ? qm_cuda_launched(cuda, "gemm") : status;
}

/* The bias in `type`, where cuBLASLt can read it: itself, or a copy at `scratch`. */
static int32_t fit_bias(qm_cuda *cuda, const qm_array *bias, int32_t type, void *scratch,
                        const void **out) {
  *out = bias->data;
  if (bias->data == NULL || (bias->dtype == type && qm_aligned(bias->data, 16))) return QM_OK;
  *out = scratch;
  qm_array copy = *bias;
  copy.data = scratch;
  copy.dtype = type;
  return launch_finish(cuda, NULL, bias, &copy, 0.0f, bias->count);
}

/* The epilogue of cuBLASLt that is args->epilogue, or CUBLASLT_EPILOGUE_DEFAULT. */
static int32_t find_epilogue(const qm_cuda *cuda, const qm_gemm_args *args) {
  const qm_array *out = &args->out;
  const bool has_bias = args->bias.data != NULL;
  const bool empty = out->count == 0 || args->k == 0;
  /* Before Hopper, bf16 products are said to have GELU as a pass of its own: not measured here. */
  if (args->a.dtype == QM_F32 || empty || cuda->capability < 90) return CUBLASLT_EPILOGUE_DEFAULT;
  /* aux's leading dimension is n, which cuBLASLt wants divisible by 8. */
  const bool fits = out->dtype == args->a.dtype && args->beta == 0.0 && args->n % 8 == 0 &&
                    qm_aligned(args->aux.data, 16);
  if (!fits) return CUBLASLT_EPILOGUE_DEFAULT;
  if (args->epilogue == QM_EPILOGUE_GELU)
    return has_bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
  return has_bias ? CUBLASLT_EPILOGUE_DEFAULT : CUBLASLT_EPILOGUE_DGELU;
}

/* The product with its epilogue, or QM_E_UNSUPPORTED. */
static int32_t multiply_joined(qm_cuda *cuda, const qm_gemm_args *args) {
  const int32_t epilogue = find_epilogue(cuda, args);
  if (epilogue == CUBLASLT_EPILOGUE_DEFAULT) return QM_E_UNSUPPORTED;
  const void *bias = NULL;
  void *scratch = NULL;
  int32_t status = QM_OK;
  if (args->bias.data != NULL) {
    status = qm_cuda_scratch(cuda, args->bias.count * (int64_t)sizeof(float), &scratch);
    if (status == QM_OK) status = fit_bias(cuda, &args->bias, args->out.dtype, scratch, &bias);
  }
  if (status != QM_OK) return status;
  return multiply(cuda, args, &args->out, 0.0f, epilogue, bias);
}

static int32_t multiply_plainly(qm_cuda *cuda, const qm_gemm_args *args) {
  const qm_array *out = &args->out;
  const float beta = args->beta == 0.0 ? 0.0f : (float)args->beta;
  if (out->count == 0) return QM_OK;
  if (args->k == 0) return launch_finish(cuda, NULL, &args->bias, out, beta, args->n);
  /* What cuBLASLt has no pair of types for goes through f32. */
  const bool direct = out->dtype == QM_F32 || out->dtype == args->a.dtype;
  const int64_t scratch_bytes = (direct ? args->bias.count : out->count) * (int64_t)sizeof(float);
  void *scratch = NULL;
  int32_t status = scratch_bytes > 0 ? qm_cuda_scratch(cuda, scratch_bytes, &scratch) : QM_OK;
  if (status != QM_OK) return status;
  if (direct) {
    const void *bias = NULL;
    status = fit_bias(cuda, &args->bias, out->dtype, scratch, &bias);
    if (status != QM_OK) return status;
    const int32_t epilogue = bias == NULL ? CUBLASLT_EPILOGUE_DEFAULT : CUBLASLT_EPILOGUE_BIAS;
    return multiply(cuda, args, out, beta, epilogue, bias);
  }
  qm_array wide = *out;
  wide.dtype = QM_F32;
  wide.data = scratch;
  status = multiply(cuda, args, &wide, 0.0f, CUBLASLT_EPILOGUE_DEFAULT, NULL);
  if (status != QM_OK) return status;
  return launch_finish(cuda, (const float *)scratch, &args->bias, out, beta, args->n);
}

static qm_kernels kernels_apart() {
  qm_kernels kernels = {};
  kernels.gemm = qm_cuda_gemm;
  kernels.unary = qm_cuda_unary;
  kernels.unary_backward = qm_cuda_unary_backward;
  return kernels;
}

int32_t qm_cuda_gemm(void *context, const qm_gemm_args *args) {
  static const qm_kernels apart = kernels_apart();
  QM_CUDA_ENTER(context);
  if (args->epilogue == QM_EPILOGUE_NONE) return multiply_plainly(cuda, args);
  const int32_t status = multiply_joined(cuda, args);
  return status == QM_E_UNSUPPORTED ? qm_gemm_apart(&apart, context, args) : status;
}
