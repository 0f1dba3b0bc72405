/* work.c - what a kernel call must at least move and compute, from its operands alone.
**
** Bytes: every operand once, twice where it is read and written. Floating-point operations: those
** of matrix products and attention, where they are the cost; 0 elsewhere.
*/
#include "internal.h"

/* Bytes of the operands that the call reads (WRITE false) or writes (true). */
static double operand_bytes(qm__call *call, bool written) {
  double bytes = 0.0;
  for (int64_t i = 0; i < call->operand_count; i++) {
    const qm__extent *extent = &qm__extents(call)[i];
    if ((extent->use != QM__READ) == written) bytes += (double)(extent->end - extent->begin);
  }
  return bytes;
}

static double array_bytes(const qm_array *array) {
  return (double)array->count * qm_dtype_size(array->dtype);
}

/* Two products of head_size for every pair of a query and a key that it sees. Lengths lie on the
** device: sequences are taken to be of one length. */
static double attention_flops(const qm_attention_args *args) {
  const double sequences = args->sequences > 0 ? (double)args->sequences : 1.0;
  double keys = (double)args->rows_k / sequences;
  if (args->options.causal && args->rows_q == args->rows_k) keys /= 2.0;
  if (args->options.window > 0 && keys > args->options.window) keys = args->options.window;
  return 4.0 * (double)(args->rows_q * args->heads * args->head_size) * keys;
}

static double attention_backward_flops(const qm_attention_backward_args *args) {
  const qm_attention_args forward = {.sequences = args->sequences,
                                     .heads = args->heads,
                                     .head_size = args->head_size,
                                     .rows_q = args->rows_q,
                                     .rows_k = args->rows_k,
                                     .options = args->options};
  return 2.5 * attention_flops(&forward); /* five products for two */
}

qm__work qm__work_of(qm__call *call, int32_t kernel, const void *args) {
  const double written = operand_bytes(call, true);
  qm__work work = {.bytes = operand_bytes(call, false) + written};
  switch (kernel) {
    case QM__KERNEL_gemm: {
      const qm_gemm_args *gemm = args;
      work.flops = 2.0 * (double)gemm->batch * (double)gemm->m * (double)gemm->k * (double)gemm->n;
      if (gemm->beta != 0.0) work.bytes += written;
      break;
    }
    case QM__KERNEL_mpq_linear: {
      const qm_mpq_linear_args *linear = args;
      work.flops = 2.0 * (double)linear->rows * (double)linear->q.k * (double)linear->q.n;
      break;
    }
    case QM__KERNEL_mpq_linear_group: {
      const qm_mpq_linear_group_args *group = args;
      for (int32_t i = 0; i < group->count; i++)
        work.flops += 2.0 * (double)group->rows * (double)group->q[i].k * (double)group->q[i].n;
      break;
    }
    case QM__KERNEL_attention: work.flops = attention_flops(args); break;
    case QM__KERNEL_attention_backward: work.flops = attention_backward_flops(args); break;
    case QM__KERNEL_accumulate:
      if (((const qm_accumulate_args *)args)->beta != 0.0) work.bytes += written;
      break;
    case QM__KERNEL_gather: /* reads the rows it wants, not all */
      work.bytes = 2.0 * written + array_bytes(&((const qm_gather_args *)args)->index);
      break;
    case QM__KERNEL_scatter_add: { /* changes the rows that come, not all */
      const qm_scatter_add_args *scatter = args;
      work.bytes = 3.0 * array_bytes(&scatter->x) + array_bytes(&scatter->index);
      break;
    }
    case QM__KERNEL_scatter:
      work.bytes = 2.0 * array_bytes(&((const qm_scatter_args *)args)->x) +
                   array_bytes(&((const qm_scatter_args *)args)->index);
      break;
    case QM__KERNEL_rope_append: { /* writes rows of keys and values, not all */
      const qm_rope_append_args *append = args;
      work.bytes =
          2.0 * (array_bytes(&append->q) + array_bytes(&append->k) + array_bytes(&append->v));
      break;
    }
    case QM__KERNEL_adamw:
    case QM__KERNEL_mpq_update:
    case QM__KERNEL_mpq_update_bie: work.bytes += written; break; /* in place, all of it */
    case QM__KERNEL_adam_direction:
      work.bytes += written - array_bytes(&((const qm_adam_direction_args *)args)->update);
      break;
    default: break;
  }
  return work;
}
