/* gemm_plan.cu - what cuBLASLt is asked to run for a product, found once and kept. */
#include <stdlib.h>
#include <string.h>

#include <new>

#include "gemm.cuh"

enum { PLANS_MAX = 4096 };

size_t qm_gemm_hash::operator()(const qm_gemm_key &key) const {
  uint64_t words[sizeof key / sizeof(uint64_t)], hash = 0;
  memcpy(words, &key, sizeof key);
  for (const uint64_t word : words) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return hash;
}
bool operator==(const qm_gemm_key &x, const qm_gemm_key &y) {
  return memcmp(&x, &y, sizeof x) == 0;
}

int32_t qm_cuda_gemm_check(cublasStatus_t code, const char *what) {
  if (code == CUBLAS_STATUS_SUCCESS) return QM_OK;
  return qm_cuda_host->fail(code == CUBLAS_STATUS_ALLOC_FAILED ? QM_E_MEMORY : QM_E_DEVICE,
                            "cuda: gemm: %s: %s", what, cublasLtGetStatusString(code));
}

/* ---- opening and closing ---- */

int32_t qm_cuda_gemm_open(qm_cuda *cuda) {
  qm_cuda_blas *blas = new (std::nothrow) qm_cuda_blas{};
  if (blas == NULL) return qm_cuda_host->fail(QM_E_MEMORY, "the host is out of memory");
  cuda->blas = blas;
  const char *tune = getenv("QM_CUDA_TUNE");
  blas->tunes = tune == NULL || strcmp(tune, "0") != 0;
  const int32_t status = qm_cuda_gemm_check(cublasLtCreate(&blas->handle), "opening cuBLASLt");
  if (status != QM_OK) return status;
  cuda->workspace_bytes += QM_GEMM_WORKSPACE_BYTES;
  return qm_cuda_check(cudaMalloc(&blas->workspace, QM_GEMM_WORKSPACE_BYTES), "gemm: workspace");
}

static void clear(qm_gemm_plan *p) {
  if (p->product != NULL) cublasLtMatmulDescDestroy(p->product);
  for (const cublasLtMatrixLayout_t layout : {p->first, p->second, p->out})
    if (layout != NULL) cublasLtMatrixLayoutDestroy(layout);
}

static void clear_plans(qm_cuda_blas *blas) {
  for (auto &entry : blas->plans) clear(&entry.second);
  blas->plans.clear();
}

void qm_cuda_gemm_close(qm_cuda *cuda) {
  qm_cuda_blas *blas = cuda->blas;
  if (blas == NULL) return;
  clear_plans(blas);
  cudaFree(blas->workspace);
  if (blas->handle != NULL) cublasLtDestroy(blas->handle);
  delete blas;
}

/* ---- plans ---- */

static cudaDataType_t type_of(int32_t dtype) {
  return dtype == QM_F32 ? CUDA_R_32F : dtype == QM_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

/* `rows` is the extent that lies together in memory: the columns of our row-major matrix. */
static cublasStatus_t make_layout(cublasLtMatrixLayout_t *out, int32_t dtype, int64_t rows,
                                  int64_t columns, int64_t batch) {
  cublasStatus_t code =
      cublasLtMatrixLayoutCreate(out, type_of(dtype), (uint64_t)rows, (uint64_t)columns, rows);
  if (code != CUBLAS_STATUS_SUCCESS || batch == 1) return code;
  const int32_t count = (int32_t)batch;
  const int64_t stride = rows * columns;
  code = cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                          sizeof count);
  if (code != CUBLAS_STATUS_SUCCESS) return code;
  return cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                          &stride, sizeof stride);
}

static cublasStatus_t describe(qm_gemm_plan *p, const qm_gemm_key *key) {
  const cublasStatus_t codes[] = {
      cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
      make_layout(&p->first, key->type, key->trans_b ? key->k : key->n,
                  key->trans_b ? key->n : key->k, key->batch),
      make_layout(&p->second, key->type, key->trans_a ? key->m : key->k,
                  key->trans_a ? key->k : key->m, key->batch),
      make_layout(&p->out, key->out_type, key->n, key->m, key->batch),
  };
  for (const cublasStatus_t code : codes)
    if (code != CUBLAS_STATUS_SUCCESS) return code;
  const cublasOperation_t operations[] = {key->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                                          key->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N};
  cublasStatus_t code = qm_gemm_set(p->product, CUBLASLT_MATMUL_DESC_TRANSA, operations[0]);
  if (code == CUBLAS_STATUS_SUCCESS)
    code = qm_gemm_set(p->product, CUBLASLT_MATMUL_DESC_TRANSB, operations[1]);
  if (code == CUBLAS_STATUS_SUCCESS)
    code = qm_gemm_set(p->product, CUBLASLT_MATMUL_DESC_EPILOGUE, key->epilogue);
  /* The choice of algorithms goes by addresses' alignment and does not follow them. */
  if (code == CUBLAS_STATUS_SUCCESS && key->alignment_bias != 0)
    code = qm_gemm_set(p->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                       (void *)(intptr_t)key->alignment_bias);
  if (code != CUBLAS_STATUS_SUCCESS || key->alignment_aux == 0) return code;
  code = qm_gemm_set(p->product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                     (void *)(intptr_t)key->alignment_aux);
  if (code != CUBLAS_STATUS_SUCCESS) return code;
  return qm_gemm_set(p->product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, key->n);
}

static cublasStatus_t choose(const qm_cuda_blas *blas, qm_gemm_plan *p, const qm_gemm_key *key) {
  cublasLtMatmulPreference_t preference;
  cublasStatus_t code = cublasLtMatmulPreferenceCreate(&preference);
  if (code != CUBLAS_STATUS_SUCCESS) return code;
  const uint64_t workspace_bytes = QM_GEMM_WORKSPACE_BYTES;
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* or none */
  const uint32_t out_alignment = (uint32_t)key->alignment_out;
  const struct {
    cublasLtMatmulPreferenceAttributes_t name;
    const void *value;
    size_t size;
  } attributes[] = {
      {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof workspace_bytes},
      {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &key->alignment_b, sizeof key->alignment_b},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &key->alignment_a, sizeof key->alignment_a},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out_alignment, sizeof out_alignment},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out_alignment, sizeof out_alignment},
  };
  for (const auto &attribute : attributes)
    if (code == CUBLAS_STATUS_SUCCESS)
      code = cublasLtMatmulPreferenceSetAttribute(preference, attribute.name, attribute.value,
                                                  attribute.size);
  cublasLtMatmulHeuristicResult_t best[QM_GEMM_CANDIDATES];
  int found = 0;
  if (code == CUBLAS_STATUS_SUCCESS)
    code = cublasLtMatmulAlgoGetHeuristic(blas->handle, p->product, p->first, p->second, p->out,
                                          p->out, preference, blas->tunes ? QM_GEMM_CANDIDATES : 1,
                                          best, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  if (code == CUBLAS_STATUS_SUCCESS && found == 0) code = CUBLAS_STATUS_NOT_SUPPORTED;
  for (int i = 0; i < found && code == CUBLAS_STATUS_SUCCESS; i++)
    p->algorithms[p->count++] = best[i].algo;
  return code;
}

int32_t qm_cuda_gemm_find(qm_cuda_blas *blas, const qm_gemm_key *key, qm_gemm_plan **out) {
  auto entry = blas->plans.find(*key);
  if (entry == blas->plans.end()) {
    qm_gemm_plan p = {};
    cublasStatus_t code = describe(&p, key);
    if (code == CUBLAS_STATUS_SUCCESS) code = choose(blas, &p, key);
    const bool others_do = qm_gemm_can_part(key->epilogue) && qm_gemm_is_refusal(code);
    if (code != CUBLAS_STATUS_SUCCESS && !others_do) {
      clear(&p);
      return qm_cuda_host->fail(
          code == CUBLAS_STATUS_NOT_SUPPORTED ? QM_E_UNSUPPORTED : QM_E_DEVICE,
          "cuda: gemm: no algorithm for [%lld, %lld] x [%lld, %lld]: %s", (long long)key->m,
          (long long)key->k, (long long)key->k, (long long)key->n, cublasLtGetStatusString(code));
    }
    if (blas->plans.size() >= PLANS_MAX) clear_plans(blas);
    entry = blas->plans.emplace(*key, p).first;
  }
  *out = &entry->second;
  return QM_OK;
}

cublasStatus_t qm_cuda_gemm_run(qm_cuda *cuda, const qm_gemm_plan *p, int index,
                                const qm_gemm_operands *x) {
  cublasStatus_t code = CUBLAS_STATUS_SUCCESS;
  if (x->bias != NULL) code = qm_gemm_set(p->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, x->bias);
  if (code == CUBLAS_STATUS_SUCCESS && x->aux != NULL)
    code = qm_gemm_set(p->product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, x->aux);
  if (code != CUBLAS_STATUS_SUCCESS) return code;
  return cublasLtMatmul(cuda->blas->handle, p->product, &x->alpha, x->b, p->first, x->a, p->second,
                        &x->beta, x->c, p->out, x->out, p->out, &p->algorithms[index],
                        cuda->blas->workspace, QM_GEMM_WORKSPACE_BYTES, cuda->compute);
}
