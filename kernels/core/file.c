/* Files: see file.h. The silent mistake guarded here: reporting success before the bytes are on disk. */
#include "kernels/core/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "kernels/core/mem.h"

enum { PIECE = 1 << 25 };

#define SYS_FAIL(what, path)                                                                                 \
    LSA_FAIL(lsa_status_from_errno(errno), "cannot %s '%s': %s", what, path, strerror(errno))

lsa_status lsa_path(char out[LSA_PATH_MAX], lsa_err *err, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(out, LSA_PATH_MAX, fmt, ap);
    va_end(ap);
    if (n < 0 || n >= LSA_PATH_MAX - 8) LSA_RET_FAIL(LSA_E_ARG, "path too long: '%.200s...'", out);
    return LSA_OK;
}

bool lsa_exists(const char *path) {
    struct stat s;
    return stat(path, &s) == 0;
}

bool lsa_is_dir(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

lsa_status lsa_file_size(int64_t *out, const char *path, lsa_err *err) {
    struct stat s;
    *out = 0;
    if (stat(path, &s) != 0) LSA_RET_FAIL(LSA_E_IO, "cannot stat '%s': %s", path, strerror(errno));
    if (!S_ISREG(s.st_mode)) LSA_RET_FAIL(LSA_E_IO, "'%s' is not a regular file", path);
    *out = (int64_t)s.st_size;
    return LSA_OK;
}

lsa_status lsa_pread_all(int fd, void *dst, size_t n_bytes, int64_t offset, const char *what, lsa_err *err) {
    char *p = dst;
    while (n_bytes) {
        ssize_t n = pread(fd, p, n_bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) LSA_RET_FAIL(LSA_E_IO, "cannot read '%s': %s", what, strerror(errno));
        if (n == 0)
            LSA_RET_FAIL(LSA_E_FORMAT, "'%s' is truncated: %zu bytes missing at offset %lld", what, n_bytes,
                         (long long)offset);
        p += n;
        offset += n;
        n_bytes -= (size_t)n;
    }
    return LSA_OK;
}

lsa_status lsa_pwrite_all(int fd, const void *src, size_t n_bytes, int64_t offset, const char *what,
                          lsa_err *err) {
    const char *p = src;
    while (n_bytes) {
        const ssize_t n = pwrite(fd, p, n_bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) LSA_RET_FAIL(lsa_status_from_errno(errno), "cannot write '%s': %s", what, strerror(errno));
        p += n;
        offset += n;
        n_bytes -= (size_t)n;
    }
    return LSA_OK;
}

lsa_status lsa_read_file(char **out, size_t *n_bytes, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    int fd = -1;
    char *buf = NULL;
    int64_t size;
    *out = NULL;
    *n_bytes = 0;
    LSA_TRY(lsa_file_size(&size, path, err));
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) SYS_FAIL("open", path);
    LSA_TRY(lsa_alloc_((void **)&buf, size + 1, 1, path, err));
    LSA_TRY(lsa_pread_all(fd, buf, (size_t)size, 0, path, err));
    *out = buf;
    *n_bytes = (size_t)size;
    buf = NULL;
done:
    lsa_free(buf);
    if (fd >= 0) close(fd);
    return st;
}

static lsa_status fsync_parent(const char *path, lsa_err *err) {
    char dir[LSA_PATH_MAX];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (!slash)
        snprintf(dir, sizeof dir, ".");
    else if (slash == dir)
        dir[1] = 0;
    else
        *slash = 0;
    return lsa_fsync_path(dir, err);
}

lsa_status lsa_fsync_path(const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) SYS_FAIL("open", path);
    if (fsync(fd) != 0) SYS_FAIL("fsync", path);
done:
    if (fd >= 0) close(fd);
    return st;
}

lsa_status lsa_rename_durable(const char *from, const char *to, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (rename(from, to) != 0)
        LSA_FAIL(lsa_status_from_errno(errno), "cannot rename '%s' to '%s': %s", from, to, strerror(errno));
    LSA_TRY(fsync_parent(to, err));
done:
    return st;
}

lsa_status lsa_replace_dir(const char *from, const char *to, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (!lsa_exists(to)) return lsa_rename_durable(from, to, err);
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE) == 0) {
        LSA_TRY(fsync_parent(to, err));
        LSA_TRY(lsa_remove_tree(from, err));
    } else { /* a file system without exchange */
        LSA_TRY(lsa_remove_tree(to, err));
        LSA_TRY(lsa_rename_durable(from, to, err));
    }
done:
    return st;
}

lsa_status lsa_commit_begin(lsa_commit *c, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    c->fd = -1;
    c->n_bytes = 0;
    LSA_TRY(lsa_path(c->path, err, "%s", path));
    snprintf(c->tmp, sizeof c->tmp, "%.*s.tmp", LSA_PATH_MAX - 8, path);
    c->fd = open(c->tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (c->fd < 0) SYS_FAIL("create", c->tmp);
done:
    return st;
}

lsa_status lsa_commit_write(lsa_commit *c, const void *data, size_t n_bytes, lsa_err *err) {
    lsa_status st = LSA_OK;
    const char *p = data;
    while (n_bytes) {
        ssize_t n = write(c->fd, p, n_bytes < PIECE ? n_bytes : PIECE);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) SYS_FAIL("write", c->tmp);
        /* a large file starts on its way to the disk now, not at the fsync; a hint, so it may fail */
        if (n == PIECE) (void)sync_file_range(c->fd, c->n_bytes, n, SYNC_FILE_RANGE_WRITE);
        p += n;
        n_bytes -= (size_t)n;
        c->n_bytes += n;
    }
done:
    return st;
}

lsa_status lsa_commit_end(lsa_commit *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (fsync(c->fd) != 0) SYS_FAIL("fsync", c->tmp);
    int fd = c->fd;
    c->fd = -1;
    if (close(fd) != 0) SYS_FAIL("close", c->tmp);
    LSA_TRY(lsa_rename_durable(c->tmp, c->path, err));
    c->tmp[0] = 0;
done:
    if (st != LSA_OK) lsa_commit_abort(c);
    return st;
}

void lsa_commit_abort(lsa_commit *c) {
    int sys = errno;
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    if (c->tmp[0]) unlink(c->tmp);
    c->tmp[0] = 0;
    errno = sys;
}

lsa_status lsa_write_file(const char *path, const void *data, size_t n_bytes, lsa_err *err) {
    lsa_commit c;
    lsa_status st = lsa_commit_begin(&c, path, err);
    if (st != LSA_OK) return st;
    st = lsa_commit_write(&c, data, n_bytes, err);
    if (st != LSA_OK) {
        lsa_commit_abort(&c);
        return st;
    }
    return lsa_commit_end(&c, err);
}

lsa_status lsa_mkdirs(const char *path, lsa_err *err) {
    char p[LSA_PATH_MAX];
    lsa_status st = lsa_path(p, err, "%s", path);
    if (st != LSA_OK) return st;
    for (char *s = p + 1;; s++) {
        if (*s && *s != '/') continue;
        char keep = *s;
        *s = 0;
        if (mkdir(p, 0777) != 0 && !(errno == EEXIST && lsa_is_dir(p)))
            LSA_RET_FAIL(lsa_status_from_errno(errno), "cannot create directory '%s': %s", p,
                         strerror(errno));
        *s = keep;
        if (!keep) return LSA_OK;
    }
}

lsa_status lsa_remove_tree(const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    DIR *d = NULL;
    struct stat s;
    if (lstat(path, &s) != 0) {
        if (errno == ENOENT) return LSA_OK;
        SYS_FAIL("stat", path);
    }
    if (!S_ISDIR(s.st_mode)) {
        if (unlink(path) != 0) SYS_FAIL("remove", path);
        return LSA_OK;
    }
    d = opendir(path);
    if (!d) SYS_FAIL("open", path);
    for (struct dirent *e; (e = readdir(d));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        char sub[LSA_PATH_MAX];
        LSA_TRY(lsa_path(sub, err, "%s/%s", path, e->d_name));
        LSA_TRY(lsa_remove_tree(sub, err));
    }
    if (rmdir(path) != 0) SYS_FAIL("remove", path);
done:
    if (d) closedir(d);
    return st;
}

lsa_status lsa_disk_free(int64_t *out, const char *path, lsa_err *err) {
    char p[LSA_PATH_MAX];
    struct statvfs v;
    *out = 0;
    lsa_status st = lsa_path(p, err, "%s", path);
    if (st != LSA_OK) return st;
    while (!lsa_exists(p)) {
        char *slash = strrchr(p, '/');
        if (!slash) {
            snprintf(p, sizeof p, ".");
            break;
        }
        if (slash == p) {
            p[1] = 0;
            break;
        }
        *slash = 0;
    }
    if (statvfs(p, &v) != 0) LSA_RET_FAIL(LSA_E_IO, "cannot read free space of '%s': %s", p, strerror(errno));
    *out = (int64_t)v.f_bavail * (int64_t)v.f_frsize;
    return LSA_OK;
}

lsa_status lsa_map_open(lsa_map *out, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    int fd = -1;
    int64_t size;
    out->data = NULL;
    out->n_bytes = 0;
    LSA_TRY(lsa_file_size(&size, path, err));
    if (size == 0) goto done;
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) SYS_FAIL("open", path);
    void *p = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) SYS_FAIL("map", path);
    out->data = p;
    out->n_bytes = (size_t)size;
done:
    if (fd >= 0) close(fd);
    return st;
}

void lsa_map_close(lsa_map *m) {
    union {
        const unsigned char *c;
        void *v;
    } u = {.c = m->data};
    if (m->data) munmap(u.v, m->n_bytes);
    m->data = NULL;
    m->n_bytes = 0;
}

lsa_status lsa_lock_dir(int *fd, const char *dir, lsa_err *err) {
    char p[LSA_PATH_MAX];
    *fd = -1;
    lsa_status st = lsa_path(p, err, "%s/.lock", dir);
    if (st != LSA_OK) return st;
    int f = open(p, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (f < 0) LSA_RET_FAIL(lsa_status_from_errno(errno), "cannot create '%s': %s", p, strerror(errno));
    if (flock(f, LOCK_EX | LOCK_NB) != 0) {
        close(f);
        LSA_RET_FAIL(LSA_E_IO, "'%s' is in use by another lsa process; wait for it or stop it", dir);
    }
    *fd = f;
    return LSA_OK;
}

void lsa_unlock(int fd) {
    if (fd >= 0) close(fd);
}
