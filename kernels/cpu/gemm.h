/* gemm.h - what gemm.c and gemm_primitive.c share: one matrix product as oneDNN sees it. */
#ifndef QM_CPU_GEMM_H
#define QM_CPU_GEMM_H

#include <dnnl.h>

#include "cpu.h"

/* What a primitive is made for. No padding, so that keys compare as bytes. */
typedef struct qm_cpu_product {
  int64_t batch, m, k, n;
  int32_t type, out_type; /* QM_BF16 or QM_F32 */
  int32_t trans_a, trans_b;
  float alpha, beta;
} qm_cpu_product;
_Static_assert(sizeof(qm_cpu_product) == 4 * 8 + 6 * 4, "keys have no padding");

enum { A, B, OUT, OPERANDS, PACKED = OPERANDS, BUFFERS };

typedef struct qm_cpu_primitive {
  qm_cpu_product key;
  uint64_t used; /* when last; 0: empty */
  dnnl_primitive_t primitive;
  dnnl_memory_t memory[BUFFERS]; /* bound anew to each call's operands */
  dnnl_primitive_t pack;         /* lays b out as the product likes it best; NULL: as it is */
  size_t packed_bytes;
} qm_cpu_primitive;

/* Make the primitive for p in an empty entry; clear it also after a failure. */
dnnl_status_t qm_cpu_primitive_create(qm_cpu_primitive *e, const qm_cpu_product *p,
                                      dnnl_engine_t engine);
void qm_cpu_primitive_clear(qm_cpu_primitive *e);

#endif
