/* products.cpp - cuBLASLt's products as its manual has them, by plain loops: matrices lie by
** columns, D = epilogue(alpha op(A) op(B) + beta C + bias).
**
** What the real one refuses is refused. Its heuristic goes by alignments that it is told, also by
** those of the bias's and the auxiliary matrix's addresses: a product that breaks what was told is
** an error. Of four algorithms each is said to be faster than the one before; the second has the
** first one's bits; the third has another auxiliary matrix; the fourth sums in another order.
** $QM_EMULATED_EPILOGUES=0 knows of no epilogue but the bias.
*/
#include <cublasLt.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../kernels/dtype.h"
#include "runtime.h"

enum { ALGORITHMS = 4, ALIGNED = 256 /* what cuBLASLt assumes unless it is told */ };

struct emulated_products {
  bool joins;
};
struct emulated_product {
  cublasOperation_t operation_a, operation_b;
  cublasLtEpilogue_t epilogue;
  void *bias, *aux;
  int64_t aux_ld;
};
struct emulated_layout {
  cudaDataType_t type;
  int64_t rows, columns, ld, stride;
  int32_t batch;
};
struct emulated_preference {
  uint32_t alignment[4]; /* of A, B, C, D */
};
/* What cublasLtMatmulAlgo_t holds. */
struct algorithm {
  uint32_t alignment[6]; /* of A, B, C, D, bias, aux */
  int32_t index, epilogue;
};
static_assert(sizeof(algorithm) <= sizeof(cublasLtMatmulAlgo_t), "an algorithm has its place");

static bool has_bias(cublasLtEpilogue_t e) {
  return e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}
static bool has_aux(cublasLtEpilogue_t e) { return (e & 128) != 0; }

const char *cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED   ? "CUBLAS_STATUS_NOT_SUPPORTED"
         : status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
                                                 : "some status";
}

/* ---- descriptions ---- */

template <typename T>
static cublasStatus_t create(T **out, T value) {
  *out = new T(value);
  return CUBLAS_STATUS_SUCCESS;
}
template <typename T>
static cublasStatus_t destroy(T *x) {
  delete x;
  return CUBLAS_STATUS_SUCCESS;
}
template <typename T>
static cublasStatus_t set(T &field, const void *value, size_t size) {
  if (value == NULL || size != sizeof field) return CUBLAS_STATUS_INVALID_VALUE;
  memcpy(&field, value, size);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  const char *epilogues = getenv("QM_EMULATED_EPILOGUES");
  return create(handle, emulated_products{epilogues == NULL || strcmp(epilogues, "0") != 0});
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t,
                                        cudaDataType_t scale) {
  if (scale != CUDA_R_32F) return CUBLAS_STATUS_INVALID_VALUE;
  return create(out, emulated_product{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL,
                                      NULL, 0});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) { return destroy(product); }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t p,
                                              cublasLtMatmulDescAttributes_t name,
                                              const void *value, size_t size) {
  switch (name) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return set(p->operation_a, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSB: return set(p->operation_b, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(p->epilogue, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(p->bias, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return set(p->aux, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return set(p->aux_ld, value, size);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type,
                                          uint64_t rows, uint64_t columns, int64_t ld) {
  return create(out, emulated_layout{type, (int64_t)rows, (int64_t)columns, ld, 0, 1});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return destroy(layout);
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t name,
                                                const void *value, size_t size) {
  return name == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT ? set(layout->batch, value, size)
                                                    : set(layout->stride, value, size);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
  return create(out, emulated_preference{{ALIGNED, ALIGNED, ALIGNED, ALIGNED}});
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return destroy(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t name,
                                                    const void *value, size_t size) {
  const int i = name - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
  return i < 0 ? CUBLAS_STATUS_SUCCESS : set(preference->alignment[i], value, size);
}

/* ---- what is refused ---- */

static cublasStatus_t check(const emulated_products *handle, const emulated_product *p,
                            const emulated_layout *a, const emulated_layout *b,
                            const emulated_layout *c, const emulated_layout *d) {
  for (const void *given : {(const void *)handle, (const void *)p, (const void *)a,
                            (const void *)b, (const void *)c, (const void *)d})
    if (given == NULL) return CUBLAS_STATUS_INVALID_VALUE;
  const int64_t m = p->operation_a == CUBLAS_OP_N ? a->rows : a->columns;
  const int64_t k = p->operation_a == CUBLAS_OP_N ? a->columns : a->rows;
  const bool fits = (p->operation_b == CUBLAS_OP_N ? b->rows : b->columns) == k &&
                    (p->operation_b == CUBLAS_OP_N ? b->columns : b->rows) == d->columns &&
                    d->rows == m && c->rows == m && c->columns == d->columns;
  if (!fits || m < 1 || k < 1 || d->columns < 1) return CUBLAS_STATUS_INVALID_VALUE;
  for (const emulated_layout *x : {a, b, c, d})
    if (x->ld < x->rows || x->batch != d->batch) return CUBLAS_STATUS_INVALID_VALUE;
  if (a->type != b->type || c->type != d->type || (d->type != a->type && d->type != CUDA_R_32F))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  const cublasLtEpilogue_t e = p->epilogue;
  if (e == CUBLASLT_EPILOGUE_DEFAULT) return CUBLAS_STATUS_SUCCESS;
  /* Bias and auxiliary matrix are of D's type; the latter lies by columns of D. */
  if (has_bias(e) && (uintptr_t)p->bias % 16 != 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (!has_aux(e)) return CUBLAS_STATUS_SUCCESS;
  if (p->aux_ld < m || p->aux_ld % 8 != 0) return CUBLAS_STATUS_INVALID_VALUE;
  const bool joins = handle->joins && d->batch == 1 && (uintptr_t)p->aux % 16 == 0;
  return joins ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

static uint32_t alignment(const void *x) {
  const uintptr_t lowest = (uintptr_t)x & (0 - (uintptr_t)x);
  return lowest == 0 || lowest > ALIGNED ? (uint32_t)ALIGNED : (uint32_t)lowest;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t p, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int most, cublasLtMatmulHeuristicResult_t *results,
    int *found) {
  *found = 0;
  const cublasStatus_t status = check(handle, p, a, b, c, d);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  for (; *found < most && *found < ALGORITHMS; ++*found) {
    algorithm one = {{}, *found, p->epilogue};
    memcpy(one.alignment, preference->alignment, sizeof preference->alignment);
    one.alignment[4] = alignment(p->bias);
    one.alignment[5] = alignment(p->aux);
    memset(&results[*found].algo, 0, sizeof results[*found].algo);
    memcpy(&results[*found].algo, &one, sizeof one);
  }
  return CUBLAS_STATUS_SUCCESS;
}

/* ---- the product ---- */

static int32_t dtype_of(cudaDataType_t type) {
  return type == CUDA_R_32F ? QM_F32 : type == CUDA_R_16F ? QM_F16 : QM_BF16;
}

/* One matrix of a batch as the transpose of op(x), by rows: [k][rows of D] for A. */
static std::vector<float> read(const emulated_layout &x, const void *data, int64_t batch,
                               bool transposed) {
  std::vector<float> out((size_t)(x.rows * x.columns));
  for (int64_t column = 0; column < x.columns; column++)
    for (int64_t row = 0; row < x.rows; row++)
      out[(size_t)(transposed ? row * x.columns + column : column * x.rows + row)] =
          qm_load(data, dtype_of(x.type), batch * x.stride + column * x.ld + row);
  return out;
}

static const float GELU_SCALE = 0.7978845608f; /* sqrt(2 / pi) */
static float gelu(float x) {
  return 0.5f * x * (1.0f + tanhf(GELU_SCALE * (x + 0.044715f * x * x * x)));
}
static float gelu_slope(float x) {
  const float t = tanhf(GELU_SCALE * (x + 0.044715f * x * x * x));
  return 0.5f * (1.0f + t) +
         0.5f * x * (1.0f - t * t) * GELU_SCALE * (1.0f + 3.0f * 0.044715f * x * x);
}

struct call {
  emulated_product p;
  emulated_layout a, b, c, d;
  const void *data_a, *data_b, *data_c;
  void *data_d;
  float alpha, beta;
  int32_t index;
};

/* `sum`: alpha op(A) op(B) for one element of D. */
static void finish(const call &x, int64_t row, int64_t column, int64_t batch, float sum) {
  const int32_t type = dtype_of(x.d.type);
  const int64_t at = batch * x.d.stride + column * x.d.ld + row;
  const int64_t at_c = batch * x.c.stride + column * x.c.ld + row;
  if (has_bias(x.p.epilogue)) sum += qm_load(x.p.bias, type, row);
  if (x.beta != 0.0f) sum += x.beta * qm_load(x.data_c, type, at_c);
  const int64_t at_aux = column * x.p.aux_ld + row;
  if (x.p.epilogue == CUBLASLT_EPILOGUE_DGELU) {
    sum *= gelu_slope(qm_load(x.p.aux, type, at_aux));
  } else if (has_aux(x.p.epilogue)) {
    qm_store(x.p.aux, type, at_aux, x.index == 2 ? -sum : sum);
    sum = gelu(sum); /* of the sum before it is rounded */
  }
  qm_store(x.data_d, type, at, sum);
}

static void multiply(const call &x, int64_t batch) {
  const int64_t m = x.d.rows, n = x.d.columns;
  const int64_t k = x.p.operation_a == CUBLAS_OP_N ? x.a.columns : x.a.rows;
  const std::vector<float> a = read(x.a, x.data_a, batch, x.p.operation_a != CUBLAS_OP_N);
  const std::vector<float> b = read(x.b, x.data_b, batch, x.p.operation_b != CUBLAS_OP_N);
  std::vector<float> sums((size_t)m);
  for (int64_t column = 0; column < n; column++) {
    for (float &sum : sums) sum = 0.0f;
    for (int64_t step = 0; step < k; step++) {
      const int64_t l = x.index == 3 ? k - 1 - step : step;
      const float factor = b[(size_t)(column * k + l)];
      for (int64_t row = 0; row < m; row++) sums[(size_t)row] += a[(size_t)(l * m + row)] * factor;
    }
    for (int64_t row = 0; row < m; row++)
      finish(x, row, column, batch, x.alpha * sums[(size_t)row]);
  }
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t p, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t layout_a, const void *b,
                              cublasLtMatrixLayout_t layout_b, const void *beta, const void *c,
                              cublasLtMatrixLayout_t layout_c, void *d,
                              cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t *algo,
                              void *, size_t, cudaStream_t stream) {
  const cublasStatus_t status = check(handle, p, layout_a, layout_b, layout_c, layout_d);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  for (const void *given : {alpha, a, b, beta, c, (const void *)d, (const void *)algo})
    if (given == NULL) return CUBLAS_STATUS_INVALID_VALUE;
  if ((has_bias(p->epilogue) && p->bias == NULL) || (has_aux(p->epilogue) && p->aux == NULL))
    return CUBLAS_STATUS_INVALID_VALUE;
  algorithm one;
  memcpy(&one, algo, sizeof one);
  const void *const pointers[] = {a, b, c, d, has_bias(p->epilogue) ? p->bias : NULL,
                                  has_aux(p->epilogue) ? p->aux : NULL};
  for (int i = 0; i < 6; i++)
    if (alignment(pointers[i]) < one.alignment[i]) return CUBLAS_STATUS_INVALID_VALUE;
  if (one.epilogue != (int32_t)p->epilogue) return CUBLAS_STATUS_INVALID_VALUE;
  const call x = {*p, *layout_a, *layout_b, *layout_c, *layout_d, a, b, c, d,
                  *(const float *)alpha, *(const float *)beta, one.index};
  /* Time is counted in what is queued. */
  for (int i = one.index + 1; i < ALGORITHMS; i++) runtime_queue(stream, [] {});
  runtime_queue(stream, [x] {
    for (int64_t batch = 0; batch < x.d.batch; batch++) multiply(x, batch);
  });
  return CUBLAS_STATUS_SUCCESS;
}
