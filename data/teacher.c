/* A model folder under its original tensor names: finds a tensor whatever spelling the file uses, and
 * dequantises it.
 *
 * Dispatch is on the stored dtype, never on the name. The mistake that would stay silent: a scale that is not
 * found (the weights would still look plausible), so quantised tensors without their scale are refused. */
#include "data/teacher_internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/json.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

bool lsa_teacher_has(const lsa_teacher *t, const char *name) {
    lsa_st_tensor view;
    return lsa_teacher_find(t, name) || lsa_teacher_find_stacked(&view, NULL, t, name);
}

/* ---- values ---- */

static float scale_at(const lsa_st_tensor *s, int64_t i) {
    const unsigned char *p = s->data;
    if (s->dtype == LSA_F8_E8M0 || s->dtype == LSA_U8) return lsa_e8m0_to_f32(p[i]);
    float f;
    memcpy(&f, p + 4 * (size_t)i, 4);
    return f;
}

static lsa_status check_scale(const lsa_st_tensor *s, const char *name, int64_t rows, int64_t cols,
                              lsa_err *err) {
    if (!s)
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "tensor '%s' is quantised but its scale (.scale or .weight_scale_inv) is missing", name);
    if (s->dtype != LSA_F8_E8M0 && s->dtype != LSA_F32 && s->dtype != LSA_U8)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "scale of '%s' is %s, expected F8_E8M0 or F32", name,
                     lsa_dtype_name(s->dtype));
    if (s->n_dim != 2 || s->shape[0] != rows || s->shape[1] != cols)
        LSA_RET_FAIL(LSA_E_FORMAT, "scale of '%s' must be [%lld,%lld], found %lld elements", name,
                     (long long)rows, (long long)cols, (long long)s->n_elem);
    return LSA_OK;
}

lsa_status lsa_teacher_locate(lsa_teacher_place *out, const lsa_teacher *t, const char *name, int64_t rows,
                              int64_t cols, lsa_err *err) {
    memset(out, 0, sizeof *out);
    out->stored = lsa_teacher_find(t, name);
    if (out->stored)
        out->values = *out->stored;
    else if (!lsa_teacher_find_stacked(&out->values, &out->stored, t, name))
        LSA_RET_FAIL(LSA_E_FORMAT, "tensor '%s' is missing from model '%s' under every known spelling", name,
                     t->name);
    const lsa_st_tensor *x = &out->values;
    int64_t r = x->n_dim == 2 ? x->shape[0] : 1, c = x->n_dim == 2   ? x->shape[1]
                                                     : x->n_dim == 1 ? x->shape[0]
                                                                     : 0;
    const bool packed = (x->dtype == LSA_I8 || x->dtype == LSA_U8) && r == rows && c * 2 == cols;
    if (!packed && (r != rows || c != cols))
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "tensor '%s': config.json needs [%lld,%lld], the file has %d dimensions, [%lld,%lld]",
                     x->name, (long long)rows, (long long)cols, x->n_dim, (long long)r, (long long)c);
    out->fp4 = packed || x->dtype == LSA_F4;
    if (out->fp4 && cols % 32)
        LSA_RET_FAIL(LSA_E_FORMAT, "tensor '%s': %lld fp4 columns are not a multiple of 32", x->name,
                     (long long)cols);
    if (out->fp4 || x->dtype == LSA_F8_E4M3) {
        out->scale = lsa_teacher_find_scale(t, x->name);
        return out->fp4
                   ? check_scale(out->scale, x->name, rows, cols / 32, err)
                   : check_scale(out->scale, x->name, lsa_ceil_div(rows, 128), lsa_ceil_div(cols, 128), err);
    }
    if (x->dtype == LSA_F32 || x->dtype == LSA_BF16 || x->dtype == LSA_F16) return LSA_OK;
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "tensor '%s' is %s; expected F32, BF16, F16, F8_E4M3 or packed FP4",
                 x->name, lsa_dtype_name(x->dtype));
}

static void dequant_fp8(float *dst, const lsa_teacher_place *f, int64_t rows, int64_t cols) {
    const int64_t bc = lsa_ceil_div(cols, 128);
    const unsigned char *p = f->values.data;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t b = 0; b < bc; b++) {
            const float s = scale_at(f->scale, i / 128 * bc + b);
            for (int64_t j = b * 128; j < lsa_min_i64(cols, b * 128 + 128); j++)
                dst[i * cols + j] = lsa_e4m3_table[p[i * cols + j]] * s;
        }
}

static void dequant_fp4(float *dst, const lsa_teacher_place *f, int64_t rows, int64_t cols) {
    const unsigned char *p = f->values.data;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            const unsigned byte = p[(i * cols + j) / 2];
            dst[i * cols + j] =
                lsa_e2m1_table[j % 2 ? byte >> 4 : byte & 15u] * scale_at(f->scale, i * (cols / 32) + j / 32);
        }
}

lsa_status lsa_teacher_f32(float *dst, const lsa_teacher *t, const char *name, int64_t rows, int64_t cols,
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_teacher_place f;
    LSA_TRY(lsa_teacher_locate(&f, t, name, rows, cols, err));
    if (f.fp4)
        dequant_fp4(dst, &f, rows, cols);
    else if (f.scale)
        dequant_fp8(dst, &f, rows, cols);
    else
        LSA_TRY(lsa_st_to_f32(dst, &f.values, err));
    for (int64_t i = 0; i < rows * cols; i++)
        if (!isfinite(dst[i]))
            LSA_FAIL(LSA_E_FORMAT,
                     "tensor '%s' of model '%s': element [%lld,%lld] is not a finite number; the file is "
                     "damaged, get it again",
                     f.values.name, t->name, (long long)(i / cols), (long long)(i % cols));
done:
    return st;
}

lsa_status lsa_teacher_locate_ids(const lsa_st_tensor **out, const lsa_teacher *t, const char *name,
                                  int64_t rows, int64_t cols, lsa_err *err) {
    const lsa_st_tensor *x = lsa_teacher_find(t, name);
    *out = x;
    if (!x) LSA_RET_FAIL(LSA_E_FORMAT, "tensor '%s' is missing from model '%s'", name, t->name);
    if (x->n_dim != 2 || x->shape[0] != rows || x->shape[1] != cols ||
        (x->dtype != LSA_I64 && x->dtype != LSA_I32))
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "tensor '%s': expected I64 or I32 [%lld,%lld], found %s with %lld elements", x->name,
                     (long long)rows, (long long)cols, lsa_dtype_name(x->dtype), (long long)x->n_elem);
    return LSA_OK;
}

lsa_status lsa_teacher_i64(int64_t *dst, const lsa_teacher *t, const char *name, int64_t rows, int64_t cols,
                           lsa_err *err) {
    const lsa_st_tensor *x;
    const lsa_status st = lsa_teacher_locate_ids(&x, t, name, rows, cols, err);
    if (st != LSA_OK) return st;
    const unsigned char *p = x->data;
    for (int64_t i = 0; i < x->n_elem; i++) {
        int32_t small;
        if (x->dtype == LSA_I64)
            memcpy(&dst[i], p + 8 * (size_t)i, 8);
        else {
            memcpy(&small, p + 4 * (size_t)i, 4);
            dst[i] = small;
        }
    }
    return LSA_OK;
}

/* ---- opening ---- */

static lsa_status add_file(lsa_teacher *t, const char *dir, const char *file, lsa_err *err) {
    char path[LSA_PATH_MAX];
    if (strchr(file, '/')) LSA_RET_FAIL(LSA_E_FORMAT, "%s: shard name '%s' must not contain '/'", dir, file);
    if (t->n_file == LSA_TEACHER_FILES)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "%s: more than %d safetensors files", dir, LSA_TEACHER_FILES);
    lsa_status st = lsa_path(path, err, "%s/%s", dir, file);
    if (st == LSA_OK) st = lsa_st_open(&t->file[t->n_file], path, err);
    if (st == LSA_OK) t->n_file++;
    return st;
}

/* An unfinished download is the usual fault: say once how much is missing, before anything is opened. */
static lsa_status all_there(json_t *files, const char *dir, lsa_err *err) {
    char path[LSA_PATH_MAX];
    const char *file, *first = NULL;
    json_t *v;
    size_t missing = 0;
    json_object_foreach(files, file, v) {
        const lsa_status st = lsa_path(path, err, "%s/%s", dir, file);
        if (st != LSA_OK) return st;
        if (lsa_exists(path)) continue;
        if (missing++ == 0) first = file;
    }
    if (missing)
        LSA_RET_FAIL(
            LSA_E_FORMAT,
            "'%s': %zu of %zu weight files that model.safetensors.index.json names are missing, first '%s'; "
            "get them",
            dir, missing, json_object_size(files), first);
    return LSA_OK;
}

static lsa_status add_files(lsa_teacher *t, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *index = NULL, *map, *files = json_object();
    char path[LSA_PATH_MAX];
    LSA_TRY(lsa_path(path, err, "%s/model.safetensors.index.json", dir));
    if (!lsa_exists(path)) {
        LSA_TRY(lsa_path(path, err, "%s/model.safetensors", dir));
        if (!lsa_exists(path))
            LSA_FAIL(LSA_E_IO,
                     "'%s' holds no weights: neither model.safetensors.index.json nor model.safetensors",
                     dir);
        LSA_TRY(add_file(t, dir, "model.safetensors", err));
        goto done;
    }
    LSA_TRY(lsa_json_load(&index, path, err));
    LSA_TRY(lsa_json_object(&map, index, "weight_map", path, err));
    const char *tensor;
    json_t *v;
    json_object_foreach(map, tensor, v) {
        if (!json_is_string(v)) LSA_FAIL(LSA_E_FORMAT, "%s: weight_map['%s'] is not a string", path, tensor);
        json_object_set_new(files, json_string_value(v), json_true());
    }
    LSA_TRY(all_there(files, dir, err));
    json_object_foreach(files, tensor, v) LSA_TRY(add_file(t, dir, tensor, err));
done:
    json_decref(index);
    json_decref(files);
    return st;
}

static void set_identity(lsa_teacher *t, const char *dir, const char *config, size_t n_config) {
    char trimmed[LSA_PATH_MAX];
    snprintf(trimmed, sizeof trimmed, "%s", dir);
    for (size_t n = strlen(trimmed); n > 1 && trimmed[n - 1] == '/'; n--) trimmed[n - 1] = 0;
    const char *slash = strrchr(trimmed, '/');
    snprintf(t->name, sizeof t->name, "%.127s", slash ? slash + 1 : trimmed);
    uint64_t h = lsa_xxh64(config, n_config);
    uint64_t sum = 0; /* order of files and tensors must not matter */
    for (int32_t i = 0; i < t->n_file; i++)
        for (int64_t j = 0; j < lsa_st_count(t->file[i]); j++) {
            const lsa_st_tensor *x = lsa_st_at(t->file[i], j);
            size_t n = x->n_bytes < 256 ? x->n_bytes : 256;
            uint64_t k[3] = {lsa_xxh64(x->name, strlen(x->name)), (uint64_t)x->n_bytes,
                             lsa_xxh64(x->data, n)};
            sum += lsa_xxh64(k, sizeof k);
        }
    uint64_t both[2] = {h, sum};
    t->hash = lsa_xxh64(both, sizeof both);
}

lsa_status lsa_teacher_open(lsa_teacher **out, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_teacher *t = NULL;
    char path[LSA_PATH_MAX], *text = NULL;
    size_t n;
    *out = NULL;
    LSA_TRY(lsa_alloc_((void **)&t, 1, sizeof *t, "teacher", err));
    if (!lsa_is_dir(dir))
        LSA_FAIL(LSA_E_IO, "teacher '%s' is not a folder; give the folder that holds config.json", dir);
    LSA_TRY(lsa_path(path, err, "%s/config.json", dir));
    LSA_TRY(lsa_teacher_config_load(&t->cfg, path, err));
    LSA_TRY(lsa_read_file(&text, &n, path, err));
    LSA_TRY(add_files(t, dir, err));
    set_identity(t, dir, text, n);
    *out = t;
    t = NULL;
done:
    lsa_free(text);
    lsa_teacher_close(t);
    return st;
}

void lsa_teacher_close(lsa_teacher *t) {
    if (!t) return;
    for (int32_t i = 0; i < t->n_file; i++) lsa_st_close(t->file[i]);
    lsa_free(t);
}

const lsa_teacher_config *lsa_teacher_cfg(const lsa_teacher *t) {
    return &t->cfg;
}
const char *lsa_teacher_name(const lsa_teacher *t) {
    return t->name;
}
uint64_t lsa_teacher_hash(const lsa_teacher *t) {
    return t->hash;
}
