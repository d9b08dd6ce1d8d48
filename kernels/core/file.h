/* Files: whole reads, read-only maps, and the commit order that never leaves a half-written final name.
 *
 * DURABLE: a final name always means complete: write "<path>.tmp" in the same directory, fsync, close,
 * rename, fsync the directory. "*.tmp" is garbage by definition. A failed fsync is never retried. All
 * functions are thread-safe on different paths. */
#ifndef LSA_KERNELS_CORE_FILE_H
#define LSA_KERNELS_CORE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

#define LSA_PATH_MAX 4096

/* out = printf-formatted path; LSA_E_ARG if it does not fit. */
LSA_NODISCARD lsa_status lsa_path(char out[LSA_PATH_MAX], lsa_err *err, const char *fmt, ...)
    LSA_PRINTF(3, 4);

bool lsa_exists(const char *path);
bool lsa_is_dir(const char *path);
LSA_NODISCARD lsa_status lsa_file_size(int64_t *out, const char *path, lsa_err *err);

/* Whole file into fresh memory, with a zero byte after it (not counted). The caller frees it by lsa_free. */
LSA_NODISCARD lsa_status lsa_read_file(char **out, size_t *n_bytes, const char *path, lsa_err *err);

/* Commits n_bytes as `path` in the order above. */
LSA_NODISCARD lsa_status lsa_write_file(const char *path, const void *data, size_t n_bytes, lsa_err *err);

/* Streaming form of the same: write parts, then commit or abort. */
typedef struct lsa_commit {
    int fd;
    int64_t n_bytes; /* written so far */
    char path[LSA_PATH_MAX], tmp[LSA_PATH_MAX];
} lsa_commit;
LSA_NODISCARD lsa_status lsa_commit_begin(lsa_commit *c, const char *path, lsa_err *err);
LSA_NODISCARD lsa_status lsa_commit_write(lsa_commit *c, const void *data, size_t n_bytes, lsa_err *err);
LSA_NODISCARD lsa_status lsa_commit_end(lsa_commit *c, lsa_err *err); /* fsync, rename, fsync directory */
void lsa_commit_abort(lsa_commit *c); /* removes the temporary; safe after end */

/* fsync of an existing file or directory. */
LSA_NODISCARD lsa_status lsa_fsync_path(const char *path, lsa_err *err);
/* Renames (replacing) and fsyncs the directory of `to`. */
LSA_NODISCARD lsa_status lsa_rename_durable(const char *from, const char *to, lsa_err *err);
/* Puts the finished directory `from` at `to`, in the place of a directory that stands there (exchanged, then
 * removed, where the file system can). */
LSA_NODISCARD lsa_status lsa_replace_dir(const char *from, const char *to, lsa_err *err);
/* mkdir -p. */
LSA_NODISCARD lsa_status lsa_mkdirs(const char *path, lsa_err *err);
/* Removes a file or a whole directory tree; a missing path is success. */
LSA_NODISCARD lsa_status lsa_remove_tree(const char *path, lsa_err *err);
/* Bytes available to us on the file system that holds `path` (or its nearest existing parent). */
LSA_NODISCARD lsa_status lsa_disk_free(int64_t *out, const char *path, lsa_err *err);

/* pread that retries EINTR and treats a short read as LSA_E_FORMAT (truncated), naming `what`. */
LSA_NODISCARD lsa_status lsa_pread_all(int fd, void *dst, size_t n_bytes, int64_t offset, const char *what,
                                       lsa_err *err);

/* pwrite of everything; the status tells a full disk from other failures. */
LSA_NODISCARD lsa_status lsa_pwrite_all(int fd, const void *src, size_t n_bytes, int64_t offset,
                                        const char *what, lsa_err *err);

/* Read-only map of a whole file. An empty file gives data = NULL, n_bytes = 0. */
typedef struct lsa_map {
    const unsigned char *data;
    size_t n_bytes;
} lsa_map;
LSA_NODISCARD lsa_status lsa_map_open(lsa_map *out, const char *path, lsa_err *err);
void lsa_map_close(lsa_map *m);

/* Exclusive lock on "<dir>/.lock": one writer per target. Released by lsa_unlock or process end. */
LSA_NODISCARD lsa_status lsa_lock_dir(int *fd, const char *dir, lsa_err *err);
void lsa_unlock(int fd);

#endif
