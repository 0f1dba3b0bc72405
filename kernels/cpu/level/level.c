/* level.c - which kernels this instruction-set level overrides. */
#include "cpu/cpu.h"

void QM_CPU(level)(qm_kernels *kernels) {
  kernels->accumulate = QM_CPU(accumulate);
  kernels->adamw = QM_CPU(adamw);
  kernels->adam_direction = QM_CPU(adam_direction);
  kernels->attention = QM_CPU(attention);
  kernels->attention_backward = QM_CPU(attention_backward);
  kernels->binary = QM_CPU(binary);
  kernels->copy = QM_CPU(copy);
  kernels->fill = QM_CPU(fill);
  kernels->gather = QM_CPU(gather);
  kernels->gptq_rows = QM_CPU(gptq_rows);
  kernels->layer_norm = QM_CPU(layer_norm);
  kernels->layer_norm_backward = QM_CPU(layer_norm_backward);
  kernels->mpq_dequantize = QM_CPU(mpq_dequantize);
  kernels->mpq_fit = QM_CPU(mpq_fit);
  kernels->mpq_linear = QM_CPU(mpq_linear);
  kernels->mpq_linear_group = QM_CPU(mpq_linear_group);
  kernels->mpq_pack = QM_CPU(mpq_pack);
  kernels->mpq_unpack = QM_CPU(mpq_unpack);
  kernels->mpq_update = QM_CPU(mpq_update);
  kernels->mpq_update_bie = QM_CPU(mpq_update_bie);
  kernels->rms_norm = QM_CPU(rms_norm);
  kernels->rms_norm_backward = QM_CPU(rms_norm_backward);
  kernels->rope = QM_CPU(rope);
  kernels->rope_append = QM_CPU(rope_append);
  kernels->cross_entropy = QM_CPU(cross_entropy);
  kernels->permute = QM_CPU(permute);
  kernels->random = QM_CPU(random);
  kernels->reduce = QM_CPU(reduce);
  kernels->scatter_add = QM_CPU(scatter_add);
  kernels->scatter = QM_CPU(scatter);
  kernels->softmax = QM_CPU(softmax);
  kernels->sum_squares = QM_CPU(sum_squares);
  kernels->swiglu = QM_CPU(swiglu);
  kernels->swiglu_backward = QM_CPU(swiglu_backward);
  kernels->unary = QM_CPU(unary);
  kernels->unary_backward = QM_CPU(unary_backward);
}
