/* file.c - writing files so that a kill at any instant leaves the old file or the new one, whole.
**
** Everything goes to "<path>.partial", which commit syncs and renames. The name is always the same,
** so that killed runs leave one stale file at most; a lock keeps two writers apart.
*/
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

enum { TRIES = 100 };

struct qm_file {
  char *path, *partial_path;
  int descriptor; /* -1 once closed */
  bool failed;    /* what was written cannot be trusted */
};

/* Open and lock the partial file. It may be renamed away between the two calls, when another
** writer commits; then what we hold is no longer the partial file, and we try again. */
static int32_t open_partial(qm_file *file) {
  const int flags = O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  for (int i = 0; i < TRIES; i++) {
    const int descriptor = open(file->partial_path, flags, 0666);
    if (descriptor < 0) return qm__fail(QM_E_IO, "%s: %s", file->partial_path, strerror(errno));
    if (flock(descriptor, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      close(descriptor);
      return qm__fail(QM_E_IO, "%s: somebody else is writing it", file->partial_path);
    }
    struct stat held, named;
    const bool ours = fstat(descriptor, &held) == 0 && S_ISREG(held.st_mode) &&
                      stat(file->partial_path, &named) == 0 && held.st_ino == named.st_ino &&
                      held.st_dev == named.st_dev;
    if (ours && ftruncate(descriptor, 0) == 0) {
      file->descriptor = descriptor;
      return QM_OK;
    }
    close(descriptor);
  }
  return qm__fail(QM_E_IO, "%s: cannot be opened for writing", file->partial_path);
}

int32_t qm_file_create(const char *path, qm_file **out) {
  if (path == NULL || out == NULL) return qm__fail(QM_E_ARGUMENT, "qm_file_create: NULL");
  qm_file *file = calloc(1, sizeof *file);
  if (file == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  qm__handle_opened();
  file->descriptor = -1;
  const size_t room = strlen(path) + sizeof ".partial";
  file->path = strdup(path);
  file->partial_path = malloc(room);
  int32_t status = QM_OK;
  if (file->path == NULL || file->partial_path == NULL) {
    status = qm__fail(QM_E_MEMORY, "the host is out of memory");
  } else {
    snprintf(file->partial_path, room, "%s.partial", path);
    status = open_partial(file);
  }
  if (status != QM_OK) {
    qm_file_release(file);
    return status;
  }
  *out = file;
  return QM_OK;
}

int32_t qm_file_write(qm_file *file, const void *bytes, int64_t size_bytes) {
  if (file == NULL || (bytes == NULL && size_bytes > 0) || size_bytes < 0)
    return qm__fail(QM_E_ARGUMENT, "qm_file_write: NULL");
  if (file->descriptor < 0 || file->failed)
    return qm__fail(QM_E_ARGUMENT, "%s: it is closed, or writing failed before", file->path);
  const char *at = bytes;
  while (size_bytes > 0) {
    const ssize_t count = write(file->descriptor, at, (size_t)size_bytes);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      file->failed = true;
      return qm__fail(QM_E_IO, "%s: %s", file->partial_path, strerror(count < 0 ? errno : ENOSPC));
    }
    at += count;
    size_bytes -= count;
  }
  return QM_OK;
}

int32_t qm__sync_parent(const char *path) {
  const char *slash = strrchr(path, '/');
  char *folder = slash == NULL   ? strdup(".")
                 : slash == path ? strdup("/")
                                 : strndup(path, (size_t)(slash - path));
  if (folder == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  const int descriptor = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  int32_t status = QM_OK;
  /* Some file systems cannot sync a folder and say EINVAL; then there is nothing to wait for. */
  if (descriptor < 0 || (fsync(descriptor) != 0 && errno != EINVAL))
    status = qm__fail(QM_E_IO, "%s: %s", folder, strerror(errno));
  if (descriptor >= 0) close(descriptor);
  free(folder);
  return status;
}

int32_t qm_file_commit(qm_file *file) {
  if (file == NULL) return qm__fail(QM_E_ARGUMENT, "qm_file_commit: NULL");
  if (file->descriptor < 0 || file->failed)
    return qm__fail(QM_E_ARGUMENT, "%s: it is closed, or writing failed before", file->path);
  if (fsync(file->descriptor) != 0) {
    file->failed = true;
    return qm__fail(QM_E_IO, "%s: %s", file->partial_path, strerror(errno));
  }
  if (rename(file->partial_path, file->path) != 0)
    return qm__fail(QM_E_IO, "%s: %s", file->path, strerror(errno));
  close(file->descriptor);
  file->descriptor = -1;
  return qm__sync_parent(file->path);
}

void qm_file_release(qm_file *file) {
  if (file == NULL) return;
  if (file->descriptor >= 0) {
    unlink(file->partial_path); /* before the lock goes */
    close(file->descriptor);
  }
  free(file->partial_path);
  free(file->path);
  free(file);
  qm__handle_closed();
}
