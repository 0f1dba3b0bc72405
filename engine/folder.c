/* folder.c - folders: what writing a checkpoint as one whole needs. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

static int32_t fail_path(const char *path) {
  return qm__fail(QM_E_IO, "%s: %s", path, strerror(errno));
}

/* One level: made, or there already. */
static bool make_one(const char *path) {
  struct stat found;
  return mkdir(path, 0777) == 0 ||
         (errno == EEXIST && stat(path, &found) == 0 && S_ISDIR(found.st_mode));
}

int32_t qm_folder_create(const char *path) {
  if (path == NULL || path[0] == '\0') return qm__fail(QM_E_ARGUMENT, "qm_folder_create: no path");
  char *partial = strdup(path);
  if (partial == NULL) return qm__fail(QM_E_MEMORY, "the host is out of memory");
  bool made = true;
  for (char *at = partial + 1; *at != '\0' && made; at++) {
    if (*at != '/') continue;
    *at = '\0';
    made = make_one(partial);
    *at = '/';
  }
  made = made && make_one(partial);
  const int32_t status = made ? QM_OK : fail_path(path);
  free(partial);
  return status;
}

static bool is_dots(const char *name) { return strcmp(name, ".") == 0 || strcmp(name, "..") == 0; }

int32_t qm_folder_list(const char *path, char *names, int64_t size_bytes, int64_t *needed_bytes) {
  if (path == NULL || needed_bytes == NULL || (names == NULL && size_bytes > 0))
    return qm__fail(QM_E_ARGUMENT, "qm_folder_list: NULL");
  DIR *folder = opendir(path);
  if (folder == NULL) return fail_path(path);
  *needed_bytes = 0;
  for (const struct dirent *entry; (entry = readdir(folder)) != NULL;) {
    if (is_dots(entry->d_name)) continue;
    const int64_t length = (int64_t)strlen(entry->d_name) + 1;
    if (*needed_bytes + length <= size_bytes)
      memcpy(names + *needed_bytes, entry->d_name, (size_t)length);
    *needed_bytes += length;
  }
  closedir(folder);
  return QM_OK;
}

int32_t qm_folder_rename(const char *from, const char *to) {
  if (from == NULL || to == NULL) return qm__fail(QM_E_ARGUMENT, "qm_folder_rename: NULL");
  struct stat found;
  if (lstat(to, &found) == 0) return qm__fail(QM_E_IO, "%s: is there already", to);
  if (rename(from, to) != 0) return qm__fail(QM_E_IO, "%s to %s: %s", from, to, strerror(errno));
  return qm__sync_parent(to);
}

int32_t qm_folder_remove(const char *path) {
  if (path == NULL) return qm__fail(QM_E_ARGUMENT, "qm_folder_remove: NULL");
  const int descriptor = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  DIR *folder = descriptor < 0 ? NULL : fdopendir(descriptor);
  if (folder == NULL) {
    const int32_t status = fail_path(path);
    if (descriptor >= 0) close(descriptor);
    return status;
  }
  for (const struct dirent *entry; (entry = readdir(folder)) != NULL;)
    if (!is_dots(entry->d_name)) unlinkat(descriptor, entry->d_name, 0); /* rmdir says what stays */
  closedir(folder);
  return rmdir(path) == 0 ? QM_OK : fail_path(path);
}
