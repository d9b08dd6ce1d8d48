/* Named weights of a file: see tensor_file.h. The mistake that would stay silent: taking fp8 codes without
 * their scales for the weights themselves. */
#include "data/tensor_file.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "data/torch_file.h"
#include "kernels/core/file.h"
#include "kernels/core/json.h"
#include "kernels/core/mem.h"

struct lsa_tensor_file {
    lsa_st *st; /* one of the two */
    lsa_torch *pt;
    json_t *note; /* of pt; may be NULL */
    char path[LSA_PATH_MAX];
};

static bool is_zip(const char *path) {
    char magic[4] = {0};
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const bool zip = fd >= 0 && read(fd, magic, 4) == 4 && !memcmp(magic, "PK\3\4", 4);
    if (fd >= 0) close(fd);
    return zip;
}

/* A pickle at the start, or a path that says so: torch.save before 1.6. Safetensors would complain about its
 * header. */
static bool is_legacy(const char *path) {
    const char *dot = strrchr(path, '.');
    return dot && (!strcmp(dot, ".pt") || !strcmp(dot, ".pth") || !strcmp(dot, ".bin"));
}

lsa_status lsa_tensor_file_open(lsa_tensor_file **out, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_tensor_file *f = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(f, 1, err));
    LSA_TRY(lsa_path(f->path, err, "%s", path));
    if (is_zip(path) || is_legacy(path)) {
        size_t n;
        LSA_TRY(lsa_torch_open(&f->pt, path, err));
        const char *note = lsa_torch_note(f->pt, &n);
        if (note) LSA_TRY(lsa_json_parse(&f->note, note, n, path, err));
    } else {
        LSA_TRY(lsa_st_open(&f->st, path, err));
    }
    *out = f;
    f = NULL;
done:
    lsa_tensor_file_close(f);
    return st;
}

void lsa_tensor_file_close(lsa_tensor_file *f) {
    if (!f) return;
    lsa_st_close(f->st);
    lsa_torch_close(f->pt);
    json_decref(f->note);
    lsa_free(f);
}

const char *lsa_tensor_file_path(const lsa_tensor_file *f) {
    return f->path;
}
int64_t lsa_tensor_file_count(const lsa_tensor_file *f) {
    return f->st ? lsa_st_count(f->st) : lsa_torch_count(f->pt);
}
const lsa_st_tensor *lsa_tensor_file_at(const lsa_tensor_file *f, int64_t i) {
    return f->st ? lsa_st_at(f->st, i) : lsa_torch_at(f->pt, i);
}
const lsa_st_tensor *lsa_tensor_file_find(const lsa_tensor_file *f, const char *name) {
    return f->st ? lsa_st_find(f->st, name) : lsa_torch_find(f->pt, name);
}
const char *lsa_tensor_file_metadata(const lsa_tensor_file *f, const char *key) {
    return f->st ? lsa_st_metadata(f->st, key) : json_string_value(json_object_get(f->note, key));
}

static lsa_status to_f32(float *dst, const lsa_tensor_file *f, const lsa_st_tensor *t, lsa_err *err) {
    return f->st ? lsa_st_to_f32(dst, t, err) : lsa_torch_to_f32(dst, f->pt, t, err);
}

static lsa_status apply_scale(float *x, const lsa_tensor_file *f, const lsa_st_tensor *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    char name[160];
    float *scale = NULL;
    const int64_t rows = t->shape[0], cols = rows ? t->n_elem / rows : 0;
    snprintf(name, sizeof name, "%.140s_scale", t->name);
    const lsa_st_tensor *s = lsa_tensor_file_find(f, name);
    if (!s)
        LSA_FAIL(LSA_E_FORMAT, "'%s': tensor '%s' holds fp8 codes, but their scales '%s' are missing",
                 f->path, t->name, name);
    if (s->dtype != LSA_F32 || s->n_dim < 1 || s->n_elem != rows || s->shape[0] != rows)
        LSA_FAIL(LSA_E_FORMAT,
                 "'%s': tensor '%s': expected one f32 scale for each of %lld rows, found %lld of %s", f->path,
                 name, (long long)rows, (long long)s->n_elem, lsa_dtype_name(s->dtype));
    LSA_TRY(LSA_NEW(scale, rows, err));
    LSA_TRY(to_f32(scale, f, s, err));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < cols; i++) x[r * cols + i] *= scale[r];
done:
    lsa_free(scale);
    return st;
}

static void shape_text(char *out, size_t cap, int32_t n_dim, const int64_t *shape) {
    size_t n = 0;
    out[0] = 0;
    for (int32_t i = 0; i < n_dim && n + 24 < cap; i++)
        n += (size_t)snprintf(out + n, cap - n, "%s%lld", i ? "," : "", (long long)shape[i]);
}

lsa_status lsa_tensor_file_read(float *dst, const lsa_tensor_file *f, const char *name, int32_t n_dim,
                                const int64_t *shape, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_st_tensor *t = lsa_tensor_file_find(f, name);
    if (!t) LSA_FAIL(LSA_E_FORMAT, "'%s': tensor '%s' is missing", f->path, name);
    bool same = t->n_dim == n_dim;
    for (int32_t i = 0; same && i < n_dim; i++) same = t->shape[i] == shape[i];
    if (!same) {
        char want[128], got[256];
        shape_text(want, sizeof want, n_dim, shape);
        shape_text(got, sizeof got, t->n_dim, t->shape);
        LSA_FAIL(LSA_E_FORMAT, "'%s': tensor '%s': expected [%s], found [%s]", f->path, name, want, got);
    }
    if (t->dtype != LSA_F32 && t->dtype != LSA_F16 && t->dtype != LSA_BF16 && t->dtype != LSA_F64 &&
        t->dtype != LSA_F8_E4M3)
        LSA_FAIL(LSA_E_FORMAT, "'%s': tensor '%s': %s are not weights", f->path, name,
                 lsa_dtype_name(t->dtype));
    LSA_TRY(to_f32(dst, f, t, err));
    if (t->dtype == LSA_F8_E4M3) LSA_TRY(apply_scale(dst, f, t, err));
    for (int64_t i = 0; i < t->n_elem; i++)
        if (!isfinite(dst[i]))
            LSA_FAIL(LSA_E_FORMAT, "'%s': tensor %s: element %lld is not finite", f->path, name,
                     (long long)i);
done:
    return st;
}
