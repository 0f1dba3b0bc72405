/* gemm.cuh - what gemm.cu and gemm_plan.cu share: a matrix product as cuBLASLt sees it. */
#ifndef QM_GEMM_CUH
#define QM_GEMM_CUH

#include <cublasLt.h>

#include <mutex>
#include <unordered_map>

#include "cuda.h"

enum {
  QM_GEMM_WORKSPACE_BYTES = 32 << 20, /* what NVIDIA advises on Hopper */
  QM_GEMM_CANDIDATES = 16,
};

/* What a plan is made for. No padding, so that keys compare as bytes. */
typedef struct qm_gemm_key {
  int64_t batch, m, k, n;
  int32_t type, out_type, trans_a, trans_b;
  int32_t epilogue; /* a cublasLtEpilogue_t */
  int32_t alignment_a, alignment_b, alignment_out;
  int32_t alignment_bias, alignment_aux; /* 0: there is none */
} qm_gemm_key;
static_assert(sizeof(qm_gemm_key) == 4 * 8 + 10 * 4, "keys have no padding");

struct qm_gemm_hash {
  size_t operator()(const qm_gemm_key &key) const;
};
bool operator==(const qm_gemm_key &x, const qm_gemm_key &y);

typedef struct qm_gemm_plan {
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t first, second, out;           /* cuBLASLt's first operand is our b */
  cublasLtMatmulAlgo_t algorithms[QM_GEMM_CANDIDATES]; /* the first one runs */
  int count; /* 1: settled; 0: cuBLASLt has no algorithm that joins the epilogue */
} qm_gemm_plan;

/* One product's operands; out = epilogue(alpha op(a) op(b) + beta c). */
typedef struct qm_gemm_operands {
  const void *a, *b, *c;
  void *out;
  const void *bias; /* or NULL */
  void *aux;        /* GELU's argument, written or, for its gradient, read; or NULL */
  float alpha, beta;
} qm_gemm_operands;

/* Can other kernels do after the product what it does? Then cuBLASLt may refuse. */
static inline bool qm_gemm_can_part(int32_t epilogue) {
  return epilogue != CUBLASLT_EPILOGUE_DEFAULT && epilogue != CUBLASLT_EPILOGUE_BIAS;
}
static inline bool qm_gemm_is_refusal(cublasStatus_t code) {
  return code == CUBLAS_STATUS_NOT_SUPPORTED || code == CUBLAS_STATUS_INVALID_VALUE;
}

struct qm_cuda_blas {
  std::mutex lock; /* around finding a plan and queueing it */
  cublasLtHandle_t handle;
  void *workspace;
  bool tunes; /* unless $QM_CUDA_TUNE=0 */
  int tuned;  /* plans so far */
  std::unordered_map<qm_gemm_key, qm_gemm_plan, qm_gemm_hash> plans;
};

/* The cached plan for the key, made when there is none. */
int32_t qm_cuda_gemm_find(qm_cuda_blas *blas, const qm_gemm_key *key, qm_gemm_plan **out);
/* Queue a product with algorithm `index`. */
cublasStatus_t qm_cuda_gemm_run(qm_cuda *cuda, const qm_gemm_plan *p, int index,
                                const qm_gemm_operands *operands);
/* gemm_tune.cu: settle on the fastest of the plan's algorithms that give the first one's bits. */
void qm_cuda_gemm_tune(qm_cuda *cuda, const qm_gemm_key *key, qm_gemm_plan *p,
                       const qm_gemm_operands *operands);
int32_t qm_cuda_gemm_check(cublasStatus_t code, const char *what);
template <typename T>
static cublasStatus_t qm_gemm_set(cublasLtMatmulDesc_t product,
                                  cublasLtMatmulDescAttributes_t attribute, T value) {
  return cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof value);
}

#endif
