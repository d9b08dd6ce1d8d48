/* HDF5: see h5.h. DURABLE: H5Fclose can report success after lost writes, so the caller reads the file back
 * and compares hashes before the final name exists. */
#include "data/h5.h"

#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "data/shard_internal.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

#define STR_BYTES 96

static pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER;

void lsa_h5_init(void) {
    H5dont_atexit();
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

int64_t lsa_h5_type_bytes(lsa_h5_type t) {
    static const int64_t n[] = {1, 4, 8, 8, 2, 4, 2, STR_BYTES};
    return n[t];
}

static const char *type_name(lsa_h5_type t) {
    static const char *const n[] = {"u8", "i32", "i64", "u64", "u16", "f32", "f16", "str96"};
    return n[t];
}

/* A fresh datatype handle; the caller closes it. */
static hid_t make_type(lsa_h5_type t) {
    hid_t h;
    switch (t) {
    case LSA_H5_U8:
        return H5Tcopy(H5T_STD_U8LE);
    case LSA_H5_I32:
        return H5Tcopy(H5T_STD_I32LE);
    case LSA_H5_I64:
        return H5Tcopy(H5T_STD_I64LE);
    case LSA_H5_U64:
        return H5Tcopy(H5T_STD_U64LE);
    case LSA_H5_U16:
        return H5Tcopy(H5T_STD_U16LE);
    case LSA_H5_F32:
        return H5Tcopy(H5T_IEEE_F32LE);
    case LSA_H5_F16:
        h = H5Tcopy(H5T_IEEE_F32LE);
        H5Tset_fields(h, 15, 10, 5, 0, 10);
        H5Tset_size(h, 2);
        H5Tset_ebias(h, 15);
        return h;
    case LSA_H5_STR:
        h = H5Tcopy(H5T_C_S1);
        H5Tset_size(h, STR_BYTES);
        H5Tset_strpad(h, H5T_STR_NULLPAD);
        return h;
    }
    return H5I_INVALID_HID;
}

static herr_t first_error(unsigned n, const H5E_error2_t *e, void *user) {
    if (n == 0) snprintf(user, 160, "%s: %s", e->func_name, e->desc);
    return 0;
}

static const char *h5_text(char buf[160]) {
    snprintf(buf, 160, "no detail");
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, first_error, buf);
    H5Eclear2(H5E_DEFAULT);
    return buf;
}

/* ---- writer ---- */

struct lsa_h5_writer {
    hid_t file;
    int fd; /* the same file, for the bytes of datasets */
    bool failed;
    lsa_err first;
    char path[LSA_PATH_MAX];
};

static lsa_status poison(lsa_h5_writer *w, lsa_status st, lsa_err *err, const lsa_err *own) {
    if (!w->failed) {
        w->failed = true;
        w->first = *own;
    }
    if (err && err->code == LSA_OK) *err = w->first;
    return w->first.code != LSA_OK ? w->first.code : st;
}

/* HDF5 hides errno; a full disk shows as a failed write with errno left behind. */
static lsa_status io_code(void) {
    int sys = errno;
    return sys ? lsa_status_from_errno(sys) : LSA_E_IO;
}

lsa_status lsa_h5_create(lsa_h5_writer **out, const char *path, int64_t head_bytes, lsa_err *err) {
    lsa_h5_writer *w = NULL;
    char why[160];
    *out = NULL;
    lsa_status st = LSA_NEW(w, 1, err);
    if (st != LSA_OK) return st;
    snprintf(w->path, sizeof w->path, "%s", path);
    pthread_mutex_lock(&g_lock);
    errno = 0;
    hid_t fcpl = H5Pcreate(H5P_FILE_CREATE), fapl = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_obj_track_times(fcpl, false);
    H5Pset_meta_block_size(fapl, (hsize_t)head_bytes);
    H5Pset_small_data_block_size(fapl, 0);
    w->file = H5Fcreate(path, H5F_ACC_TRUNC, fcpl, fapl);
    H5Pclose(fapl);
    H5Pclose(fcpl);
    if (w->file < 0)
        st = lsa_err_set(err, io_code(), __FILE__, __LINE__, "cannot create '%s': %s", path, h5_text(why));
    pthread_mutex_unlock(&g_lock);
    if (st != LSA_OK) {
        lsa_free(w);
        return st;
    }
    w->fd = open(path, O_WRONLY | O_CLOEXEC);
    if (w->fd < 0) {
        lsa_err own = {0};
        st = lsa_err_set(&own, lsa_status_from_errno(errno), __FILE__, __LINE__, "cannot open '%s': %s", path,
                         strerror(errno));
        st = poison(w, st, err, &own);
        const lsa_status closed = lsa_h5_finish(w, NULL);
        return closed != LSA_OK ? closed : st;
    }
    *out = w;
    return LSA_OK;
}

static lsa_status put_attr(hid_t obj, const char *name, const char *value) {
    hid_t t = H5Tcopy(H5T_C_S1), s = H5Screate(H5S_SCALAR);
    H5Tset_size(t, strlen(value) + 1);
    hid_t a = H5Acreate2(obj, name, t, s, H5P_DEFAULT, H5P_DEFAULT);
    bool ok = a >= 0 && H5Awrite(a, t, value) >= 0;
    if (a >= 0 && H5Aclose(a) < 0) ok = false;
    H5Sclose(s);
    H5Tclose(t);
    return ok ? LSA_OK : LSA_E_IO;
}

/* *offset: where its bytes go; -1 for none. */
static lsa_status make_set(int64_t *offset, lsa_h5_writer *w, const char *name, lsa_h5_type t, int64_t rows,
                           int64_t cols, uint64_t xxh64, lsa_err *err) {
    lsa_status st = LSA_OK;
    char why[160], hex[17];
    const hsize_t dims[2] = {(hsize_t)rows, (hsize_t)cols};
    hid_t type = make_type(t), space = H5Screate_simple(cols ? 2 : 1, dims, NULL);
    hid_t dcpl = H5Pcreate(H5P_DATASET_CREATE), lcpl = H5Pcreate(H5P_LINK_CREATE), set;
    H5Pset_obj_track_times(dcpl, false);
    H5Pset_layout(dcpl, H5D_CONTIGUOUS);
    H5Pset_alloc_time(dcpl, H5D_ALLOC_TIME_EARLY);
    H5Pset_fill_time(dcpl, H5D_FILL_TIME_NEVER); /* every byte is written at once */
    H5Pset_create_intermediate_group(lcpl, 1);
    errno = 0;
    set = H5Dcreate2(w->file, name, type, space, lcpl, dcpl, H5P_DEFAULT);
    if (set < 0) LSA_FAIL(io_code(), "cannot create dataset '%s' in '%s': %s", name, w->path, h5_text(why));
    *offset = -1;
    if (rows) {
        const haddr_t at = H5Dget_offset(set);
        if (at == HADDR_UNDEF)
            LSA_FAIL(LSA_E_BUG, "dataset '%s' of '%s' has no place in the file", name, w->path);
        *offset = (int64_t)at;
    }
    lsa_hex64(hex, xxh64);
    if (put_attr(set, "xxh64", hex) != LSA_OK)
        LSA_FAIL(io_code(), "cannot write the hash of '%s' in '%s': %s", name, w->path, h5_text(why));
done:
    if (set >= 0 && H5Dclose(set) < 0 && st == LSA_OK)
        st = lsa_err_set(err, io_code(), __FILE__, __LINE__, "cannot close dataset '%s' of '%s': %s", name,
                         w->path, h5_text(why));
    H5Pclose(lcpl);
    H5Pclose(dcpl);
    H5Sclose(space);
    H5Tclose(type);
    return st;
}

static lsa_status put_pieces(const lsa_h5_writer *w, const char *name, int64_t bytes, int64_t offset,
                             const lsa_piece *piece, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int64_t i = 0; i < n; i++) bytes -= piece[i].n_bytes;
    if (bytes) LSA_FAIL(LSA_E_BUG, "dataset '%s': %lld bytes too few", name, (long long)bytes);
    for (int64_t i = 0; i < n; offset += piece[i++].n_bytes)
        LSA_TRY(lsa_pwrite_all(w->fd, piece[i].data, (size_t)piece[i].n_bytes, offset, w->path, err));
done:
    return st;
}

lsa_status lsa_h5_write(lsa_h5_writer *w, const char *name, lsa_h5_type t, int64_t rows, int64_t cols,
                        const lsa_piece *piece, int64_t n, uint64_t xxh64, lsa_err *err) {
    lsa_err own = {0};
    int64_t offset = -1;
    if (w->failed) return poison(w, LSA_E_IO, err, &own);
    pthread_mutex_lock(&g_lock);
    lsa_status st = make_set(&offset, w, name, t, rows, cols, xxh64, &own);
    pthread_mutex_unlock(&g_lock);
    const int64_t bytes = rows * (cols ? cols : 1) * lsa_h5_type_bytes(t);
    if (st == LSA_OK) st = put_pieces(w, name, bytes, offset, piece, n, &own);
    return st == LSA_OK ? LSA_OK : poison(w, st, err, &own);
}

lsa_status lsa_h5_attr_str(lsa_h5_writer *w, const char *object, const char *name, const char *value,
                           lsa_err *err) {
    lsa_err own = {0};
    char why[160];
    if (w->failed) return poison(w, LSA_E_IO, err, &own);
    pthread_mutex_lock(&g_lock);
    errno = 0;
    hid_t o = H5Oopen(w->file, object, H5P_DEFAULT);
    lsa_status st = LSA_OK;
    if (o < 0 || put_attr(o, name, value) != LSA_OK)
        st = lsa_err_set(&own, io_code(), __FILE__, __LINE__, "cannot write attribute '%s' of '%s': %s", name,
                         w->path, h5_text(why));
    if (o >= 0) H5Oclose(o);
    pthread_mutex_unlock(&g_lock);
    return st == LSA_OK ? LSA_OK : poison(w, st, err, &own);
}

lsa_status lsa_h5_finish(lsa_h5_writer *w, lsa_err *err) {
    char why[160];
    lsa_err own = {0};
    lsa_status st = LSA_OK;
    if (!w) return LSA_OK;
    if (w->fd >= 0 && close(w->fd) != 0)
        st = lsa_err_set(&own, lsa_status_from_errno(errno), __FILE__, __LINE__, "cannot close '%s': %s",
                         w->path, strerror(errno));
    pthread_mutex_lock(&g_lock);
    errno = 0;
    herr_t rc = H5Fclose(w->file);
    if (rc < 0 && st == LSA_OK)
        st = lsa_err_set(&own, io_code(), __FILE__, __LINE__, "cannot close '%s': %s", w->path, h5_text(why));
    pthread_mutex_unlock(&g_lock);
    if (w->failed || st != LSA_OK) st = poison(w, st, err, &own);
    lsa_free(w);
    return st;
}

/* ---- reader ---- */

struct lsa_h5_reader {
    hid_t file;
    int64_t n_bytes;
    char path[LSA_PATH_MAX];
};

lsa_status lsa_h5_open(lsa_h5_reader **out, const char *path, lsa_err *err) {
    lsa_h5_reader *r = NULL;
    char why[160];
    *out = NULL;
    lsa_status st = LSA_NEW(r, 1, err);
    if (st != LSA_OK) return st;
    snprintf(r->path, sizeof r->path, "%s", path);
    st = lsa_file_size(&r->n_bytes, path, err);
    if (st == LSA_OK) {
        pthread_mutex_lock(&g_lock);
        r->file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
        if (r->file < 0)
            st = lsa_err_set(
                err, LSA_E_FORMAT, __FILE__, __LINE__,
                "'%s' is not a readable HDF5 file (%s); it is truncated or damaged: delete it and resume the dump",
                path, h5_text(why));
        pthread_mutex_unlock(&g_lock);
    }
    if (st != LSA_OK) {
        lsa_free(r);
        return st;
    }
    *out = r;
    return LSA_OK;
}

void lsa_h5_close(lsa_h5_reader *r) {
    if (!r) return;
    pthread_mutex_lock(&g_lock);
    H5Fclose(r->file);
    H5Eclear2(H5E_DEFAULT);
    pthread_mutex_unlock(&g_lock);
    lsa_free(r);
}

static lsa_status get_attr(char *buf, size_t n, hid_t obj, const char *name) {
    hid_t a = H5Aopen(obj, name, H5P_DEFAULT);
    if (a < 0) return LSA_E_FORMAT;
    hid_t t = H5Aget_type(a), s = H5Aget_space(a);
    size_t size = H5Tget_size(t);
    bool ok = H5Tget_class(t) == H5T_STRING && H5Tis_variable_str(t) == 0 && size <= n &&
              H5Sget_simple_extent_npoints(s) == 1 && H5Aread(a, t, buf) >= 0;
    if (ok) buf[size < n ? size : n - 1] = 0;
    H5Sclose(s);
    H5Tclose(t);
    H5Aclose(a);
    return ok ? LSA_OK : LSA_E_FORMAT;
}

static bool path_exists(hid_t file, const char *name) {
    char part[256];
    for (const char *p = name + 1;; p++) {
        if (*p && *p != '/') continue;
        snprintf(part, sizeof part, "%.*s", (int)(p - name), name);
        if (H5Lexists(file, part, H5P_DEFAULT) <= 0) {
            H5Eclear2(H5E_DEFAULT);
            return false;
        }
        if (!*p) return true;
    }
}

bool lsa_h5_has(lsa_h5_reader *r, const char *name) {
    pthread_mutex_lock(&g_lock);
    bool yes = path_exists(r->file, name);
    pthread_mutex_unlock(&g_lock);
    return yes;
}

static lsa_status find_locked(lsa_h5_set *out, lsa_h5_reader *r, const char *name, lsa_h5_type t,
                              int64_t rows, int64_t cols, lsa_err *err) {
    lsa_status st = LSA_OK;
    char why[160], hex[32] = "";
    hid_t set = H5I_INVALID_HID, type = H5I_INVALID_HID, want = make_type(t), space = H5I_INVALID_HID,
          dcpl = H5I_INVALID_HID;
    if (!path_exists(r->file, name)) LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' is missing", r->path, name);
    set = H5Dopen2(r->file, name, H5P_DEFAULT);
    if (set < 0) LSA_FAIL(LSA_E_FORMAT, "'%s': cannot open dataset '%s': %s", r->path, name, h5_text(why));
    type = H5Dget_type(set);
    space = H5Dget_space(set);
    dcpl = H5Dget_create_plist(set);
    if (H5Tequal(type, want) <= 0)
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' must be of type %s", r->path, name, type_name(t));
    hsize_t dims[8] = {0};
    int nd = H5Sget_simple_extent_ndims(space);
    if (nd != (cols ? 2 : 1) || H5Sget_simple_extent_dims(space, dims, NULL) != nd)
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' has %d dimensions, expected %d", r->path, name, nd,
                 cols ? 2 : 1);
    if (H5Pget_layout(dcpl) != H5D_CONTIGUOUS)
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' is not contiguous", r->path, name);
    if (dims[0] > INT64_MAX / 4096 || dims[1] > INT64_MAX / 4096)
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' is too large", r->path, name);
    out->type = t;
    out->rows = (int64_t)dims[0];
    out->cols = cols ? (int64_t)dims[1] : 0;
    if ((rows >= 0 && rows != out->rows) || (cols > 0 && cols != out->cols))
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' is [%lld,%lld], expected [%lld,%lld]", r->path, name,
                 (long long)out->rows, (long long)out->cols, (long long)rows, (long long)cols);
    int64_t bytes;
    if (!lsa_mul_i64(out->rows, cols ? out->cols : 1, &bytes) ||
        !lsa_mul_i64(bytes, lsa_h5_type_bytes(t), &bytes))
        LSA_FAIL(LSA_E_FORMAT, "'%s': size of dataset '%s' overflows", r->path, name);
    haddr_t at = H5Dget_offset(set);
    out->offset = bytes ? (int64_t)at : -1;
    if (bytes && (at == HADDR_UNDEF || out->offset < 0 || bytes > r->n_bytes - out->offset))
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' reaches beyond the end of the file; it is truncated",
                 r->path, name);
    if (get_attr(hex, sizeof hex, set, "xxh64") != LSA_OK)
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' has no xxh64 attribute", r->path, name);
    LSA_TRY(lsa_unhex64(&out->xxh64, hex, err));
done:
    if (dcpl >= 0) H5Pclose(dcpl);
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    if (set >= 0) H5Dclose(set);
    H5Tclose(want);
    H5Eclear2(H5E_DEFAULT);
    return st;
}

lsa_status lsa_h5_find(lsa_h5_set *out, lsa_h5_reader *r, const char *name, lsa_h5_type t, int64_t rows,
                       int64_t cols, lsa_err *err) {
    memset(out, 0, sizeof *out);
    pthread_mutex_lock(&g_lock);
    lsa_status st = find_locked(out, r, name, t, rows, cols, err);
    pthread_mutex_unlock(&g_lock);
    return st;
}

lsa_status lsa_h5_get_str(char *buf, size_t n, lsa_h5_reader *r, const char *name, lsa_err *err) {
    pthread_mutex_lock(&g_lock);
    lsa_status st = get_attr(buf, n, r->file, name);
    H5Eclear2(H5E_DEFAULT);
    pthread_mutex_unlock(&g_lock);
    if (st != LSA_OK)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s': root attribute '%s' is missing or not a short string", r->path,
                     name);
    return LSA_OK;
}

lsa_status lsa_h5_get_set_str(char *buf, size_t n, lsa_h5_reader *r, const char *set, const char *name,
                              lsa_err *err) {
    lsa_status st = LSA_E_FORMAT;
    pthread_mutex_lock(&g_lock);
    const hid_t h = path_exists(r->file, set) ? H5Dopen2(r->file, set, H5P_DEFAULT) : H5I_INVALID_HID;
    if (h >= 0) {
        st = get_attr(buf, n, h, name);
        H5Dclose(h);
    }
    H5Eclear2(H5E_DEFAULT);
    pthread_mutex_unlock(&g_lock);
    if (st != LSA_OK)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s': attribute '%s' of dataset '%s' is missing or not a short string",
                     r->path, name, set);
    return LSA_OK;
}

/* ---- walking ---- */

lsa_status lsa_h5_find_any(lsa_h5_reader *r, const char *name, int64_t *n_bytes, int64_t *offset,
                           uint64_t *xxh64, lsa_err *err) {
    lsa_status st = LSA_OK;
    char hex[32] = "";
    pthread_mutex_lock(&g_lock);
    hid_t set = H5Dopen2(r->file, name, H5P_DEFAULT), space = H5I_INVALID_HID, type = H5I_INVALID_HID;
    if (set < 0) LSA_FAIL(LSA_E_FORMAT, "'%s': cannot open dataset '%s'", r->path, name);
    space = H5Dget_space(set);
    type = H5Dget_type(set);
    hssize_t n = H5Sget_simple_extent_npoints(space);
    size_t w = H5Tget_size(type);
    haddr_t at = H5Dget_offset(set);
    if (n < 0 || !lsa_mul_i64((int64_t)n, (int64_t)w, n_bytes))
        LSA_FAIL(LSA_E_FORMAT, "'%s': size of dataset '%s' is not sane", r->path, name);
    *offset = *n_bytes ? (int64_t)at : 0;
    if (*n_bytes && (at == HADDR_UNDEF || *offset < 0 || *n_bytes > r->n_bytes - *offset))
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' reaches beyond the end of the file; it is truncated",
                 r->path, name);
    if (get_attr(hex, sizeof hex, set, "xxh64") != LSA_OK)
        LSA_FAIL(LSA_E_FORMAT, "'%s': dataset '%s' has no xxh64 attribute", r->path, name);
    LSA_TRY(lsa_unhex64(xxh64, hex, err));
done:
    if (type >= 0) H5Tclose(type);
    if (space >= 0) H5Sclose(space);
    if (set >= 0) H5Dclose(set);
    H5Eclear2(H5E_DEFAULT);
    pthread_mutex_unlock(&g_lock);
    return st;
}

typedef struct name_list {
    char (*name)[128];
    int64_t n, cap;
} name_list;

static herr_t collect(hid_t obj, const char *name, const H5O_info_t *info, void *user) {
    name_list *l = user;
    (void)obj;
    if (info->type != H5O_TYPE_DATASET || strlen(name) > 120) return 0;
    if (lsa_grow_((void **)&l->name, &l->cap, l->n + 1, sizeof *l->name, "names", NULL) != LSA_OK) return -1;
    snprintf(l->name[l->n++], sizeof *l->name, "/%s", name);
    return 0;
}

lsa_status lsa_h5_each(lsa_h5_reader *r, lsa_status (*fn)(void *user, const char *name, lsa_err *err),
                       void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    name_list l = {0};
    pthread_mutex_lock(&g_lock);
    herr_t rc = H5Ovisit2(r->file, H5_INDEX_NAME, H5_ITER_INC, collect, &l, H5O_INFO_BASIC);
    H5Eclear2(H5E_DEFAULT);
    pthread_mutex_unlock(&g_lock);
    if (rc < 0) LSA_FAIL(LSA_E_FORMAT, "'%s': the group structure is damaged", r->path);
    for (int64_t i = 0; i < l.n; i++) LSA_TRY(fn(user, l.name[i], err));
done:
    lsa_free(l.name);
    return st;
}
