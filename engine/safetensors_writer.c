/* safetensors_writer.c - writing safetensors files: declared whole, then written in order.
**
** file.c makes it atomic. Source: https://huggingface.co/docs/safetensors.
*/
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { CHUNK_BYTES = 4 << 20 };

struct qm_safetensors_writer {
  char *path; /* for messages */
  qm_file *file;
  json_t *header;   /* the JSON to be, in the order declared */
  json_t *metadata; /* borrowed from header, or NULL */
  qm_tensor *likes; /* shape and type of each declared tensor */
  int64_t count, written, data_bytes;
  bool begun;  /* the header stands in the file */
  bool failed; /* a tensor is there in part */
};

static int32_t out_of_memory(void) { return qm__fail(QM_E_MEMORY, "the host is out of memory"); }

int32_t qm_safetensors_create(const char *path, qm_safetensors_writer **out) {
  if (path == NULL || out == NULL) return qm__fail(QM_E_ARGUMENT, "qm_safetensors_create: NULL");
  qm_safetensors_writer *writer = calloc(1, sizeof *writer);
  if (writer == NULL) return out_of_memory();
  qm__handle_opened();
  writer->path = strdup(path);
  writer->header = json_object();
  const int32_t status = writer->path == NULL || writer->header == NULL
                             ? out_of_memory()
                             : qm_file_create(path, &writer->file);
  if (status != QM_OK) {
    qm_safetensors_writer_release(writer);
    return status;
  }
  *out = writer;
  return QM_OK;
}

static int32_t check_declaring(const qm_safetensors_writer *writer, const char *name) {
  if (writer == NULL || name == NULL) return qm__fail(QM_E_ARGUMENT, "qm_safetensors_writer: NULL");
  if (writer->begun)
    return qm__fail(QM_E_ARGUMENT, "%s: '%s' is declared after the first tensor was written",
                    writer->path, name);
  return QM_OK;
}

int32_t qm_safetensors_add_metadata(qm_safetensors_writer *writer, const char *key,
                                    const char *value) {
  const int32_t status = check_declaring(writer, key);
  if (status != QM_OK) return status;
  if (writer->metadata == NULL) {
    json_t *metadata = json_object();
    if (json_object_set_new(writer->header, "__metadata__", metadata) != 0) return out_of_memory();
    writer->metadata = metadata;
  }
  json_t *text = value == NULL ? NULL : json_string(value);
  if (json_object_set_new(writer->metadata, key, text) != 0)
    return qm__fail(QM_E_ARGUMENT, "%s: metadata '%s' is not UTF-8", writer->path, key);
  return QM_OK;
}

int32_t qm_safetensors_add(qm_safetensors_writer *writer, const char *name, const qm_tensor *like) {
  const int32_t status = check_declaring(writer, name);
  if (status != QM_OK) return status;
  const qm__file_type *type = like == NULL ? NULL : qm__file_type_of(like->dtype);
  if (type == NULL || like->ndim < 0 || like->ndim > QM_DIMS_MAX)
    return qm__fail(QM_E_ARGUMENT, "%s: '%s' is not a tensor", writer->path, name);
  if (strcmp(name, "__metadata__") == 0 || json_object_get(writer->header, name) != NULL)
    return qm__fail(QM_E_ARGUMENT, "%s: the name '%s' is taken", writer->path, name);
  json_t *shape = json_array();
  int64_t bytes = type->size_bytes;
  bool fits = true;
  for (int32_t i = 0; i < like->ndim; i++) {
    fits = fits && like->shape[i] >= 0 && !__builtin_mul_overflow(bytes, like->shape[i], &bytes);
    json_array_append_new(shape, json_integer(like->shape[i]));
  }
  int64_t end;
  if (!fits || __builtin_add_overflow(writer->data_bytes, bytes, &end)) {
    json_decref(shape);
    return qm__fail(QM_E_ARGUMENT, "%s: the extents of '%s' make no sense", writer->path, name);
  }
  qm_tensor *likes = realloc(writer->likes, (size_t)(writer->count + 1) * sizeof *likes);
  if (likes != NULL) writer->likes = likes;
  json_t *entry = json_pack("{s:s, s:o, s:[I, I]}", "dtype", type->name, "shape", shape,
                            "data_offsets", (json_int_t)writer->data_bytes, (json_int_t)end);
  if (likes == NULL || entry == NULL) {
    json_decref(entry);
    return out_of_memory();
  }
  if (json_object_set_new(writer->header, name, entry) != 0)
    return qm__fail(QM_E_ARGUMENT, "%s: the name '%s' is not UTF-8", writer->path, name);
  likes[writer->count++] = *like;
  writer->data_bytes = end;
  return QM_OK;
}

/* The length and the JSON, padded with spaces so that the data begins at a multiple of 8. */
static int32_t begin(qm_safetensors_writer *writer) {
  if (writer->begun) return QM_OK;
  char *text = json_dumps(writer->header, JSON_COMPACT);
  if (text == NULL) return out_of_memory();
  const size_t length = strlen(text), padded = (length + 7) / 8 * 8;
  unsigned char prefix[8];
  for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)padded >> (8 * i));
  writer->begun = true;
  int32_t status = qm_file_write(writer->file, prefix, sizeof prefix);
  if (status == QM_OK) status = qm_file_write(writer->file, text, (int64_t)length);
  if (status == QM_OK) status = qm_file_write(writer->file, "       ", (int64_t)(padded - length));
  free(text);
  return status;
}

/* From a device whose memory the host cannot read, in chunks by way of a buffer. */
static int32_t put_array(qm_safetensors_writer *writer, const qm_device *device,
                         const qm_array *array, int64_t size_bytes) {
  int32_t status = qm__graph_refuse(device, "reading a value back");
  if (status != QM_OK) return status;
  if (device->backend->host_memory) {
    status = device->backend->sync(device->context);
    return status != QM_OK ? status : qm_file_write(writer->file, array->data, size_bytes);
  }
  char *buffer = malloc(CHUNK_BYTES);
  if (buffer == NULL) return out_of_memory();
  for (int64_t at = 0; at < size_bytes && status == QM_OK; at += CHUNK_BYTES) {
    const int64_t rest = size_bytes - at, chunk = rest < CHUNK_BYTES ? rest : CHUNK_BYTES;
    status = device->backend->read(device->context, (const char *)array->data + at, buffer, chunk);
    if (status == QM_OK) status = qm_file_write(writer->file, buffer, chunk);
  }
  free(buffer);
  return status;
}

int32_t qm_safetensors_write(qm_safetensors_writer *writer, const qm_tensor *x) {
  if (writer == NULL) return qm__fail(QM_E_ARGUMENT, "qm_safetensors_writer: NULL");
  if (writer->failed || writer->written == writer->count)
    return qm__fail(QM_E_ARGUMENT, "%s: no further tensor is expected", writer->path);
  qm__call call = qm__begin("qm_safetensors_write");
  qm_array array;
  qm__operand(&call, "x", x, "any [...]", QM__READ, &array);
  if (qm__finish(&call) != QM_OK) return call.status;
  const qm_tensor *like = &writer->likes[writer->written];
  bool same = x->dtype == like->dtype && x->ndim == like->ndim;
  for (int32_t i = 0; i < x->ndim && same; i++) same = x->shape[i] == like->shape[i];
  char expected[128], got[128];
  qm__describe(like, expected, sizeof expected);
  qm__describe(x, got, sizeof got);
  qm__require(&call, same, "argument 'x': declared as %s, got %s", expected, got);
  if (call.status != QM_OK) return call.status;
  int32_t status = begin(writer);
  if (status == QM_OK)
    status = put_array(writer, call.device, &array, array.count * qm_dtype_size(array.dtype));
  writer->failed = status != QM_OK;
  if (status == QM_OK) writer->written++;
  return status;
}

int32_t qm_safetensors_commit(qm_safetensors_writer *writer) {
  if (writer == NULL) return qm__fail(QM_E_ARGUMENT, "qm_safetensors_writer: NULL");
  if (writer->written != writer->count)
    return qm__fail(QM_E_ARGUMENT, "%s: %lld of %lld tensors were written", writer->path,
                    (long long)writer->written, (long long)writer->count);
  const int32_t status = begin(writer);
  return status != QM_OK ? status : qm_file_commit(writer->file);
}

void qm_safetensors_writer_release(qm_safetensors_writer *writer) {
  if (writer == NULL) return;
  qm_file_release(writer->file);
  json_decref(writer->header);
  free(writer->likes);
  free(writer->path);
  free(writer);
  qm__handle_closed();
}
