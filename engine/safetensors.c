/* safetensors.c - reading safetensors files, checked from end to end before any use.
**
** The header is read into memory, values straight to where they go. Nothing is mapped: a file that
** somebody truncates while it is open gives an error then, and not SIGBUS; nor do its pages count
** as the process's memory.
**
** Source: https://huggingface.co/docs/safetensors, format section: a u64 little-endian header
** length, that many bytes of JSON, then the data. We refuse what the reference implementation
** refuses: duplicate names, holes, overlaps, trailing bytes, headers over 100 MB.
*/
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

enum { LENGTH_BYTES = 8, HEADER_BYTES_MAX = 100000000 };

typedef struct entry {
  const char *name; /* lives in the JSON */
  const qm__file_type *type;
  qm_tensor like;     /* dtype -1 where no tensor of ours can hold it */
  size_t ndim;        /* the file's, which may exceed ours */
  int64_t begin, end; /* bytes, from the end of the header */
} entry;

typedef struct metadata_pair {
  const char *key, *value;
} metadata_pair;

struct qm_safetensors {
  json_t *header;
  metadata_pair *metadata; /* its strings live in the JSON */
  int64_t metadata_count;
  entry *entries; /* in the order of their data */
  int64_t count;
  const char *bytes; /* the whole file where it lies in memory, or NULL: then it is read from */
  int descriptor;
  int64_t data_offset; /* of the data, from the start of the file */
};

static const qm__file_type file_types[] = {
    {"F32", QM_F32, 4}, {"F16", QM_F16, 2}, {"BF16", QM_BF16, 2}, {"I8", QM_I8, 1},
    {"U8", QM_U8, 1},   {"I16", QM_I16, 2}, {"I32", QM_I32, 4},   {"I64", QM_I64, 8},
    {"F64", -1, 8},     {"BOOL", -1, 1},    {"U16", -1, 2},       {"U32", -1, 4},
    {"U64", -1, 8},     {"C64", -1, 8},     {"F8_E4M3", -1, 1},   {"F8_E5M2", -1, 1},
    {"F8_E8M0", -1, 1},
};
enum { FILE_TYPE_COUNT = sizeof file_types / sizeof *file_types };

const qm__file_type *qm__file_type_named(const char *name) {
  for (size_t i = 0; i < FILE_TYPE_COUNT; i++)
    if (strcmp(file_types[i].name, name) == 0) return &file_types[i];
  return NULL;
}

const qm__file_type *qm__file_type_of(int32_t dtype) {
  for (size_t i = 0; i < FILE_TYPE_COUNT && dtype >= 0; i++)
    if (file_types[i].dtype == dtype) return &file_types[i];
  return NULL;
}

/* ---- checking the header ---- */

/* "shape" of one tensor: fills in the extents and the bytes that they take. */
static int32_t parse_shape(const json_t *shape, entry *e, int64_t *size_bytes) {
  if (!json_is_array(shape))
    return qm__fail(QM_E_IO, "tensor '%s': its shape is not a list", e->name);
  e->ndim = json_array_size(shape);
  int64_t bytes = e->type->size_bytes;
  bool fits = true, empty = false;
  for (size_t i = 0; i < e->ndim; i++) {
    const json_t *extent = json_array_get(shape, i);
    if (!json_is_integer(extent) || json_integer_value(extent) < 0)
      return qm__fail(QM_E_IO, "tensor '%s': extent %zu of its shape is not a whole number from 0",
                      e->name, i + 1);
    const int64_t value = json_integer_value(extent);
    if (i < QM_DIMS_MAX) e->like.shape[i] = value;
    empty = empty || value == 0;
    fits = fits && !__builtin_mul_overflow(bytes, value, &bytes);
  }
  if (!fits && !empty)
    return qm__fail(QM_E_IO, "tensor '%s': its shape has more than 2^63 bytes", e->name);
  *size_bytes = empty ? 0 : bytes;
  e->like.ndim = e->ndim > QM_DIMS_MAX ? 0 : (int32_t)e->ndim;
  e->like.dtype = e->ndim > QM_DIMS_MAX ? -1 : e->type->dtype;
  return QM_OK;
}

static int32_t parse_entry(const char *name, const json_t *value, int64_t data_bytes, entry *e) {
  *e = (entry){.name = name};
  if (!json_is_object(value))
    return qm__fail(QM_E_IO, "tensor '%s': its header entry is not an object", name);
  const char *type = json_string_value(json_object_get(value, "dtype"));
  if (type == NULL) return qm__fail(QM_E_IO, "tensor '%s': its dtype is not a string", name);
  e->type = qm__file_type_named(type);
  if (e->type == NULL) return qm__fail(QM_E_IO, "tensor '%s': unknown dtype '%s'", name, type);
  int64_t size_bytes = 0;
  const int32_t status = parse_shape(json_object_get(value, "shape"), e, &size_bytes);
  if (status != QM_OK) return status;
  const json_t *offsets = json_object_get(value, "data_offsets");
  const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
    return qm__fail(QM_E_IO, "tensor '%s': its data_offsets are not two whole numbers", name);
  e->begin = json_integer_value(begin);
  e->end = json_integer_value(end);
  if (e->begin < 0 || e->end < e->begin || e->end > data_bytes)
    return qm__fail(QM_E_IO, "tensor '%s': bytes %lld to %lld lie outside the file's %lld of data",
                    name, (long long)e->begin, (long long)e->end, (long long)data_bytes);
  if (e->end - e->begin != size_bytes)
    return qm__fail(QM_E_IO, "tensor '%s': its shape takes %lld bytes, its data_offsets hold %lld",
                    name, (long long)size_bytes, (long long)(e->end - e->begin));
  return QM_OK;
}

static int32_t parse_metadata(qm_safetensors *file, json_t *metadata) {
  if (metadata == NULL) return QM_OK;
  if (!json_is_object(metadata)) return qm__fail(QM_E_IO, "__metadata__ is not an object");
  file->metadata = calloc(json_object_size(metadata) + 1, sizeof *file->metadata);
  if (file->metadata == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  const char *key;
  json_t *value;
  json_object_foreach(metadata, key, value) {
    if (!json_is_string(value))
      return qm__fail(QM_E_IO, "__metadata__: the value of '%s' is not a string", key);
    file->metadata[file->metadata_count++] = (metadata_pair){key, json_string_value(value)};
  }
  return QM_OK;
}

/* Empty tensors come before the one that begins where they lie; equals by name, for one order. */
static int by_data(const void *a, const void *b) {
  const entry *left = a, *right = b;
  if (left->begin != right->begin) return left->begin < right->begin ? -1 : 1;
  if (left->end != right->end) return left->end < right->end ? -1 : 1;
  return strcmp(left->name, right->name);
}

/* The tensors, one after the other, must be the data: no hole, no overlap, nothing behind. */
static int32_t check_coverage(const qm_safetensors *file, int64_t data_bytes) {
  int64_t covered = 0;
  for (int64_t i = 0; i < file->count; i++) {
    const entry *e = &file->entries[i];
    if (e->begin < covered)
      return qm__fail(QM_E_IO, "tensor '%s' begins at byte %lld, inside tensor '%s'", e->name,
                      (long long)e->begin, file->entries[i - 1].name);
    if (e->begin > covered)
      return qm__fail(QM_E_IO, "bytes %lld to %lld of the data belong to no tensor",
                      (long long)covered, (long long)e->begin);
    covered = e->end;
  }
  if (covered != data_bytes)
    return qm__fail(QM_E_IO, "%lld bytes behind the last tensor",
                    (long long)(data_bytes - covered));
  return QM_OK;
}

static int32_t parse_header(qm_safetensors *file, const char *text, int64_t header_bytes,
                            int64_t data_bytes) {
  json_error_t error;
  file->header = json_loadb(text, (size_t)header_bytes, JSON_REJECT_DUPLICATES, &error);
  if (file->header == NULL)
    return qm__fail(QM_E_IO, "the header is not JSON: %s (byte %d)", error.text, error.position);
  if (!json_is_object(file->header)) return qm__fail(QM_E_IO, "the header is not a JSON object");
  json_t *metadata = json_object_get(file->header, "__metadata__");
  int32_t status = parse_metadata(file, metadata);
  if (status != QM_OK) return status;
  file->entries = calloc(json_object_size(file->header) + 1, sizeof *file->entries);
  if (file->entries == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  const char *name;
  json_t *value;
  json_object_foreach(file->header, name, value) {
    if (value == metadata) continue;
    status = parse_entry(name, value, data_bytes, &file->entries[file->count++]);
    if (status != QM_OK) return status;
  }
  qsort(file->entries, (size_t)file->count, sizeof *file->entries, by_data);
  return check_coverage(file, data_bytes);
}

/* The header's length, from the file's first bytes. */
static int32_t header_length(const char *bytes, int64_t size_bytes, int64_t *header_bytes) {
  if (size_bytes < LENGTH_BYTES)
    return qm__fail(QM_E_IO, "%lld bytes are too few for a safetensors file",
                    (long long)size_bytes);
  uint64_t length = 0;
  for (int i = 0; i < LENGTH_BYTES; i++) length |= (uint64_t)(unsigned char)bytes[i] << (8 * i);
  if (length > (uint64_t)(size_bytes - LENGTH_BYTES))
    return qm__fail(QM_E_IO,
                    "a header of %llu bytes in a file of %lld: truncated, or no safetensors",
                    (unsigned long long)length, (long long)size_bytes);
  if (length > HEADER_BYTES_MAX)
    return qm__fail(QM_E_IO, "a header of %llu bytes; the format allows %d",
                    (unsigned long long)length, HEADER_BYTES_MAX);
  *header_bytes = (int64_t)length;
  return QM_OK;
}

/* A handle from the header's text, of a file of so many bytes; it holds neither. */
static int32_t file_new(const char *header, int64_t header_bytes, int64_t size_bytes,
                        qm_safetensors **out) {
  qm_safetensors *file = calloc(1, sizeof *file);
  if (file == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  qm__handle_opened();
  file->descriptor = -1;
  file->data_offset = LENGTH_BYTES + header_bytes;
  const int32_t status = parse_header(file, header, header_bytes, size_bytes - file->data_offset);
  if (status != QM_OK)
    qm_safetensors_release(file);
  else
    *out = file;
  return status;
}

int32_t qm__safetensors_parse(const char *bytes, int64_t size_bytes, qm_safetensors **out) {
  int64_t header_bytes = 0;
  int32_t status = header_length(bytes, size_bytes, &header_bytes);
  if (status == QM_OK) status = file_new(bytes + LENGTH_BYTES, header_bytes, size_bytes, out);
  if (status == QM_OK) (*out)->bytes = bytes;
  return status;
}

/* ---- the handle ---- */

/* Exactly these bytes of a file. */
static int32_t read_at(int descriptor, void *out, int64_t size_bytes, int64_t offset) {
  int64_t done = 0;
  while (done < size_bytes) {
    const ssize_t got =
        pread(descriptor, (char *)out + done, (size_t)(size_bytes - done), offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return qm__fail(QM_E_IO, "%s", strerror(errno));
    if (got == 0)
      return qm__fail(QM_E_IO, "it ends at byte %lld: truncated while it was open",
                      (long long)(offset + done));
    done += got;
  }
  return QM_OK;
}

static int32_t read_header(int descriptor, qm_safetensors **out) {
  struct stat about;
  if (fstat(descriptor, &about) != 0 || !S_ISREG(about.st_mode))
    return qm__fail(QM_E_IO, "not a regular file");
  char length[LENGTH_BYTES];
  const int64_t size_bytes = about.st_size;
  int64_t header_bytes = 0;
  int32_t status = QM_OK;
  if (size_bytes >= LENGTH_BYTES) status = read_at(descriptor, length, sizeof length, 0);
  if (status == QM_OK) status = header_length(length, size_bytes, &header_bytes);
  if (status != QM_OK) return status;
  char *header = malloc((size_t)header_bytes + 1);
  if (header == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  status = read_at(descriptor, header, header_bytes, LENGTH_BYTES);
  if (status == QM_OK) status = file_new(header, header_bytes, size_bytes, out);
  free(header);
  return status;
}

int32_t qm_safetensors_open(const char *path, qm_safetensors **out) {
  if (path == NULL || out == NULL) return qm__fail(QM_E_ARGUMENT, "qm_safetensors_open: NULL");
  const int descriptor = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* a pipe must not wait */
  int32_t status = descriptor < 0 ? qm__fail(QM_E_IO, "%s", strerror(errno)) : QM_OK;
  qm_safetensors *file = NULL;
  if (status == QM_OK) status = read_header(descriptor, &file);
  if (status != QM_OK) {
    if (descriptor >= 0) close(descriptor);
    qm__prefix_error(path);
    return status;
  }
  file->descriptor = descriptor;
  *out = file;
  return QM_OK;
}

void qm_safetensors_release(qm_safetensors *file) {
  if (file == NULL) return;
  json_decref(file->header);
  free(file->entries);
  free(file->metadata);
  if (file->descriptor >= 0) close(file->descriptor);
  free(file);
  qm__handle_closed();
}

int64_t qm_safetensors_count(const qm_safetensors *file) { return file == NULL ? 0 : file->count; }

static const entry *entry_at(const qm_safetensors *file, int64_t index) {
  return file == NULL || index < 0 || index >= file->count ? NULL : &file->entries[index];
}

int32_t qm_safetensors_entry(const qm_safetensors *file, int64_t index, const char **name,
                             qm_tensor *out) {
  const entry *e = entry_at(file, index);
  if (e == NULL || name == NULL || out == NULL)
    return qm__fail(QM_E_ARGUMENT, "argument 'index': the file holds no tensor %lld",
                    (long long)index);
  *name = e->name;
  *out = e->like;
  return QM_OK;
}

int32_t qm_safetensors_metadata(const qm_safetensors *file, int64_t index, const char **key,
                                const char **value) {
  if (file == NULL || index < 0 || index >= file->metadata_count || key == NULL || value == NULL)
    return qm__fail(QM_E_ARGUMENT, "argument 'index': past the end of the metadata");
  *key = file->metadata[index].key;
  *value = file->metadata[index].value;
  return QM_OK;
}

enum { PIECE_BYTES = 16 << 20 };

/* Values from a file to a device that cannot be read into: by way of the host, piece by piece. */
static int32_t read_across(const qm_safetensors *file, const entry *e, qm_device *device,
                           char *out) {
  const int64_t size_bytes = e->end - e->begin;
  const int64_t room = size_bytes < PIECE_BYTES ? size_bytes : PIECE_BYTES;
  char *piece = malloc((size_t)room);
  if (piece == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  int32_t status = QM_OK;
  for (int64_t at = 0; at < size_bytes && status == QM_OK; at += room) {
    const int64_t bytes = size_bytes - at < room ? size_bytes - at : room;
    status = read_at(file->descriptor, piece, bytes, file->data_offset + e->begin + at);
    if (status == QM_OK) status = device->backend->write(device->context, out + at, piece, bytes);
  }
  free(piece);
  return status;
}

static int32_t read_values(const qm_safetensors *file, const entry *e, const qm_tensor *out) {
  const int64_t size_bytes = e->end - e->begin, from = file->data_offset + e->begin;
  if (file->bytes != NULL) return qm_write(out, file->bytes + from, size_bytes);
  qm__call call = qm__begin("qm_safetensors_read");
  qm_array array;
  qm__operand(&call, "out", out, "any [...]", QM__WRITE, &array);
  if (qm__finish(&call) != QM_OK || size_bytes == 0) return call.status;
  if (qm__graph_refuse(call.device, "reading a file into it") != QM_OK) return QM_E_ARGUMENT;
  if (call.device->backend->host_memory)
    return read_at(file->descriptor, array.data, size_bytes, from);
  return read_across(file, e, call.device, array.data);
}

int32_t qm_safetensors_read(const qm_safetensors *file, int64_t index, const qm_tensor *out) {
  const entry *e = entry_at(file, index);
  if (e == NULL || out == NULL)
    return qm__fail(QM_E_ARGUMENT, "argument 'index': the file holds no tensor %lld",
                    (long long)index);
  if (e->like.dtype < 0)
    return qm__fail(QM_E_UNSUPPORTED, "tensor '%s': no tensor here holds %s of %zu dimensions",
                    e->name, e->type->name, e->ndim);
  bool same = out->dtype == e->like.dtype && out->ndim == e->like.ndim;
  for (int32_t i = 0; i < e->like.ndim && same; i++) same = out->shape[i] == e->like.shape[i];
  if (!same) {
    char expected[128], got[128];
    qm__describe(&e->like, expected, sizeof expected);
    qm__describe(out, got, sizeof got);
    return qm__fail(QM_E_ARGUMENT, "argument 'out': tensor '%s' is %s, got %s", e->name, expected,
                    got);
  }
  const int32_t status = read_values(file, e, out);
  if (status == QM_E_IO) {
    char words[300];
    (void)snprintf(words, sizeof words, "tensor '%s'", e->name);
    qm__prefix_error(words);
  }
  return status;
}
