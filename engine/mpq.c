/* mpq.c - quantized parameters: their fields checked against each other, then dispatched. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* The integers of an index operand in host memory; *owned is to be freed. NULL after a failure. */
static const int32_t *index_values(qm__call *call, const qm_array *index, int32_t **owned) {
  *owned = NULL;
  if (call->device->backend->host_memory) return index->data;
  const int64_t size_bytes = index->count * (int64_t)sizeof **owned;
  *owned = malloc((size_t)size_bytes + 1);
  if (*owned == NULL)
    call->status = qm__fail(QM_E_MEMORY, "the host is out of memory");
  else
    call->status = qm__graph_refuse(call->device, "reading a value back");
  if (call->status == QM_OK)
    call->status =
        call->device->backend->read(call->device->context, index->data, *owned, size_bytes);
  return call->status == QM_OK ? *owned : NULL;
}

static void check_g_idx(qm__call *call, const qm_array *g_idx, int64_t groups) {
  int32_t *owned = NULL;
  const int32_t *values = index_values(call, g_idx, &owned);
  for (int64_t k = 0; values != NULL && k < g_idx->count && call->status == QM_OK; k++)
    qm__require(call, values[k] >= 0 && values[k] < groups,
                "argument 'g_idx': expected groups in [0, G=%lld), got %d for row %lld",
                (long long)groups, values[k], (long long)k);
  free(owned);
}

static void check_q_perm(qm__call *call, const qm_array *q_perm) {
  int32_t *owned = NULL;
  const int32_t *values = index_values(call, q_perm, &owned);
  char *seen = calloc((size_t)q_perm->count + 1, 1);
  if (seen == NULL) call->status = qm__fail(QM_E_MEMORY, "the host is out of memory");
  for (int64_t p = 0; values != NULL && p < q_perm->count && call->status == QM_OK; p++) {
    const int32_t feature = values[p];
    const bool fresh = feature >= 0 && feature < q_perm->count && !seen[feature];
    qm__require(call, fresh,
                "argument 'q_perm': expected a permutation of 0 .. %lld, got %d at %lld",
                (long long)q_perm->count - 1, feature, (long long)p);
    if (fresh) seen[feature] = 1;
  }
  free(seen);
  free(owned);
}

/* Groups in range, and none in two sections: fitting asks for a group's width. */
static void check_group_map(qm__call *call, const qm_mpq_view *view) {
  int32_t *owned = NULL;
  const int32_t *values = index_values(call, &view->group_map, &owned);
  uint8_t *widths = calloc((size_t)view->groups + 1, 1);
  if (widths == NULL) call->status = qm__fail(QM_E_MEMORY, "the host is out of memory");
  for (int32_t i = 0; i < view->section_count; i++) {
    const qm_mpq_rows *section = &view->sections[i];
    for (int64_t p = section->first_row;
         values != NULL && p < section->end_row && call->status == QM_OK; p++) {
      const int32_t g = values[p];
      qm__require(
          call, g >= 0 && g < view->groups,
          "argument 'group_map': expected groups in [0, G=%lld), got %d for packed row %lld",
          (long long)view->groups, g, (long long)p);
      if (call->status != QM_OK) break;
      qm__require(call, widths[g] == 0 || widths[g] == i + 1,
                  "argument 'group_map': expected every group within one section, got group %d in "
                  "two, at packed row %lld",
                  g, (long long)p);
      widths[g] = (uint8_t)(i + 1);
    }
  }
  free(widths);
  free(owned);
}

/* Indices that a kernel will follow. Where they lie on a device, reading them back would wait for
** it on every call: there qm_mpq_validate looks once, and kernels stay inside their arrays. */
static void check_indices(qm__call *call, const qm_mpq_view *view) {
  if (call->status == QM_OK && view->g_idx.data != NULL)
    check_g_idx(call, &view->g_idx, view->groups);
  if (call->status == QM_OK && view->q_perm.data != NULL) check_q_perm(call, &view->q_perm);
  if (call->status == QM_OK && view->group_map.data != NULL) check_group_map(call, view);
}

static bool is_width(int32_t bits) { return bits >= 1 && bits <= 8 && bits != 7; }

/* Sections and their sums; false where they are none. */
static bool check_sections(qm__call *call, const qm_mpq *q, qm_mpq_view *view) {
  const int32_t count = q->section_count;
  int64_t row = 0, word = 0;
  qm__require(call, count >= 0 && count <= QM_MPQ_SECTIONS_MAX,
              "argument 'sections': expected at most %d, got %d", QM_MPQ_SECTIONS_MAX, count);
  if (count > 0) {
    qm__require(call, q->w_bit == 0, "argument 'w_bit': expected 0 beside sections, got %d",
                q->w_bit);
    qm__require(call, !q->asym, "argument 'asym': mixed widths have float zeros: expected sym");
    qm__require(call, q->group_map != NULL,
                "argument 'group_map': expected one beside sections, got nothing");
  }
  for (int32_t i = 0; i < count && call->status == QM_OK; i++) {
    const qm_mpq_section *section = &q->sections[i];
    qm__require(call, is_width(section->w_bit),
                "argument 'sections': expected a width of 1, 2, 3, 4, 5, 6 or 8 bits, got %d",
                section->w_bit);
    qm__require(call, section->rows > 0 && section->rows % 32 == 0,
                "argument 'sections': expected a multiple of 32 rows, got %d of %d bits",
                section->rows, section->w_bit);
    view->sections[i] = (qm_mpq_rows){row, row + section->rows, word, section->w_bit};
    row += section->rows;
    word += (int64_t)section->rows / 32 * section->w_bit;
  }
  view->section_count = count;
  return call->status == QM_OK;
}

/* Rows K, from the sections or from data and the one width. */
static int64_t check_rows(qm__call *call, const qm_mpq *q, qm_mpq_view *view) {
  const int64_t words = view->data.shape[0];
  if (q->section_count > 0) {
    const qm_mpq_rows *last = &view->sections[q->section_count - 1];
    const int64_t needed = last->first_word + (last->end_row - last->first_row) / 32 * last->w_bit;
    qm__require(call, words == needed,
                "argument 'data': expected %lld word rows, as the sections say, got %lld",
                (long long)needed, (long long)words);
    return last->end_row;
  }
  qm__require(
      call, words % q->w_bit == 0,
      "argument 'data': expected K * w_bit / 32 word rows, K a multiple of 32; got %lld word "
      "rows at w_bit %d",
      (long long)words, q->w_bit);
  const int64_t k = words / q->w_bit * 32;
  view->sections[0] = (qm_mpq_rows){0, k, 0, q->w_bit};
  view->section_count = 1;
  return k;
}

/* The scalar fields, and what they say about shapes. */
static bool check_scalars(qm__call *call, const qm_mpq *q) {
  qm__require(call, q != NULL, "argument 'q': expected a quantized parameter, got nothing");
  if (q == NULL) return false;
  qm__require(call, q->section_count != 0 || is_width(q->w_bit),
              "argument 'w_bit': expected 1, 2, 3, 4, 5, 6 or 8, got %d", q->w_bit);
  qm__require(call, q->zero_offset == 0 || q->zero_offset == 1,
              "argument 'zero_offset': expected 0 or 1, got %d", q->zero_offset);
  qm__require(call, q->residual_bits == 0 || q->residual_bits == 4 || q->residual_bits == 8,
              "argument 'residual_bits': expected 0, 4 or 8, got %d", q->residual_bits);
  qm__require(call, (q->residual_bits > 0) == (q->residual != NULL),
              "argument 'residual': expected one exactly where residual_bits is not 0");
  qm__require(call, q->group_size > 0, "argument 'group_size': expected at least 1, got %d",
              q->group_size);
  return call->status == QM_OK;
}

void qm__mpq(qm__call *call, const qm_mpq *q, qm__use codes_use, qm__use grid_use,
             qm_mpq_view *view) {
  memset(view, 0, sizeof *view);
  if (!check_scalars(call, q) || !check_sections(call, q, view)) return;
  qm__operand(call, "data", q->data, "i32 [words, N]", codes_use, &view->data);
  if (call->status != QM_OK) return;
  const int64_t n = view->data.shape[1], k = check_rows(call, q, view);
  if (call->status != QM_OK) return;
  qm__require(call, !q->asym || n % 32 == 0,
              "argument 'data': expected N a multiple of 32 (packed zeros), got N=%lld",
              (long long)n);
  /* What g_idx and q_perm can count; without columns no memory bounds the rows. */
  qm__require(call, k <= INT32_MAX, "argument 'data': expected K below 2^31, got K=%lld",
              (long long)k);
  qm__bind(call, "K", k);
  qm__bind(call, "zwords", n / 32 * q->w_bit);
  qm__bind(call, "rwords", k / 32 * q->residual_bits);
  qm__operand(call, "scales", q->scales, "float [G, N]", grid_use, &view->scales);
  qm__operand(call, "zeros", q->zeros, q->asym ? "i32 [G, zwords]" : "=scales [G, N]", grid_use,
              &view->zeros);
  qm__optional(call, "g_idx", q->g_idx, "i32 [K]", QM__READ, &view->g_idx);
  qm__optional(call, "q_perm", q->q_perm, "i32 [K]", QM__READ, &view->q_perm);
  qm__optional(call, "group_map", q->group_map, "i32 [K]", QM__READ, &view->group_map);
  qm__require(call, q->g_idx == NULL || q->group_map == NULL,
              "argument 'g_idx': expected it or a group_map, got both");
  qm__optional(call, "residual", q->residual, "i32 [rwords, N]", codes_use, &view->residual);
  view->k = k;
  view->n = n;
  view->groups = view->scales.shape[0];
  view->w_bit = q->w_bit;
  view->residual_bits = q->residual_bits;
  view->group_size = q->group_size;
  view->asym = q->asym != 0;
  view->zero_offset = q->zero_offset;
  const int64_t expected = (k + q->group_size - 1) / q->group_size;
  const bool is_listed = q->g_idx != NULL || q->group_map != NULL;
  qm__require(call, is_listed || view->groups == expected,
              "argument 'scales': expected G=%lld groups (K=%lld in groups of %d), got %lld",
              (long long)expected, (long long)k, q->group_size, (long long)view->groups);
  if (call->status != QM_OK) return;
  if (call->device->backend->host_memory) check_indices(call, view);
}

int32_t qm_mpq_validate(const qm_mpq *q) {
  qm__call call = qm__begin("qm_mpq_validate");
  qm_mpq_view view;
  qm__mpq(&call, q, QM__READ, QM__READ, &view);
  if (call.status == QM_OK && !call.device->backend->host_memory) check_indices(&call, &view);
  return qm__finish(&call);
}

int32_t qm_mpq_unpack(const qm_mpq *q, const qm_tensor *codes) {
  qm__call call = qm__begin("qm_mpq_unpack");
  qm_mpq_unpack_args args;
  qm__mpq(&call, q, QM__READ, QM__READ, &args.q);
  qm__operand(&call, "codes", codes, "u8 [K, N]", QM__WRITE, &args.codes);
  return QM__DISPATCH(call, mpq_unpack, &args);
}

int32_t qm_mpq_dequantize(const qm_mpq *q, const qm_tensor *w, int32_t form) {
  qm__call call = qm__begin("qm_mpq_dequantize");
  qm_mpq_dequantize_args args = {.form = form};
  qm__mpq(&call, q, QM__READ, QM__READ, &args.q);
  qm__operand(&call, "w", w, "float [K, N]", QM__WRITE, &args.w);
  qm__require(&call, form >= QM_DECODE_CODES && form <= QM_DECODE_BIE,
              "argument 'form': expected one of QM_DECODE_*, got %d", form);
  return QM__DISPATCH(call, mpq_dequantize, &args);
}

int32_t qm_mpq_pack(const qm_mpq *q, const qm_tensor *w, const qm_noise *noise) {
  qm__call call = qm__begin("qm_mpq_pack");
  qm_mpq_pack_args args = {.stochastic = noise != NULL};
  if (noise != NULL) args.noise = *noise;
  qm__mpq(&call, q, QM__WRITE, QM__READ, &args.q);
  qm__operand(&call, "w", w, "float [K, N]", QM__READ, &args.w);
  return QM__DISPATCH(call, mpq_pack, &args);
}

int32_t qm_mpq_fit(const qm_mpq *q, const qm_tensor *w, int32_t method, double range) {
  qm__call call = qm__begin("qm_mpq_fit");
  qm_mpq_fit_args args = {.method = method, .range = range};
  qm__mpq(&call, q, QM__READ, QM__WRITE, &args.q);
  qm__operand(&call, "w", w, "float [K, N]", QM__READ, &args.w);
  qm__require(&call, method == QM_FIT_MINMAX || method == QM_FIT_MSE,
              "argument 'method': expected QM_FIT_MINMAX or QM_FIT_MSE, got %d", method);
  qm__require(&call, range > 0.0 && range <= 1e6,
              "argument 'range': expected a number above 0, got %g", range);
  return QM__DISPATCH(call, mpq_fit, &args);
}

int32_t qm_gptq_rows(const qm_tensor *w, const qm_tensor *u, const qm_tensor *scales,
                     const qm_tensor *zeros, const qm_tensor *groups, const qm_tensor *errors,
                     int32_t levels) {
  qm__call call = qm__begin("qm_gptq_rows");
  qm_gptq_rows_args args = {.levels = (float)levels};
  qm__operand(&call, "w", w, "f32 [B, N]", QM__IN_PLACE, &args.w);
  qm__operand(&call, "u", u, "f32 [B, B]", QM__READ, &args.u);
  qm__operand(&call, "scales", scales, "f32 [G, N]", QM__READ, &args.scales);
  qm__operand(&call, "zeros", zeros, "f32 [G, N]", QM__READ, &args.zeros);
  qm__operand(&call, "groups", groups, "i32 [B]", QM__READ, &args.groups);
  qm__operand(&call, "errors", errors, "f32 [B, N]", QM__WRITE, &args.errors);
  qm__require(&call, levels >= 1 && levels <= 255, "argument 'levels': expected 1 to 255, got %d",
              levels);
  args.rows = qm__size(&call, "B");
  args.columns = qm__size(&call, "N");
  args.group_count = qm__size(&call, "G");
  return QM__DISPATCH(call, gptq_rows, &args);
}

int32_t qm_mpq_prepare(const qm_tensor *codes, int32_t shift, int32_t mask, const qm_tensor *zeros,
                       const qm_tensor *scales, const qm_tensor *out) {
  qm__call call = qm__begin("qm_mpq_prepare");
  qm_mpq_prepare_args args = {.shift = shift, .mask = mask};
  qm__operand(&call, "codes", codes, "u8 [G, D, dq]", QM__READ, &args.codes);
  qm__bind(&call, "N", qm__size(&call, "D") * qm__size(&call, "dq"));
  qm__operand(&call, "out", out, "float [G, N]", QM__WRITE, &args.out);
  qm__operand(&call, "zeros", zeros, "=out [rows, D]", QM__READ, &args.zeros);
  qm__operand(&call, "scales", scales, "=out [rows, D]", QM__READ, &args.scales);
  args.groups = args.codes.shape[0];
  args.blocks = args.codes.shape[1];
  args.block_size = args.codes.shape[2];
  qm__require(&call, args.zeros.shape[0] == args.groups || args.zeros.shape[0] == 1,
              "argument 'zeros': expected G=%lld rows or 1, got %lld", (long long)args.groups,
              (long long)args.zeros.shape[0]);
  qm__require(&call, shift >= 0 && shift < 8 && mask >= 0 && mask < 256,
              "argument 'shift': expected a shift within a byte and a mask of one");
  return QM__DISPATCH(call, mpq_prepare, &args);
}

int32_t qm_mpq_linear(const qm_tensor *x, const qm_mpq *q, const qm_tensor *out,
                      int32_t transposed) {
  qm__call call = qm__begin("qm_mpq_linear");
  qm_mpq_linear_args args = {.transposed = transposed != 0};
  qm__mpq(&call, q, QM__READ, QM__READ, &args.q);
  qm__operand(&call, "x", x, transposed ? "float [M, N]" : "float [M, K]", QM__READ, &args.x);
  qm__operand(&call, "out", out, transposed ? "=x [M, K]" : "=x [M, N]", QM__WRITE, &args.out);
  args.rows = args.x.shape[0];
  return QM__DISPATCH(call, mpq_linear, &args);
}

int32_t qm_mpq_linear_group(const qm_tensor *x, const qm_mpq *q, const qm_tensor *const *out,
                            int32_t count) {
  qm__call call = qm__begin("qm_mpq_linear_group");
  qm_mpq_linear_group_args args = {.count = count};
  qm__require(&call, count >= 1 && count <= QM_MPQ_GROUP_MAX,
              "argument 'count': expected 1 to %d, got %d", QM_MPQ_GROUP_MAX, count);
  qm__operand(&call, "x", x, "float [M, K]", QM__READ, &args.x);
  const int32_t sizes_of_x = call.size_count;
  for (int32_t i = 0; i < count && call.status == QM_OK; i++) {
    call.size_count = sizes_of_x; /* each weight has its own */
    qm__mpq(&call, &q[i], QM__READ, QM__READ, &args.q[i]);
    qm__operand(&call, "out", out[i], "=x [M, N]", QM__WRITE, &args.out[i]);
  }
  args.rows = args.x.shape[0];
  return QM__DISPATCH(call, mpq_linear_group, &args);
}
