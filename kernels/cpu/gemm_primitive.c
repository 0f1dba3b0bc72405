/* gemm_primitive.c - from a product's description to a oneDNN primitive: layouts, attributes, and
** whether the second operand is packed first.
*/
#include "gemm.h"

/* [batch, rows, columns], or [rows, columns] alone; transposed: stored as [columns, rows]. */
static dnnl_status_t describe(dnnl_memory_desc_t *out, const qm_cpu_product *p, int64_t rows,
                              int64_t columns, int transposed, int32_t type) {
  const int batched = p->batch > 1;
  dnnl_dims_t dims = {0}, strides = {0};
  dims[0] = p->batch; /* overwritten where there is one product only */
  strides[0] = rows * columns;
  dims[batched] = rows;
  strides[batched] = transposed ? 1 : columns;
  dims[batched + 1] = columns;
  strides[batched + 1] = transposed ? rows : 1;
  return dnnl_memory_desc_init_by_strides(out, 2 + batched, dims,
                                          type == QM_BF16 ? dnnl_bf16 : dnnl_f32, strides);
}

static dnnl_status_t set_attributes(dnnl_primitive_attr_t attributes, const qm_cpu_product *p) {
  dnnl_status_t code = dnnl_success;
  if (p->alpha != 1.0f) code = dnnl_primitive_attr_set_output_scales(attributes, 1, 0, &p->alpha);
  if (code != dnnl_success || p->beta == 0.0f) return code;
  dnnl_post_ops_t sum;
  code = dnnl_post_ops_create(&sum);
  if (code != dnnl_success) return code;
  code = dnnl_post_ops_append_sum(sum, p->beta);
  if (code == dnnl_success) code = dnnl_primitive_attr_set_post_ops(attributes, sum);
  dnnl_post_ops_destroy(sum);
  return code;
}

/* Many rows times a weight: packing it costs little and gains a tenth, or half where its rows lie a
** power of two apart. */
static int packs(const qm_cpu_product *p) {
  return p->type == QM_BF16 && p->batch == 1 && !p->trans_a && p->m >= 2048;
}

static dnnl_status_t create_packing(qm_cpu_primitive *e, dnnl_engine_t engine,
                                    const dnnl_memory_desc_t *plain,
                                    const dnnl_memory_desc_t *packed) {
  dnnl_primitive_desc_t description;
  if (dnnl_memory_desc_equal(plain, packed)) return dnnl_success;
  dnnl_status_t code =
      dnnl_reorder_primitive_desc_create(&description, plain, engine, packed, engine, NULL);
  if (code != dnnl_success) return code;
  code = dnnl_primitive_create(&e->pack, description);
  dnnl_primitive_desc_destroy(description);
  e->packed_bytes = dnnl_memory_desc_get_size(packed);
  if (code == dnnl_success)
    code = dnnl_memory_create(&e->memory[PACKED], packed, engine, DNNL_MEMORY_NONE);
  return code;
}

static dnnl_status_t create_primitive(qm_cpu_primitive *e, dnnl_engine_t engine,
                                      const dnnl_memory_desc_t layouts[OPERANDS]) {
  dnnl_matmul_desc_t operation;
  dnnl_primitive_attr_t attributes;
  dnnl_primitive_desc_t description = NULL;
  dnnl_memory_desc_t b = layouts[B];
  dnnl_status_t code = dnnl_success;
  if (packs(&e->key))
    code =
        dnnl_memory_desc_init_by_tag(&b, b.ndims, layouts[B].dims, dnnl_bf16, dnnl_format_tag_any);
  if (code == dnnl_success)
    code = dnnl_matmul_desc_init(&operation, &layouts[A], &b, NULL, &layouts[OUT]);
  if (code == dnnl_success) code = dnnl_primitive_attr_create(&attributes);
  if (code != dnnl_success) return code;
  code = set_attributes(attributes, &e->key);
  if (code == dnnl_success)
    code = dnnl_primitive_desc_create(&description, &operation, attributes, engine, NULL);
  if (code == dnnl_success) code = dnnl_primitive_create(&e->primitive, description);
  if (code == dnnl_success)
    code = create_packing(e, engine, &layouts[B],
                          dnnl_primitive_desc_query_md(description, dnnl_query_weights_md, 0));
  if (description != NULL) dnnl_primitive_desc_destroy(description);
  dnnl_primitive_attr_destroy(attributes);
  return code;
}

dnnl_status_t qm_cpu_primitive_create(qm_cpu_primitive *e, const qm_cpu_product *p,
                                      dnnl_engine_t engine) {
  dnnl_memory_desc_t layouts[OPERANDS];
  e->key = *p;
  dnnl_status_t code = describe(&layouts[A], p, p->m, p->k, p->trans_a, p->type);
  if (code == dnnl_success) code = describe(&layouts[B], p, p->k, p->n, p->trans_b, p->type);
  if (code == dnnl_success) code = describe(&layouts[OUT], p, p->m, p->n, 0, p->out_type);
  if (code == dnnl_success) code = create_primitive(e, engine, layouts);
  for (int i = 0; i < OPERANDS && code == dnnl_success; i++)
    code = dnnl_memory_create(&e->memory[i], &layouts[i], engine, DNNL_MEMORY_NONE);
  return code;
}

void qm_cpu_primitive_clear(qm_cpu_primitive *e) {
  for (int i = 0; i < BUFFERS; i++)
    if (e->memory[i] != NULL) dnnl_memory_destroy(e->memory[i]);
  if (e->pack != NULL) dnnl_primitive_destroy(e->pack);
  if (e->primitive != NULL) dnnl_primitive_destroy(e->primitive);
  memset(e, 0, sizeof *e);
}
